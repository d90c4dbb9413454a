"""Measure the subjects asked for, print the table and write it as JSON: `actorlearner bench`."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from actorlearner.flags import positive
from actorlearner.runtime.lifecycle import ExitCode
from benchmarks import collecting, endurance, learner, minitaur, replay_servers, scaling, tls, weights
from benchmarks.machine import describe_date, describe_machine
from benchmarks.measuring import CHECKOUT, Settings, SideFailed
from benchmarks.results import Row, make_markdown, make_table

SUBJECTS: Mapping[str, Callable[[Settings], Sequence[Row]]] = {
    "learner": learner.compare,
    "learner-gpu": learner.compare_on_gpu,
    "learner-recipe": learner.compare_recipe,
    "minitaur": minitaur.compare,
    "collect-minitaur": collecting.compare_minitaur,
    "collect-cartpole": collecting.compare_cartpole,
    "weights": weights.compare,
    "scaling": scaling.compare,
    "tls": tls.compare,
    "replay-servers": replay_servers.compare,
    "endurance": endurance.compare,
}
EXTRA = ("replay-servers", "endurance")
DEFAULT = tuple(name for name in SUBJECTS if name not in EXTRA)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to measure, how often and where the figures go."""
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="NAME",
        help=f"{', '.join(SUBJECTS)} (default: all but {' and '.join(EXTRA)})",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns of each side (default: 5)")
    parser.add_argument(
        "--window_secs", type=float, metavar="SECS", help="shortest timed window (default: the subject's own)"
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="N", help="length of the endurance run (default: 60)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench.json"), metavar="FILE", help="output file (default: bench.json)"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="measure nothing; print the table of an earlier --output"
    )
    parser.add_argument(
        "--peers_python", type=Path, default=CHECKOUT / ".venv-bench" / "bin" / "python", metavar="PYTHON",
        help="interpreter with Stable-Baselines3 and SBX (default: that of .venv-bench, which launch/bench.sh makes)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with its parsed flags and returns its exit status: 1 if a subject could not be measured."""
    if arguments.markdown:
        return print_markdown(arguments.markdown)
    unknown = sorted(set(arguments.only or ()) - set(SUBJECTS))
    if unknown:
        print(f"error: --only: there is no {', '.join(unknown)}; there are {', '.join(SUBJECTS)}", file=sys.stderr)
        return ExitCode.USAGE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.TERMINATED))  # exit normally: closes the sides
    folder = Path(tempfile.mkdtemp(prefix="actorlearner-bench-"))
    console = Console(width=None if sys.stdout.isatty() else 160)
    settings = Settings(
        folder=folder,
        peers_python=arguments.peers_python.absolute(),
        repeats=arguments.repeats,
        window_secs=arguments.window_secs,
        minutes=arguments.minutes,
        say=lambda text: console.print(text, markup=False, highlight=False),
    )
    report: dict[str, Any] = {
        "command": shlex.join(["actorlearner", *sys.argv[1:]]),
        "date": describe_date(),
        "machine": describe_machine(settings.peers_python),
        "repeats": settings.repeats,
        "failures": {},
        "rows": [],
    }
    rows: list[Row] = []
    for name in arguments.only or DEFAULT:
        console.print(f"{name}: {SUBJECTS[name].__module__.replace('.', '/')}.py", markup=False, highlight=False)
        try:
            rows += SUBJECTS[name](settings)
        except SideFailed as error:
            report["failures"][name] = str(error)
            console.print(f"{name} failed: {error}", style="red", markup=False, highlight=False)
        except (KeyboardInterrupt, SystemExit):
            if not report["failures"]:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        report["rows"] = [row.to_json() for row in rows]
        # written now, because the next subject may be interrupted
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    machine = report["machine"]
    console.print(make_table(rows, f"{machine['cpu']}, {machine['cores']} cores; {machine['gpu'] or 'no GPU'}"))
    console.print(f"written to {arguments.output}", markup=False, highlight=False)
    if report["failures"]:
        console.print(f"the processes' logs are in {folder}", markup=False, highlight=False)
        return ExitCode.CRASH
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def print_markdown(path: Path) -> int:
    """Prints the table of an earlier run's JSON file."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"error: --markdown = '{path}' cannot be read: {error}", file=sys.stderr)
        return ExitCode.USAGE
    print(make_markdown(report), end="")
    return 0
