"""Say whether the role that touches a file makes progress."""

from __future__ import annotations

import argparse
from pathlib import Path

from actorlearner.runtime.health import describe_problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which role, and how old its last touch may be."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the role's --health_file")
    parser.add_argument(
        "--max_age_secs", type=float, default=60.0, metavar="SECS", help="of the last touch (default: 60)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints what it found; returns 1 if the role makes no progress."""
    problem = describe_problem(arguments.file, arguments.max_age_secs)
    print(problem or "goes on")
    return 1 if problem else 0
