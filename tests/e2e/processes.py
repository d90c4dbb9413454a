"""Starts the real command, each process with a deadline and in a process group of its own, and leaves none behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Optional

import actorlearner

SOURCE_ROOT = Path(actorlearner.__file__).parent.parent
FOLDER = Path(__file__).parent

RUN_SECS = 240.0  # for a whole training run; a quiet machine needs an eighth of it
START_SECS = 120.0  # for a process to come to its first words: TensorFlow's import takes most of it

# Small enough to end in seconds; every interval divides the end.
TINY = (
    "train.num_iterations = 200",
    "train.initial_collect_steps = 100",
    "train.batch_size = 32",
    "train.log_interval = 50",
    "train.eval_interval = 100",
    "train.policy_save_interval = 100",
    "train.num_eval_episodes = 3",
    "train.num_environments = 2",
    "gym_environment.max_episode_steps = 60",
    "replay_server.linger_secs = 1.0",
)


def bind(*bindings: str) -> list[str]:
    """Returns the flags that hand these bindings to a command."""
    return [f"--gin_bindings={binding}" for binding in bindings]


class Process:
    """One `actorlearner` command (or any other) at work; threads take its lines as they come."""

    def __init__(self, command: list[str], cwd: Path, environment: Mapping[str, str]):
        self._popen = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self._news = threading.Condition()
        self._lines: list[str] = []  # both streams, as they came
        self._errors: list[str] = []
        self._num_open = 2
        self._readers = [
            threading.Thread(target=self._read, args=(stream, is_error), daemon=True)
            for stream, is_error in ((self._popen.stdout, False), (self._popen.stderr, True))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], is_error: bool) -> None:
        for line in stream:
            with self._news:
                self._lines.append(line)
                if is_error:
                    self._errors.append(line)
                self._news.notify_all()
        with self._news:
            self._num_open -= 1
            self._news.notify_all()

    @property
    def output(self) -> str:
        """What it wrote so far to stdout and stderr."""
        with self._news:
            return "".join(self._lines)

    @property
    def stderr(self) -> str:
        with self._news:
            return "".join(self._errors)

    def wait(self, deadline_secs: float) -> int:
        """Returns the exit status, all output read; fails the test when it did not end within `deadline_secs`."""
        try:
            status = self._popen.wait(deadline_secs)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {deadline_secs:g} s; it wrote:\n{self.abort()}") from None
        for reader in self._readers:
            reader.join(5)
        return status

    def abort(self) -> str:
        """Ends it if it goes on, and returns all it wrote: a role's last words are the stacks of its threads."""
        if self._popen.poll() is None:
            self.send(signal.SIGABRT)
        for reader in self._readers:
            reader.join(5)
        return self.output

    def await_line(self, pattern: str, deadline_secs: float = START_SECS, count: int = 1) -> re.Match[str]:
        """Returns the `count`-th match of `pattern` within one line, as soon as it is written."""

        def matches() -> list[re.Match[str]]:
            return [match for match in (re.search(pattern, line) for line in self._lines) if match]

        with self._news:
            self._news.wait_for(lambda: len(matches()) >= count or not self._num_open, deadline_secs)
            found = matches()
        assert len(found) >= count, f"no line '{pattern}' within {deadline_secs:g} s; it wrote:\n{self.output}"
        return found[count - 1]

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the whole group, if there still is one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


class Processes:
    """Starts processes below one folder; all are killed when the `with` ends."""

    def __init__(self, folder: Path, modules: Path = FOLDER):
        """Args:
        folder: Where they work.
        modules: Whose modules they can import, beside the package's.
        """
        self._folder = folder
        self._modules = modules
        self._all: list[Process] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for process in self._all:
            process.kill()

    def start(self, *arguments: Any, cwd: Optional[Path] = None) -> Process:
        """Starts `actorlearner` with these arguments, in the folder `cwd`."""
        return self.start_python("-m", "actorlearner", *arguments, cwd=cwd)

    def start_python(self, *arguments: Any, cwd: Optional[Path] = None) -> Process:
        """Starts this interpreter; the package and the modules can be imported there."""
        return self.start_program(sys.executable, *arguments, cwd=cwd)

    def start_program(self, *command: Any, cwd: Optional[Path] = None) -> Process:
        """Starts any program, in the folder `cwd`; Python programs can import the package and the modules."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (SOURCE_ROOT, self._modules))),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        process = Process([*map(str, command)], cwd or self._folder, environment)
        self._all.append(process)
        return process


def role_pids(root_dir: Path) -> dict[str, list[int]]:
    """Returns the process ids that a launcher's log files name, by role, in the order of their lives."""
    pids = {}
    for log in sorted((root_dir / "logs").glob("*.log")):
        pids[log.stem] = [int(pid) for pid in re.findall(r"^--- .* process (\d+): ", log.read_text(), re.MULTILINE)]
    return pids


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
