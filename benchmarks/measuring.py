"""Measures programs in turns, A B A B ...: each side has processes of its own, restarted for each turn.

[actorlearner bench] --a request, one line of JSON--> [a side's program and its children]
                     <--figures, one line of JSON----

(Keeping both alive and pausing one does not work: Reverb's connections need 20 s to recover from that.)

Both ends import this file, also Pythons with nothing installed, so it imports only the standard library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCE_ROOT = CHECKOUT / "distributed"

READY_SECS = 300.0
"""Longest wait for a side to be set up and warmed up, in seconds; on a GPU, compiling takes most of a minute."""

GRACE_SECS = 300.0
"""Time beyond its window that a measurement may take, in seconds."""

CLOSE_SECS = 10.0
"""How long a side may take to stop its own processes before all of them are killed, in seconds."""

NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}

Figures = dict[str, Any]



class SideFailed(Exception):
    """A side ended, or did not answer in time; the message ends with its last output."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Attributes:
      folder: Holds the sides' logs and run directories.
      peers_python: The interpreter of the environment that has Stable-Baselines3 and SBX.
      repeats: How often each side is measured.
      window_secs: Shortest timed window, in seconds; None leaves it to the subject.
      minutes: Length of the endurance run.
      say: Reports progress to the user.
    """

    folder: Path
    peers_python: Path
    repeats: int = 5
    window_secs: Optional[float] = None
    minutes: float = 60.0
    say: Callable[[str], None] = print

    def window(self, secs: float) -> float:
        """Returns the length of a window for a subject that proposes `secs` seconds."""
        return self.window_secs or secs


# --- this end --------------------------------------------------------------------------------------------------------


class Side:
    """One side of a comparison: a program of a subject's file, in a session of its own. Close it when done."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        program: Sequence[str],
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] = NO_GPU,
    ):
        """Starts the program.

        Args:
          name: Name for people, and for its log file.
          settings: Has the folder for the log.
          program: Subject's module, program and arguments, e.g. `("learner", "ours")`.
          python: Interpreter that runs it.
          environment: Variables added to this process's own.
        """
        from actorlearner.runtime.processes import die_with_parent  # here: peers' interpreters have no actorlearner

        self.name = name
        settings.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=settings.folder))
        self._log_path = folder / "log"
        module, *arguments = program
        paths = [str(CHECKOUT)]
        if python == sys.executable:
            paths += [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._log_path, "ab") as log:
            self._popen = subprocess.Popen(
                [python, "-m", f"benchmarks.{module}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={
                    "TF_CPP_MIN_LOG_LEVEL": "2",
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "PYTHONUNBUFFERED": "1",
                    "SDL_VIDEODRIVER": "dummy",
                    "TMPDIR": str(folder),  # its processes are killed, and leave files there
                    **environment,
                },
                start_new_session=True,
                preexec_fn=die_with_parent,  # this process has no other threads
            )
        self._unread = b""

    def await_ready(self) -> Figures:
        """Waits until the side is set up and warmed up, and returns its description. Raises `SideFailed`."""
        return self._read_line(READY_SECS)

    def measure(self, **request: Any) -> Figures:
        """Returns the figures of one measurement. Raises `SideFailed`."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps(request).encode() + b"\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading reports that
        return self._read_line(request.get("window_secs", 0.0) + GRACE_SECS)

    def close(self) -> None:
        """Ends it and its children; blocks at most about ten seconds."""
        family = find_family(self._popen.pid)
        with contextlib.suppress(OSError):
            self._popen.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(CLOSE_SECS)
        self._popen.kill()
        self._popen.wait()
        for pid in family[1:]:  # normally it has stopped its children itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _read_line(self, deadline_secs: float) -> Figures:
        assert self._popen.stdout is not None
        deadline = time.monotonic() + deadline_secs
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._popen.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise SideFailed(f"{self.name}: no answer within {deadline_secs:.0f} s.{self._last_words()}")
            piece = os.read(self._popen.stdout.fileno(), 1 << 16)
            if not piece:
                raise SideFailed(f"{self.name}: it ended.{self._last_words()}")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> str:
        words = "".join(f"\n  {line}" for line in self._log_path.read_text(errors="replace").splitlines()[-12:])
        return f" The end of {self._log_path}:{words}"


def alternate(settings: Settings, sides: Sequence[Callable[[], Side]], **request: Any) -> list[list[Figures]]:
    """Returns each side's figures, one for each repeat.

    Args:
      settings: Number of repeats, and where to report progress.
      sides: Start the sides; one ends before the next is started.
      request: Passed to each side's `measure`, e.g. `window_secs`.

    Raises:
      SideFailed: A side ended or did not answer.
    """
    figures: list[list[Figures]] = [[] for _ in sides]
    for repeat in range(settings.repeats):
        for start, found in zip(sides, figures):
            with contextlib.closing(start()) as side:
                side.await_ready()
                found.append(side.measure(**request))
            settings.say(f"{side.name} {repeat + 1}/{settings.repeats}: {describe(found[-1])}")
    return figures


def describe(figures: Figures) -> str:
    """Returns the numeric figures in words."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    return ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in numbers.items())


def find_family(pid: int) -> list[int]:
    """Returns `pid` and all its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


# --- the program's end -----------------------------------------------------------------------------------------------

Measure = Callable[..., Figures]


def run_program(**programs: Callable[..., contextlib.AbstractContextManager[Measure]]) -> None:
    """Runs the program that the command line names, answering requests until stdin closes; ends the process.

    A program is a context manager: entering it sets it up, warms it up, and returns the function that measures.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep libraries' output out of the figures
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def answer(figures: Figures) -> None:
        answers.write(json.dumps(figures) + "\n")
        answers.flush()

    name, *arguments = sys.argv[1:]
    with programs[name](*arguments) as measure:
        answer({"ready": True})
        for line in sys.stdin:
            answer(measure(**json.loads(line)))
    sys.stderr.flush()
    os._exit(0)  # threads may be blocked inside Reverb's clients


@contextlib.contextmanager
def repeating(call: Callable[[], int], unit: str, warm_up_secs: float = 3.0) -> Iterator[Measure]:
    """Yields a function that measures the rate of `call`, after a warm-up.

    Args:
      call: Returns the number of counted units that it made.
      unit: Name of the figure, e.g. "updates_per_sec".
      warm_up_secs: Length of the warm-up after the first call, in seconds.
    """
    call()  # compiles
    count_per_sec(call, warm_up_secs)
    yield lambda window_secs: {unit: count_per_sec(call, window_secs)}


def count_per_sec(call: Callable[[], int], window_secs: float) -> float:
    """Returns the rate of `call` per second, over at least `window_secs` seconds and one call."""
    count, start = 0, time.perf_counter()
    while True:
        count += call()
        elapsed = time.perf_counter() - start
        if elapsed >= window_secs:
            return count / elapsed
