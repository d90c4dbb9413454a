"""One trial of a sweep: a real `actorlearner train` in a run directory of its own, and what it has left there.

A trial's launcher asks the kernel for SIGTERM when the sweep dies, so it stops and saves even after kill -9 of the
sweep. It holds a lock file that it inherits: whoever can take that lock knows that no older launcher is at work there.
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

STOP_SECS = 40.0  # a launcher that was told to stop takes 20 s at most, and its guard kills what is left
_BEGINS = "--- "  # the line with which each launcher's output begins
_MOST_LINE = 400  # letters of a failure's last line

# A trial's process runs this first, with how nice to be and the command: it says what begins, and becomes the launcher.
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
        """What its launcher writes, start after start."""
        return self.root_dir / "output.log"

    @property
    def lock(self) -> Path:
        """Held by its launcher, whose process id it has."""
        return self.root_dir / ".trial.lock"

    def has_ended(self) -> bool:
        """Returns whether training came to its end."""
        return has_ended(RunDirectory(self.root_dir).summary)

    def read_status(self) -> Optional[Status]:
        """Returns what the learner last said of itself; None before that."""
        return read_status(RunDirectory(self.root_dir).status)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Returns the evaluations so far, by train step: of the summary if it has ended, else of metrics.jsonl."""
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
        """Returns what the ended run hands over; None if it has not ended, or hands over nothing."""
        summary = read_ended_summary(RunDirectory(self.root_dir).summary)
        return summary.get("delivered") if summary else None

    def read_last_error(self) -> str:
        """Returns the last line that its newest launcher wrote of an error, or wrote at all."""
        try:
            text = self.output.read_text(errors="replace")
        except OSError:
            return ""
        lines = [line for line in text.rpartition(f"\n{_BEGINS}")[2].splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ") or "| error: " in line]
        return (errors or lines or [""])[-1].strip()[:_MOST_LINE]


class RunningTrial:
    """A trial whose launcher this process has started."""

    def __init__(self, trial: Trial, command: Sequence[str], environment: Mapping[str, str], nice: int, lock: IO[str]):
        """Starts it; `lock` is the trial's, held, and given over to the launcher."""
        self.trial = trial
        self.said_step: Optional[int] = None  # the train step of the evaluation last told of
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
        lock.close()  # the launcher's copy goes on holding it

    def poll(self) -> Optional[int]:
        """Returns the launcher's exit code once it has ended."""
        return self._popen.poll()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Asks it to save and end; a second time: to end at once."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)
        self._popen.wait()


def take_lock(trial: Trial, say: Callable[[str], None], is_stopped: Callable[[], bool]) -> Optional[IO[str]]:
    """Returns the trial's lock, held, once nobody is at work in its directory; None if that takes too long.

    A launcher of a sweep that died is told to stop, and waited for; so are the roles of one that died.
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
            say(f"{trial.name}: waiting for the training that is at work in {trial.root_dir}")
            _stop_holder(lock)
        if time.monotonic() >= deadline or is_stopped():
            lock.close()
            return None
        time.sleep(0.25)


def _stop_holder(lock: IO[str]) -> None:
    """Tells the launcher that holds the lock to stop, if it does hold it."""
    lock.seek(0)
    with contextlib.suppress(ValueError, OSError):
        pid = int(lock.read().strip())
        held = {os.path.realpath(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")} if pid > 1 else set()
        if os.path.realpath(lock.name) in held:
            os.kill(pid, signal.SIGTERM)
