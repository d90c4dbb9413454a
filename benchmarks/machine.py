"""Describes the machine: processor, memory, GPU, versions."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from benchmarks.measuring import CHECKOUT

PACKAGES = ("tensorflow", "tf-agents", "dm-reverb", "numpy", "gym", "pybullet")
PEER_PACKAGES = ("stable-baselines3", "torch", "sbx-rl", "jax")


def describe_machine(peers_python: Path) -> dict[str, Any]:
    """Returns this machine and the versions in use, as JSON."""
    return {
        "cpu": _find(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_find(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()) or 0) / 2**20, 1),
        "gpu": find_gpu(),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
        "commit": _run("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--exclude=*"),
        "versions": {"python": platform.python_version(), **_versions(), **peer_versions(peers_python)},
    }


def describe_date() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def find_gpu() -> Optional[str]:
    """Returns the name of the first usable GPU, or None; asks the driver, not TensorFlow."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    names = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if names:
        return names.splitlines()[0]
    return "an NVIDIA GPU" if Path("/dev/nvidia0").exists() else None


def finds_gpu_in_tensorflow() -> bool:
    """Returns whether TensorFlow, in a process of its own with this Python, finds a GPU; takes some 5 s."""
    ask = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    return (_run(sys.executable, "-c", ask) or "0") != "0"


def peer_versions(python: Path) -> dict[str, str]:
    """Returns the versions of Stable-Baselines3, SBX and their frameworks; empty if they are not installed."""
    stamp = python.parent.parent / "setup-stamp"
    if not python.is_file() or (stamp.is_file() and stamp.read_text().startswith("incomplete")):
        return {}
    ask = (
        "import platform; from importlib.metadata import version\n"
        "print('peers-python', platform.python_version())\n"
        f"for name in {PEER_PACKAGES!r}: print(name, version(name))"
    )
    return dict(line.split() for line in (_run(str(python), "-I", "-c", ask) or "").splitlines())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _run(*command: str) -> Optional[str]:
    """Returns the output of a command, or None if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _find(pattern: str, text: str) -> Optional[str]:
    match = re.search(pattern, text)
    return match.group(1) if match else None
