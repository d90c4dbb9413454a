"""Wait until a run is over, including its videos.

For what should end with it: TensorBoard in a container, a script's next step.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from actorlearner.run.directory import RunDirectory
from actorlearner.run.status import OVER, read_status
from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, Stop, run_to_exit
from actorlearner.runtime.telemetry import set_up_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run directory."""
    parser.add_argument("root_dir", type=Path, metavar="ROOT_DIR", help="the run directory; may still be empty")


def run(arguments: argparse.Namespace) -> int:
    """Waits and ends the process; never returns."""
    set_up_logging()
    run_to_exit(lambda stop: await_end(arguments.root_dir, stop))


def await_end(root_dir: Path, stop: Stop, *, settle_secs: float = 120.0, every_secs: float = 1.0) -> ExitCode:
    """Returns once the run is over; there is no deadline, as training may take weeks.

    Args:
      root_dir: The run directory; may still be empty.
      stop: Ends the wait.
      settle_secs: A run that was over before this call counts as over after this time, in seconds: until then a learner
        may be starting that resumes it.
      every_secs: Time between two looks, in seconds.
    """
    directory = RunDirectory(root_dir)
    began_at = time.time()
    start = said = time.monotonic()
    while True:
        status = read_status(directory.status)
        is_new = status is not None and status.time >= began_at
        if status and status.phase == OVER and (is_new or time.monotonic() - start > settle_secs):
            return ExitCode.DONE
        if time.monotonic() - said > SAY_EVERY_SECS * 20:
            said = time.monotonic()
            phase = status.phase if status else "nothing yet"
            logging.info("waiting for the run in %s to end; phase: %s", root_dir, phase)
        if stop.wait(every_secs):
            return stop.exit_code
