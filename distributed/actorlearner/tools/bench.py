"""Measure speed against references on this machine (in a checkout)."""

from __future__ import annotations

import argparse

from actorlearner import checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of benchmarks/run.py; without a checkout `--help` works, and `run` says what is missing."""
    if checkout.has("benchmarks.run"):
        checkout.load("benchmarks.run").add_arguments(parser)
    else:
        parser.add_argument("arguments", nargs="*", help="see ./launch/bench.sh --help in a checkout")


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmarks and returns the exit status."""
    return checkout.load("benchmarks.run").run(arguments)
