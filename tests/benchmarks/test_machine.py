"""What the benchmarks say of the machine they ran on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.machine import PEER_PACKAGES, peer_versions


def _install(python: Path, name: str) -> None:
    """Leaves what an installer leaves of a package for those who ask for its version."""
    (site_packages,) = (python.parent.parent / "lib").glob("python*/site-packages")
    info = site_packages / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_peers_are_measured_with_all_of_them_installed_and_their_set_up_ended(tmp_path: Path):
    """A peer that cannot be imported would end the whole comparison, the references that are there included."""
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    assert peer_versions(python) == {}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    for name in PEER_PACKAGES:
        assert peer_versions(python) == {}
        _install(python, name)
    assert {name: peer_versions(python)[name] for name in PEER_PACKAGES} == dict.fromkeys(PEER_PACKAGES, "1.0")
    (venv / "setup-stamp").write_text("incomplete\n")
    assert peer_versions(python) == {}
    (venv / "setup-stamp").write_text("a fingerprint\n")
    assert peer_versions(python)
