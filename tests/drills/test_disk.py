"""A drill's power cut takes what a real one would take."""

from __future__ import annotations

import os

import pytest

from actorlearner.runtime import durable_files
from drills.disk import CannotMount, Disk


@pytest.fixture
def disk(tmp_path):
    try:
        disk = Disk(tmp_path / "disk.img", tmp_path / "disk", num_bytes=64 << 20)
    except CannotMount as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    with disk:
        yield disk


def test_a_power_cut_leaves_what_was_synced_and_nothing_else(disk):
    """A cut that wrote everything back first would find every run durable."""
    for name in ("renamed", "plain"):
        (disk.folder / f"{name}.tmp").write_text("content")
    os.replace(disk.folder / "renamed.tmp", disk.folder / "renamed")
    durable_files.write(disk.folder / "synced", "content")
    disk.cut_power()
    with pytest.raises(OSError, match="Input/output error"):
        (disk.folder / "late").write_text("content")
    disk.come_back()
    left = {path.name: path.read_text() for path in disk.folder.iterdir() if path.is_file()}
    assert left.pop("synced") == "content"
    assert not any(left.values()), "names at most"


def test_a_machine_without_mounting_says_why(tmp_path, monkeypatch):
    """A drill that fails where it cannot try tells nothing of the run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotMount, match="root|there is no mkfs.ext4"):
        Disk(tmp_path / "disk.img", tmp_path / "disk")
    assert not list(tmp_path.iterdir())
