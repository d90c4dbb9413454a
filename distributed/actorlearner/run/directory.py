"""The run directory: every file name under --root_dir is defined here.

operative_config.gin  starts.jsonl  summary.json  status.json  metrics.jsonl  learning_curve.png  run.json
checkpoints/  policies/  train/ eval/ collect/ (TensorBoard)  logs/  videos/  .*.lock (held while a process lives)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any, Optional

from actorlearner.run.status import OVER
from actorlearner.runtime import durable_files
from actorlearner.runtime.lifecycle import ExitCode, RoleError

_HELD: list[IO[str]] = []


class RunDirectory:
    """The files of one run. One learner at a time holds the directory; files are replaced atomically."""

    def __init__(self, root_dir: Path):
        self.root = Path(root_dir)
        self.checkpoints = self.root / "checkpoints"
        self.evaluated = self.checkpoints / "evaluated"
        self.policies = self.root / "policies"
        self.train_events = self.root / "train"
        self.eval_events = self.root / "eval"
        self.summary = self.root / "summary.json"
        self.status = self.root / "status.json"
        self.metrics = self.root / "metrics.jsonl"
        self.operative_config = self.root / "operative_config.gin"
        self.identity = self.root / "run.json"
        self.starts = self.root / "starts.jsonl"
        self._lock: Optional[Any] = None

    def replay_checkpoints(self, task: int) -> Path:
        """Returns the folder of a replay server's checkpoints; it may be missing."""
        return self.checkpoints / (f"replay-{task}" if task else "replay")

    def earlier_operative_config(self, number: int) -> Path:
        """Returns the path of the operative configuration that was in force until the start with this number."""
        return self.root / f"operative_config.{number}.gin"

    def make_collect_events(self, task: int) -> Path:
        """Returns the folder of a collect actor's events, made if missing.

        Raises:
          RoleError: It cannot be written (CANNOT_CREATE).
        """
        folder = self.root / "collect" / str(task)
        self._make_writable(folder)
        return folder

    def require_writable(self) -> None:
        """Makes the directory if missing, and checks that this user may write to it.

        Raises:
          RoleError: It cannot be made or written (CANNOT_CREATE).
        """
        self._make_writable(self.root)

    def _make_writable(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> RoleError:
        return RoleError(
            f"--root_dir = '{self.root}' cannot be written: {error.strerror} ({error.filename}). "
            "Give a directory that this user may write to.",
            ExitCode.CANNOT_CREATE,
        )

    def hold(self) -> None:
        """Makes the directory, and locks it against other learners until this process ends.

        Raises:
          RoleError: It cannot be written (CANNOT_CREATE), or another learner holds it (OCCUPIED).
        """
        try:
            self.evaluated.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".learner.lock", "a+")  # noqa: SIM115  (held until the process ends)
            _HELD.append(self._lock)  # keep the lock even if this object is deleted
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RoleError(
                f"another learner is running in --root_dir = '{self.root}'. Stop it, or give another directory.",
                ExitCode.OCCUPIED,
            ) from error
        for folder in (self.root, self.evaluated):  # of learners that were killed while writing
            for leftover in folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
        for lines in (self.metrics, self.starts):
            durable_files.end_last_line(lines)

    def is_held(self) -> bool:
        """Returns whether a learner is running in the directory."""
        try:
            with open(self.root / ".learner.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def claim_task(self, kind: str) -> int:
        """Returns the lowest task number of `kind` that no running process holds, and holds it until this process ends.

        So launchers need not count, and a restarted process takes the number of one that has ended.

        Raises:
          RoleError: The directory cannot be written (CANNOT_CREATE).
        """
        for task in itertools.count():
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                lock = open(self.root / f".{kind}-{task}.lock", "a")  # noqa: SIM115  (held until the process ends)
            except OSError as error:
                raise self._cannot_write(error) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            _HELD.append(lock)
            return task
        raise AssertionError("unreachable")

    def note_end(self) -> None:
        """Marks status.json as over: the learning curve and the videos are written too."""
        status = self.read_json(self.status) or {}
        self.write_json(self.status, {**status, "phase": OVER, "time": time.time()})

    def forget_end(self) -> None:
        """Marks summary.json as not ended, if it was: the run resumes past its end."""
        summary = self.read_json(self.summary)
        if summary and summary.get("has_ended"):
            self.write_json(self.summary, {**summary, "has_ended": False})

    def past_learners(self) -> list[int]:
        """Returns the numbers of the learners that held this directory before; all have ended."""
        assert self._lock is not None, "hold first"
        self._lock.seek(0)
        return [int(line) for line in self._lock if line.strip().isdigit()]

    def note_learner(self, learner: int) -> None:
        """Adds a number to those that `past_learners` will return to later learners."""
        assert self._lock is not None, "hold first"
        self._lock.write(f"{learner}\n")
        self._lock.flush()

    def read_json(self, path: Path) -> Any:
        """Returns the content of `path`; None if it is missing or not JSON."""
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None

    def move_aside(self) -> Optional[Path]:
        """Renames the directory and returns its new path, next to the old one; None if there was nothing to rename.

        Raises:
          RoleError: A learner is running in it (OCCUPIED), or it cannot be renamed (CANNOT_CREATE).
        """
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return None
        self.hold()
        aside = self.root.with_name(f"{self.root.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            self.root.rename(aside)
            durable_files.sync(aside.parent)
        except OSError as error:
            raise self._cannot_write(error) from error
        return aside

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Writes the identity of this run, or compares it with the one on disk.

        Args:
          identity: What must not change between two starts on one directory, as JSON.

        Raises:
          RoleError: The directory holds another run (DATA); the message lists what differs.
        """
        if not self.identity.exists():
            self.write_json(self.identity, identity)
            return
        try:
            held = json.loads(self.identity.read_text())
        except (OSError, ValueError) as error:
            raise RoleError(
                f"{self.identity} cannot be read ({error}). Give another --root_dir, or remove the file if you are "
                "sure that its checkpoints belong to this experiment.",
                ExitCode.DATA,
            ) from error
        wanted = json.loads(json.dumps(identity))
        differences = [
            f"{key}: the directory has {held.get(key)!r}, this run {wanted.get(key)!r}"
            for key in sorted({*held, *wanted})
            if held.get(key) != wanted.get(key)
        ]
        if differences:
            raise RoleError(
                f"--root_dir = '{self.root}' holds the run of another experiment:\n  "
                + "\n  ".join(differences)
                + "\nGive another directory; nothing in this one was changed.",
                ExitCode.DATA,
            )

    def write_json(self, path: Path, content: Any) -> None:
        """Replaces `path` by `content` as JSON; NaN becomes null."""
        self.write_text(path, json.dumps(_finite(content), indent=2) + "\n")

    def write_text(self, path: Path, text: str) -> None:
        """Replaces `path` by `text`."""
        durable_files.write(path, text)

    def add_metrics(self, kind: str, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl; `sync_metrics` syncs it to disk."""
        line = json.dumps(_finite({"kind": kind, "time": time.time(), **values}))
        with open(self.metrics, "a") as file:
            file.write(line + "\n")

    def sync_metrics(self) -> None:
        """Blocks until all lines of `add_metrics` are on disk."""
        if self.metrics.exists():
            durable_files.sync(self.metrics)

    def add_start(self, start: dict[str, Any]) -> None:
        """Appends one start of the run; returns when it is on disk."""
        durable_files.append(self.starts, json.dumps(_finite(start)) + "\n")

    def read_starts(self) -> list[dict[str, Any]]:
        """Returns the starts of this run, oldest first, without unreadable lines."""
        found = []
        with contextlib.suppress(OSError):
            for line in self.starts.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return [start for start in found if isinstance(start, dict)]

    def read_seed(self) -> Optional[int]:
        """Returns the seed of this run's first start; None if it is unknown."""
        for account in (*self.read_starts(), self.read_json(self.summary)):
            if isinstance(account, dict) and type(account.get("seed")) is int:
                return account["seed"]
        return None


def _finite(content: Any) -> Any:
    """Returns `content` with NaN and infinities replaced by null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
