"""Serve a run's numbers to Prometheus, read from the run directory at every scrape.

learner --> status.json, metrics.jsonl --> [metrics] <--scrape-- Prometheus

It keeps no state, so it can be started and killed at any time, and training never waits for it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, run_to_exit
from actorlearner.runtime.telemetry import set_up_logging

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import GaugeMetricFamily

_TAIL_BYTES = 65_536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run directory, and where to listen."""
    parser.add_argument("root_dir", type=Path, metavar="ROOT_DIR", help="directory of a run")
    parser.add_argument("--port", type=int, default=9464, metavar="N", help="port to listen on (default: 9464)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 admits other machines (default: 127.0.0.1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until stopped, then ends the process; never returns."""
    set_up_logging()
    run_to_exit(lambda stop: serve_metrics(arguments.root_dir, arguments.host, arguments.port, stop))


def serve_metrics(root_dir: Path, host: str, port: int, stop: Stop) -> ExitCode:
    """Answers Prometheus until `stop` is set.

    Raises:
      RoleError: The port is taken (UNAVAILABLE).
    """
    import prometheus_client

    try:
        server, _ = prometheus_client.start_http_server(port, host, make_registry(RunDirectory(root_dir)))
    except OSError as error:
        raise RoleError(
            f"--host = {host}, --port = {port}: cannot listen there: {error.strerror}. "
            "Stop what uses the port, or give another.",
            ExitCode.UNAVAILABLE,
        ) from error
    with server:
        logging.info("serving metrics of %s on port %d", root_dir, server.server_port)
        while not stop.wait(3600.0):
            pass
        server.shutdown()
    return stop.exit_code


def make_registry(directory: RunDirectory) -> CollectorRegistry:
    """Returns a registry of one run's numbers, which reads them at every scrape."""
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    registry.register(RunCollector(directory))
    return registry


class RunCollector:
    """The status, the newest training point and the newest evaluation of a run, as gauges.

    A number that is missing or not finite is left out. `actorlearner_status_age_seconds` grows when the learner is
    gone; alert on it.
    """

    def __init__(self, directory: RunDirectory):
        self._directory = directory

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # the metrics depend on the run, which may not have started

    def collect(self) -> Iterator[GaugeMetricFamily]:
        from prometheus_client.core import GaugeMetricFamily

        status = self._directory.read_json(self._directory.status)
        if isinstance(status, dict):
            age_secs = max(0.0, time.time() - status.get("time", 0.0))
            yield from _gauge("status_age_seconds", age_secs, "since the learner's last status")
            if status.get("train_step_time"):
                age_secs = max(0.0, time.time() - status["train_step_time"])
                yield from _gauge("train_step_age_seconds", age_secs, "since the last train step")
            phase = GaugeMetricFamily("actorlearner_phase", "phase of the learner", labels=["phase"])
            phase.add_metric([str(status.get("phase"))], 1)
            yield phase
            for name, value in status.items():
                if name not in ("time", "train_step_time", "process"):
                    yield from _gauge(name, value, f"{name} of status.json")
            for name, value in (status.get("replay") or {}).items():
                yield from _gauge(f"replay_{name}", value, f"the replay's {name}")
            yield from _servers((status.get("replay") or {}).get("servers") or {})
        for kind, values in _newest_points(self._directory.metrics).items():
            for name, value in values.items():
                if name not in ("kind", "time"):
                    yield from _gauge(f"{kind}_{name}", value, f"{name} of the newest {kind} point in metrics.jsonl")


def _gauge(name: str, value: Any, text: str) -> Iterator[GaugeMetricFamily]:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return
    from prometheus_client.core import GaugeMetricFamily

    spelt_out = re.sub(r"_sec(s?)$", r"_second\1", name)  # as Prometheus' own linter wants units
    yield GaugeMetricFamily("actorlearner_" + re.sub(r"[^a-zA-Z0-9_]", "_", spelt_out), text, value=value)


def _servers(servers: Mapping[str, bool]) -> Iterator[GaugeMetricFamily]:
    from prometheus_client.core import GaugeMetricFamily

    if servers:
        family = GaugeMetricFamily(
            "actorlearner_replay_server_answers",
            "1 if the replay server answers the learner, else 0",
            labels=["address"],
        )
        for address, answers in servers.items():
            family.add_metric([address], float(answers))
        yield family


def _newest_points(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the last point of each kind among the newest lines; skips a line that is still being written."""
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
