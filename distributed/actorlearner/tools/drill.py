"""Do to a small run what happens to long ones, and say which promises held (in a checkout)."""

from __future__ import annotations

import argparse

from actorlearner import checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of drills/run.py."""
    checkout.load("drills.run").add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs it and returns its exit status."""
    return checkout.load("drills.run").run(arguments)
