"""Check an experiment's settings without starting anything."""

from __future__ import annotations

import argparse
from pathlib import Path

from actorlearner.flags import add_experiment_flags, load_chosen_experiment
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.lifecycle import ExitCode, Stop, run_to_exit
from actorlearner.runtime.telemetry import set_up_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the experiment to check."""
    add_experiment_flags(parser)
    parser.add_argument("--root_dir", type=Path, help="also check that this directory can be written")


def run(arguments: argparse.Namespace) -> int:
    """Prints the result and ends the process with the exit code that a role would have; never returns."""
    set_up_logging()

    def check(_stop: Stop) -> ExitCode:
        if arguments.root_dir:
            RunDirectory(arguments.root_dir).require_writable()
        experiment = load_chosen_experiment(arguments)
        print(f"{experiment.name} can be started", flush=True)
        return ExitCode.DONE

    run_to_exit(check)
