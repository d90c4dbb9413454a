"""Files that survive a power cut: written under a temporary name, synced, renamed, and their folder synced.

A file that was written but not synced is only in memory. After a power cut its name has no content, or is missing, and
unsynced renames and removals are undone. Every file that a reader must find whole goes through `put_in_place`; older
files are removed only after that.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional, Union

OLD_SECS = 60.0
"""One checkpoint older than this, in seconds, is kept, in case all of the newest are damaged at once."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Syncs a file's content, or a folder's list of names, to disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder, and no one can sync a device
        if path.is_file() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs a folder and everything in it to disk. Raises `OSError`."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def put_in_place(aside: Path, path: Path) -> None:
    """Renames a finished file or folder to `path`, replacing it; returns when that is on disk.

    At every moment, also after a power cut, `path` is the whole old one or the whole new one. (Where the system cannot
    exchange two names, a replaced folder is missing for a moment.)

    Args:
      aside: The finished file or folder, in the same folder as `path`; nothing reads it.
      path: The name under which it is read.

    Raises:
      OSError: It could not be synced or renamed.
    """
    if not aside.is_dir():
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
        return
    sync_tree(aside)
    if not path.is_dir():
        aside.rename(path)
        sync(path.parent)
        return
    old = aside
    if not _exchange(aside, path):
        old = path.with_name(f"{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        aside.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names; returns False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library before glibc 2.28
        return False
    failed = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return not failed


def write(path: Path, content: Union[str, bytes]) -> None:
    """Replaces the content of the file `path`; returns when that is on disk. Raises `OSError`."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        put_in_place(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def append(path: Path, line: str) -> None:
    """Appends a whole line to a file, or nothing; returns when that is on disk. Raises `OSError`."""
    is_new = not path.exists()
    num_bytes = 0 if is_new else path.stat().st_size
    try:
        with open(path, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, num_bytes)  # remove the part of the line that a full disk accepted
        raise
    if is_new:
        sync(path.parent)


def end_last_line(path: Path) -> None:
    """Ends an unfinished last line, left by a killed process or a power cut, so that the next line starts on its own.

    Does nothing if the file does not exist. Raises `OSError`.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")


def find_superfluous(
    written: Sequence[tuple[Path, float]], max_to_keep: int, now: Optional[float] = None
) -> list[Path]:
    """Returns which checkpoints may be removed.

    It keeps the newest few, the newest of those older than `OLD_SECS`, and the oldest of the rest, which becomes the
    next old one.

    Args:
      written: Each checkpoint and its time in unix seconds, newest first.
      max_to_keep: Number of newest ones that are kept whatever their age.
      now: Unix seconds; None: the present time.
    """
    now = time.time() if now is None else now
    kept = [path for path, _ in written[:max_to_keep]]
    kept += [path for path, at in written if now - at >= OLD_SECS][:1]
    kept += [path for path, at in written if now - at < OLD_SECS][-1:]
    return [path for path, _ in written if path not in kept]


class InBackground:
    """Runs slow disk work in a thread of its own, one piece after another, so that the training loop need not wait.

    Used from one thread. Only the work of one train step is pending at a time, however slow the disk is.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "disk")
        self._open: list[concurrent.futures.Future[None]] = []
        self._step: Optional[int] = None

    def begin(self, step: int) -> None:
        """Blocks until all work of other train steps is done; raises what any of it raised."""
        if step != self._step:
            self.wait()
        self._step = step

    def do(self, work: Callable[[], None]) -> None:
        """Adds a piece of work after all earlier ones; never blocks."""
        self._open.append(self._thread.submit(work))

    def wait(self) -> None:
        """Blocks until all work is done; raises what any of it raised."""
        given, self._open = self._open, []
        for work in given:
            work.result()
