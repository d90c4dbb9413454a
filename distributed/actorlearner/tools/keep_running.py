"""Run a command and restart it when it dies, as `train` does with its roles.

For launchers in other languages: launch/slurm.sbatch, launch/ssh.sh, launch/tpu_vm.sh.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Collection, Sequence
from typing import Optional

from actorlearner.launcher.command import PROGRAM
from actorlearner.launcher.restarts import DEFAULT_TIMING, KILLED_CODES, Restarts, Timing
from actorlearner.runtime.lifecycle import FINAL_CODES, ExitCode

_PAUSE_SLICE_SECS = 0.1  # how late a signal ends a pause


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's name, and the exit codes after which it is not restarted."""
    parser.usage = "actorlearner keep-running NAME [options] -- COMMAND [ARGUMENT...]"
    final = ", ".join(str(int(code)) for code in FINAL_CODES)
    parser.epilog = (
        f"Returns the last exit code of COMMAND: 0 when its work is done, one of {final} when a restart cannot help, "
        "143 after SIGTERM, and that of a command that keeps dying early. `actorlearner` as COMMAND is this program."
    )
    parser.add_argument("name", metavar="NAME", help="name in log lines, such as collect-actor-3")
    parser.add_argument(
        "--also_ends_with", type=int, action="append", default=[], metavar="CODE",
        help="a further exit code after which it is not restarted; may be repeated",
    )  # fmt: skip
    parser.set_defaults(behind_dashes=[])


def run(arguments: argparse.Namespace) -> int:
    """Keeps the command running and returns its last exit code."""
    if not arguments.behind_dashes:
        print("error: COMMAND is missing: expected it after --, such as -- actorlearner learner ...", file=sys.stderr)
        return ExitCode.USAGE
    program, *rest = arguments.behind_dashes
    command = [*(PROGRAM if program == "actorlearner" else (program,)), *rest]
    return Keeper(arguments.name, command, {ExitCode.DONE, *FINAL_CODES, *arguments.also_ends_with}).run()


class Keeper:
    """One command, restarted when it dies; used from the main thread.

    SIGTERM and SIGINT end it: the first is passed on as SIGTERM, on which a role saves. Later ones are not passed on: a
    role stops at once on a second one, and Slurm signals every process of a job as well as its script.
    """

    def __init__(
        self, name: str, command: Sequence[str], final_codes: Collection[int], timing: Timing = DEFAULT_TIMING
    ):
        """Args:
        name: Name of the command in log lines.
        command: The command with its arguments.
        final_codes: Exit codes after which it is not restarted.
        timing: When to restart, and when to give up.
        """
        self._name = name
        self._command = command
        self._final_codes = frozenset(final_codes)
        self._restarts = Restarts(timing)
        self._is_stopping = False  # no Event: its lock is not re-entrant, and a signal handler sets this
        self._child: Optional[subprocess.Popen[bytes]] = None

    def run(self) -> int:
        """Returns the exit code of the last run, 143 if SIGTERM came between two."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # shells make background jobs ignore SIGINT
                signal.signal(number, self._on_signal)
        while not self._is_stopping:
            began = time.monotonic()
            self._child = subprocess.Popen(self._command)
            if self._is_stopping:  # the signal came before the child had a process id
                self._child.terminate()
            self._log(f"{self._name} is process {self._child.pid}")
            returncode = self._child.wait()
            code = returncode if returncode >= 0 else 128 - returncode  # as shells number signals
            lived_secs = time.monotonic() - began
            self._log(f"{self._name} ended with exit code {code} after {lived_secs:.0f} s")
            if self._is_stopping or code in self._final_codes:
                return code
            secs = self._restarts.secs_until_next(lived_secs, was_killed=returncode in KILLED_CODES)
            if secs is None:
                self._log(f"error: {self._name} died repeatedly soon after its start, for the reason above.")
                return code
            self._log(f"restarting {self._name} in {secs:g} s")
            self._pause(secs)
        return ExitCode.TERMINATED

    def _pause(self, secs: float) -> None:
        ends_at = time.monotonic() + secs
        while not self._is_stopping and (left := ends_at - time.monotonic()) > 0:
            time.sleep(min(left, _PAUSE_SLICE_SECS))

    def _on_signal(self, number: int, frame: Optional[types.FrameType]) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            if self._child is not None and self._child.poll() is None:
                self._child.terminate()

    def _log(self, text: str) -> None:
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}: {text}", file=sys.stderr, flush=True)
