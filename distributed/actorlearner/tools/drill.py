"""Inject faults into a small run and report which promises held (in a checkout)."""

from __future__ import annotations

import argparse

from actorlearner import checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of drills/run.py; without a checkout `--help` works, and `run` says what is missing."""
    if checkout.has("drills.run"):
        checkout.load("drills.run").add_arguments(parser)
    else:
        parser.add_argument("arguments", nargs="*", help="see ./launch/drill.sh --help in a checkout")


def run(arguments: argparse.Namespace) -> int:
    """Runs the drill and returns the exit status."""
    return checkout.load("drills.run").run(arguments)
