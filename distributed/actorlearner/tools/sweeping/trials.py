"""One trial of a sweep: a real `actorlearner train` in a run directory of its own, and its results.

A trial's launcher asks the kernel for SIGTERM when the sweep dies, so it stops and saves even after kill -9 of the
sweep. It inherits a locked file: a process that can take that lock knows that no older launcher is running there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Optional

from actorlearner.run.directory import RunDirectory
from actorlearner.run.status import Delivered, Status, has_ended, read_ended_summary, read_status
from actorlearner.runtime.processes import BARE_PYTHON, command_tied_to_parent

STOP_SECS = 40.0  # a stopping launcher takes at most 20 s, and its guard kills what is left
_BEGINS = "--- "  # first line of each launcher's output
_MOST_LINE = 400  # characters kept of a failure's last line

# A trial's process first runs this, with the niceness and the command: it logs the start and executes the launcher.
_BECOME_TRIAL = """
import os, shlex, sys, time
os.nice(int(sys.argv[1]))
print("---", time.strftime("%Y-%m-%d %H:%M:%S"), f"process {os.getpid()}:", shlex.join(sys.argv[2:]), flush=True)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One variant with one seed."""

    variant: str
    seed: int
    root_dir: Path

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def output(self) -> Path:
        """The file with its launcher's output, over all starts."""
        return self.root_dir / "output.log"

    @property
    def lock(self) -> Path:
        """The lock file, held by its launcher; it contains the launcher's process id."""
        return self.root_dir / ".trial.lock"

    def has_ended(self) -> bool:
        """Returns whether training has ended."""
        return has_ended(RunDirectory(self.root_dir).summary)

    def read_status(self) -> Optional[Status]:
        """Returns the learner's last status; None before the first."""
        return read_status(RunDirectory(self.root_dir).status)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Returns the evaluations so far, by train step: from the summary if it has ended, else from metrics.jsonl."""
        directory = RunDirectory(self.root_dir)
        summary = read_ended_summary(directory.summary)
        found: list[Any] = []
        if summary:
            found = list(summary["evaluations"])
        else:
            with contextlib.suppress(OSError), open(directory.metrics) as lines:
                for line in lines:
                    if '"kind": "evaluation"' in line and line.endswith("\n"):
                        with contextlib.suppress(ValueError):
                            found.append(json.loads(line))
        by_step = {entry["train_step"]: entry for entry in found if entry.get("average_return") is not None}
        return [by_step[step] for step in sorted(by_step)]

    def read_delivered(self) -> Optional[Delivered]:
        """Returns the delivered policy's result; None if the run has not ended or delivered nothing."""
        summary = read_ended_summary(RunDirectory(self.root_dir).summary)
        return summary.get("delivered") if summary else None

    def read_last_error(self) -> str:
        """Returns the newest launcher's last error line, or its last line."""
        try:
            text = self.output.read_text(errors="replace")
        except OSError:
            return ""
        lines = [line for line in text.rpartition(f"\n{_BEGINS}")[2].splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ") or "| error: " in line]
        return (errors or lines or [""])[-1].strip()[:_MOST_LINE]


class RunningTrial:
    """A trial whose launcher this process started."""

    def __init__(self, trial: Trial, command: Sequence[str], environment: Mapping[str, str], nice: int, lock: IO[str]):
        """Starts the trial; `lock` is the trial's held lock, which the launcher inherits."""
        self.trial = trial
        self.said_step: Optional[int] = None  # train step of the evaluation reported last
        self.goes_on = (trial.root_dir / "run.json").exists()
        with open(trial.output, "a") as output:
            self._popen = subprocess.Popen(
                command_tied_to_parent([*BARE_PYTHON, _BECOME_TRIAL, str(nice), *command], signal.SIGTERM),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
        lock.seek(0)
        lock.truncate()
        lock.write(f"{self._popen.pid}\n")
        lock.flush()
        lock.close()  # the launcher's copy keeps the lock

    def poll(self) -> Optional[int]:
        """Returns the launcher's exit code once it has ended."""
        return self._popen.poll()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Asks the launcher to save and end; at the second call, to end immediately."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)
        self._popen.wait()


def take_lock(trial: Trial, say: Callable[[str], None], is_stopped: Callable[[], bool]) -> Optional[IO[str]]:
    """Takes the trial's lock and returns it, once no process uses its directory; None if that takes too long.

    A launcher of a dead sweep is told to stop and waited for, and so are the roles of a dead launcher.
    """
    trial.root_dir.mkdir(parents=True, exist_ok=True)
    lock = open(trial.lock, "a+")  # noqa: SIM115  (the launcher inherits it)
    deadline, has_said = time.monotonic() + STOP_SECS, False
    while True:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not RunDirectory(trial.root_dir).is_held():
                return lock
        if not has_said:
            has_said = True
            say(f"{trial.name}: waiting for the training that is running in {trial.root_dir}")
            _stop_holder(lock)
        if time.monotonic() >= deadline or is_stopped():
            lock.close()
            return None
        time.sleep(0.25)


def _stop_holder(lock: IO[str]) -> None:
    """Tells the launcher that holds the lock to stop, if there is one."""
    lock.seek(0)
    with contextlib.suppress(ValueError, OSError):
        pid = int(lock.read().strip())
        held = {os.path.realpath(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")} if pid > 1 else set()
        if os.path.realpath(lock.name) in held:
            os.kill(pid, signal.SIGTERM)
