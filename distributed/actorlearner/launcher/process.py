"""One process of a role: it never outlives the launcher, and its output goes to the log and the terminal."""

from __future__ import annotations

import collections
import contextlib
import io
import math
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from actorlearner.runtime import durable_files
from actorlearner.runtime.processes import BARE_PYTHON, command_tied_to_parent

NUM_LAST_LINES = 15

_HUNG_LINE = re.compile(r"^Timeout \(\d+:\d\d:\d\d")  # what Python's fault handler writes before it ends the process
ROLE_LOG_LINE = re.compile(r"^[DIWEF] \d\d:\d\d:\d\d ")

# The guard kills the children of roles (ffmpeg, environments in processes). It reads each process group that begins (+)
# or ends (-), and kills those left when its standard input closes, however the launcher died. Then it removes the
# folder for temporary files, because TensorFlow leaves some there at every kill.
_GUARD = """
import os, shutil, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class Guard:
    """Kills the process groups that are left, and removes their temporary files, when the launcher has ended."""

    def __init__(self) -> None:
        self.temporary_folder = tempfile.mkdtemp(prefix="actorlearner-")
        self._process = subprocess.Popen(
            [*BARE_PYTHON, _GUARD, self.temporary_folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def begins(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def ended(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the guard was killed; the kernel still ends the roles themselves
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


class RoleProcess:
    """One process of a role. A thread copies its output to the log file, and lines worth showing to `shown_lines`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        shown_lines: queue.SimpleQueue[tuple[str, str]],
        guard: Guard,
    ):
        self.started_at = time.monotonic()
        self.last_lines: collections.deque[str] = collections.deque(maxlen=NUM_LAST_LINES)
        self.errors: list[str] = []  # lines `error: ...` and the indented lines below them; shown when the role ends
        self.errors_since = math.inf
        self.hung = False
        self._name = name
        self._log_path = log_path
        self._shown_lines = shown_lines
        self._guard = guard
        self._popen = subprocess.Popen(
            command_tied_to_parent(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        guard.begins(self._popen.pid)
        self._reader = threading.Thread(target=self._read, args=(list(command),), name=f"{name} output", daemon=True)
        self._reader.start()

    def has_exited(self) -> bool:
        """Does not reap: until `reap`, the process id and group cannot be reused."""
        return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def terminate(self) -> None:
        """Asks the role to stop; its own children are stopped by the role, or by `reap`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._popen.pid, signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kills the rest of the group and returns the role's exit code, after reading all of its output."""
        self.kill()
        returncode = self._popen.wait()
        self._guard.ended(self._popen.pid)
        self._reader.join(timeout=2.0)
        return returncode

    def _read(self, command: list[str]) -> None:
        assert self._popen.stdout is not None
        with contextlib.ExitStack() as stack:
            log: io.FileIO | None = None
            with contextlib.suppress(OSError):  # a full disk must not block the role's output
                durable_files.end_last_line(self._log_path)
                log = stack.enter_context(open(self._log_path, "ab", buffering=0))
            stack.enter_context(self._popen.stdout)

            def keep(line: bytes) -> None:
                if log is not None:
                    with contextlib.suppress(OSError):
                        log.write(line)

            started = time.strftime("%Y-%m-%d %H:%M:%S")
            keep(f"--- {started} process {self._popen.pid}: {' '.join(command)}\n".encode(errors="replace"))
            in_error = False
            for raw in iter(lambda: self._popen.stdout.readline(1 << 16), b""):  # type: ignore[union-attr]
                keep(raw)
                line = raw.decode("utf-8", errors="replace").rstrip()
                if not line:
                    continue
                self.last_lines.append(line)
                in_error = line.startswith("error: ") or (in_error and line[0] in " \t")
                if in_error:
                    self.errors.append(line)
                    self.errors_since = min(self.errors_since, time.monotonic())
                elif ROLE_LOG_LINE.match(line):
                    self._shown_lines.put((self._name, line))
                self.hung |= bool(_HUNG_LINE.match(line))
