"""Files that survive a power cut: written aside, synced, renamed, and then their folder synced.

A file that was written and not synced is in memory only. A power cut leaves its name with nothing in it, or no name,
and also takes back renames and removals of a folder that was not synced. Every file that a reader must find whole goes
through `put_in_place`; whoever removes an older one does so after that.
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
"""One checkpoint older than this is kept beside the newest few: whatever spoils all of a moment leaves one."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder, nobody can a device
        if path.is_file() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Returns when a folder and all in it are on disk. Raises `OSError`."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def put_in_place(aside: Path, path: Path) -> None:
    """Renames a finished file or folder to `path`, which it replaces; returns when that is on disk.

    At every moment, also after a power cut, `path` is the old one whole or the new one whole. (Where the system cannot
    exchange two names, a folder that is replaced is away for a moment.)

    Args:
      aside: In the same folder as `path`; nobody reads it.
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
    """Returns whether two names were exchanged; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library before glibc 2.28
        return False
    failed = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return not failed


def write(path: Path, content: Union[str, bytes]) -> None:
    """Replaces the file `path` by `content`; returns when that is on disk. Raises `OSError`."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        put_in_place(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def append(path: Path, line: str) -> None:
    """Adds all of a line to a file, or nothing; returns when that is on disk. Raises `OSError`."""
    is_new = not path.exists()
    num_bytes = 0 if is_new else path.stat().st_size
    try:
        with open(path, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, num_bytes)  # the next line would be written behind what a full disk took of this one
        raise
    if is_new:
        sync(path.parent)


def end_last_line(path: Path) -> None:
    """Ends a line that a process which was killed, or lost power, had begun: the next must not be written behind it.

    Does nothing where there is no such file. Raises `OSError`.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")


def find_superfluous(
    written: Sequence[tuple[Path, float]], max_to_keep: int, now: Optional[float] = None
) -> list[Path]:
    """Returns which checkpoints may be removed.

    Kept are the newest few, the newest of those older than `OLD_SECS`, and the oldest of the others: the next such.

    Args:
      written: Each checkpoint and when it was written, in unix seconds; the newest first.
      max_to_keep: How many of the newest are kept whatever their age.
      now: In unix seconds; None: by the clock.
    """
    now = time.time() if now is None else now
    kept = [path for path, _ in written[:max_to_keep]]
    kept += [path for path, at in written if now - at >= OLD_SECS][:1]
    kept += [path for path, at in written if now - at < OLD_SECS][-1:]
    return [path for path, _ in written if path not in kept]


class InBackground:
    """Does what waits for a disk in a thread of its own, one after the other: a training loop need not wait.

    Used from one thread. No more than the work of one train step is open, however slow the disk is.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "disk")
        self._open: list[concurrent.futures.Future[None]] = []
        self._step: Optional[int] = None

    def begin(self, step: int) -> None:
        """Returns once all work of other train steps is done; raises what one of it did."""
        if step != self._step:
            self.wait()
        self._step = step

    def do(self, work: Callable[[], None]) -> None:
        """Has something done after all that was given before; never blocks."""
        self._open.append(self._thread.submit(work))

    def wait(self) -> None:
        """Returns once all work is done; raises what one of it did."""
        given, self._open = self._open, []
        for work in given:
            work.result()
