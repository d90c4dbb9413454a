"""Measure speed against references, in turns on this machine (in a checkout)."""

from __future__ import annotations

import argparse

from actorlearner import checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of benchmarks/run.py."""
    checkout.load("benchmarks.run").add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs it and returns its exit status."""
    return checkout.load("benchmarks.run").run(arguments)
