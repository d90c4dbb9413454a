"""What the deployment tests share: a way to await what happens on other hosts.

They need real infrastructure and are chosen by `tests/run.sh deploy`. A Docker engine is asked by `docker`; environment
variables say where the rest is:

SLURM_CLUSTER  a program: `up` and `down`; `ctl COMMAND...` runs it where sbatch and squeue work; `start NODE` brings a
               node's daemon back. Nodes: gpu1 in partition gpu, cpu1 and cpu2 in partition cpu, hosts of LAB_HOSTS
LAB_HOSTS      a program: `up` and `down`, for the hosts that HOSTS names; `on HOST COMMAND...` runs it there; `cut
               HOST` and `join HOST` take its network away and give it back

Of Debian's packages: openssh-server, stunnel4, prometheus.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Optional

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def needed_program(variable: str) -> str:
    """Returns the program that an environment variable names; skips the test when there is none."""
    program = os.environ.get(variable)
    if not program:
        pytest.skip(f"{variable} is not set: tests/deploy/infrastructure.py says what it names")
    return program


def needed_command(name: str, package: str) -> None:
    """Skips the test when a command is not installed."""
    if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip(f"there is no {name}: apt-get install {package}")


def needed_engine() -> None:
    """Skips the test when no Docker engine answers."""
    try:
        answered = subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode == 0
    except OSError:
        answered = False
    if not answered:
        pytest.skip("no Docker engine answers: `docker info` failed")


def run(*command: object, environment: Optional[Mapping[str, str]] = None, deadline_secs: float = 60.0) -> str:
    """Returns what `command` wrote to stdout; fails the test with both streams unless it ends well in time."""
    ended = subprocess.run(
        [*map(str, command)],
        cwd=CHECKOUT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=deadline_secs,
    )
    assert ended.returncode == 0, f"{command} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}"
    return ended.stdout


def await_that(
    condition: Callable[[], object],
    what: str,
    deadline_secs: float,
    evidence: Callable[[], str] = str,
    every_secs: float = 0.3,
) -> None:
    """Returns when `condition()` holds; fails past the deadline with what was awaited and `evidence()`."""
    deadline = time.monotonic() + deadline_secs
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_secs:g} s: {what}\n{evidence()}"
        time.sleep(every_secs)


class Log:
    """A log file that grows, perhaps not there yet."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> str:
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def count(self, text: str) -> int:
        return self.read().count(text)

    def await_text(self, text: str, deadline_secs: float, count: int = 1) -> None:
        """Returns when `text` is in it `count` times."""
        await_that(
            lambda: self.count(text) >= count, f"'{text}' in {self.path}, {count} times", deadline_secs, self.read
        )
