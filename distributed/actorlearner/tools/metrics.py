"""A run's numbers for Prometheus, read from the run directory whenever it asks.

learner --> status.json, metrics.jsonl --> [metrics] <--scrape-- Prometheus

Nothing is kept here, so it can be started, killed and left out at will, and training never waits for it.
"""

from __future__ import annotations

import http.server
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from actorlearner.run_directory import RunDirectory
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TAIL_BYTES = 65_536


def serve_metrics(root_dir: Path, host: str, port: int, stop: Stop) -> ExitCode:
    """Answers GET /metrics until `stop` is set.

    Raises:
      RoleError: The port is taken (UNAVAILABLE).
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404, "the numbers are at /metrics")
                return
            body = format_metrics(RunDirectory(root_dir)).encode()
            self.send_response(200)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            logging.debug(format, *args)

    try:
        server = http.server.ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise RoleError(
            f"--host = {host}, --port = {port}: cannot listen there: {error.strerror}. "
            "Stop what uses the port, or give another.",
            ExitCode.UNAVAILABLE,
        ) from error
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        logging.info("serving metrics of %s on port %d", root_dir, server.server_port)
        while not stop.wait(3600.0):
            pass
        server.shutdown()
    return stop.exit_code


def format_metrics(directory: RunDirectory, now: Optional[float] = None) -> str:
    """Returns Prometheus' text format: the status, the newest training point and the newest evaluation, as gauges.

    A number that is missing or not finite yet is left out. `actorlearner_status_age_seconds` grows when the learner is
    gone, and is what to alert on.
    """
    status = directory.read_json(directory.status)
    lines: list[str] = []
    if isinstance(status, dict):
        now = time.time() if now is None else now
        _add(lines, "status_age_seconds", max(0.0, now - status.get("time", 0.0)), "since the learner's last word")
        phase = str(status.get("phase")).replace("\\", "").replace('"', "")
        _add(lines, "phase", 1, "what the learner is at", f'{{phase="{phase}"}}')
        for name, value in status.items():
            if name not in ("time", "process"):
                _add(lines, name, value, f"{name} of status.json")
        for name, value in (status.get("replay") or {}).items():
            _add(lines, f"replay_{name}", value, f"the replay's {name}")
        _add_servers(lines, (status.get("replay") or {}).get("servers") or {})
    for kind, values in _newest_points(directory.metrics).items():
        for name, value in values.items():
            if name not in ("kind", "time"):
                _add(lines, f"{kind}_{name}", value, f"{name} of the newest {kind} point in metrics.jsonl")
    return "\n".join(lines) + "\n" if lines else ""


def _add(lines: list[str], name: str, value: Any, text: str, labels: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return
    spelt_out = re.sub(r"_sec(s?)$", r"_second\1", name)  # as Prometheus' own linter wants units
    name = "actorlearner_" + re.sub(r"[^a-zA-Z0-9_]", "_", spelt_out)
    lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name}{labels} {value:.17g}"]


def _add_servers(lines: list[str], servers: Mapping[str, bool]) -> None:
    if servers:
        name = "actorlearner_replay_server_answers"
        lines += [f"# HELP {name} 1 while the replay server answers the learner, 0 else", f"# TYPE {name} gauge"]
        lines += [f'{name}{{address="{address}"}} {answers:d}' for address, answers in servers.items()]


def _newest_points(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the last point of each kind among the newest lines; a line that is still being written is passed over."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except OSError:
        return {}
    points: dict[str, dict[str, Any]] = {}
    for line in tail.splitlines():
        try:
            point = json.loads(line)
            points[str(point["kind"])] = point
        except (ValueError, KeyError, TypeError):
            continue
    return points
