"""What a power cut would leave of a folder: what was synced of it, and nothing else."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

_Left = dict[str, Any]  # of a folder, by name: a file's content, or what is in a folder below


class PowerCuts:
    """Before each removal and renaming in a folder, and at the end, notes what a power cut would leave of it.

    Two things at each moment, between which a file system may choose: every name that is there, with what was synced of
    each file (of others nothing, as ext4 does); and the names as they were when each folder was synced.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._contents: dict[int, bytes] = {}  # of files, by inode
        self._names: dict[int, dict[str, tuple[int, Optional[bytes]]]] = {}  # of folders; None: a folder
        self.left: list[_Left] = []

    def note_sync(self, descriptor: int) -> None:
        info = os.fstat(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if stat.S_ISDIR(info.st_mode):
            self._names[info.st_ino] = {
                entry.name: (
                    entry.stat().st_ino,
                    None if entry.is_dir() else self._contents.get(entry.stat().st_ino, b""),
                )
                for entry in os.scandir(path)
            }
        else:
            self._contents[info.st_ino] = path.read_bytes()

    def note_end_of(self, path: Path) -> None:
        """A name goes: its inode may be another file's next."""
        if self._folder in path.parents:
            self.cut()
            if path.is_dir():
                self._names.pop(path.stat().st_ino, None)
            elif path.exists() and path.stat().st_nlink == 1:
                self._contents.pop(path.stat().st_ino, None)

    def cut(self) -> None:
        self.left += [self._now(self._folder), self._synced(self._folder.stat().st_ino)]

    def _now(self, folder: Path) -> _Left:
        return {
            path.name: self._now(path) if path.is_dir() else self._contents.get(path.stat().st_ino, b"")
            for path in folder.iterdir()
        }

    def _synced(self, inode: int) -> _Left:
        names = self._names.get(inode, {})
        return {name: self._synced(ino) if content is None else content for name, (ino, content) in names.items()}


@contextmanager
def watch(folder: Path) -> Iterator[PowerCuts]:
    """Yields what is left of `folder` by power cuts in the course of the block."""
    cuts = PowerCuts(folder)
    real_sync, is_over = os.fsync, False

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        cuts.note_sync(descriptor)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if is_over or event not in ("os.remove", "os.rmdir", "os.rename"):
            return
        name, descriptor = arguments[1 if event == "os.rename" else 0], arguments[-1]
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}")) if descriptor not in (None, -1) else Path()
        cuts.note_end_of(place / os.fsdecode(name))

    sys.addaudithook(note)  # there is no way to take it away again
    os.fsync = sync  # type: ignore[assignment]
    try:
        yield cuts
        cuts.cut()
    finally:
        os.fsync, is_over = real_sync, True


def lay_out(left: _Left, folder: Path) -> Path:
    """Returns `folder`, made, with what a power cut left in it."""
    folder.mkdir()
    for name, content in left.items():
        if isinstance(content, dict):
            lay_out(content, folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder
