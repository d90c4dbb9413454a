"""Say whether the role that touches a file goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from actorlearner.runtime.health import describe_problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which role, and how long it may be silent."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the role's --health_file")
    parser.add_argument(
        "--max_age_secs", type=float, default=60.0, metavar="SECS", help="of the last sign of life (default: 60)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints what it found; returns 1 where the role does not go on."""
    problem = describe_problem(arguments.file, arguments.max_age_secs)
    print(problem or "goes on")
    return 1 if problem else 0
