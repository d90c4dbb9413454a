"""A disk whose power a drill can cut: a file system in an image, of which only synced data remains.

The cut is ext4's own shutdown for tests (`FS_IOC_SHUTDOWN`, without flushing the journal): from then on nothing reaches
the image, and a later mount shows what a machine would find after a power cut. It needs root and a loop device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
_WITHOUT_JOURNAL = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH
_COMMAND_SECS = 60.0


class CannotMount(Exception):
    """This machine or user cannot mount an image; the message says why."""


class Disk:
    """An ext4 file system in a file, mounted within the `with` block."""

    def __init__(self, image: Path, folder: Path, num_bytes: int = 2 << 30):
        """Args:
        image: Path of the file; made.
        folder: Where it is mounted; made.
        num_bytes: Size of the file system; the file takes only as much disk as is written to it.

        Raises:
          CannotMount: It cannot be made or mounted here.
        """
        self._image = image
        self.folder = folder
        if os.geteuid():
            raise CannotMount("mounting a file system needs root")
        missing = [name for name in ("mkfs.ext4", "mount", "umount") if not shutil.which(name)]
        if missing:
            raise CannotMount(f"there is no {missing[0]}")
        folder.mkdir(parents=True)
        with open(image, "wb") as file:
            file.truncate(num_bytes)
        try:
            _run("mkfs.ext4", "-q", "-F", image)
            self._mount()
        except CannotMount:
            image.unlink()
            folder.rmdir()
            raise

    def _mount(self) -> None:
        _run("mount", "-o", "loop", self._image, self.folder)

    def cut_power(self) -> None:
        """Stops all writes to the image immediately: every later write and sync of its files fails."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", _WITHOUT_JOURNAL))
        finally:
            os.close(descriptor)

    def come_back(self) -> None:
        """Mounts the image again, as a machine does after a power cut.

        Raises:
          CannotMount: A process still uses its files after a minute; killed processes take a moment to end.
        """
        deadline = time.monotonic() + _COMMAND_SECS
        while True:
            try:
                _run("umount", self.folder)
                break
            except CannotMount:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self._mount()

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(CannotMount):
            _run("umount", "--lazy", self.folder)
        self._image.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_by(path: Path, kept: Path, by: Path) -> Iterator[None]:
    """Puts a link to another path in the place of `path`, which is at `kept` as long as the `with` block lasts."""
    path.rename(kept)
    path.symlink_to(by)
    try:
        yield
    finally:
        path.unlink()
        kept.rename(path)


def _run(*command: Any) -> None:
    try:
        ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=_COMMAND_SECS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotMount(str(error)) from error
    if ended.returncode:
        raise CannotMount(f"{command[0]}: {' '.join(ended.stderr.split())}")
