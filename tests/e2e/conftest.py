"""What the end-to-end tests share: processes that never outlive a test, and one finished run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import RUN_SECS, TINY, Processes, bind


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run directory nobody writes to any more, and how the command that made it ended. Read only."""

    root_dir: Path
    exit_code: int
    output: str


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A tiny `train dqn_cartpole` run, shared by all tests that read a run directory."""
    folder = tmp_path_factory.mktemp("finished")
    root_dir = folder / "run"
    with Processes(folder) as processes:
        command = processes.start(
            "train", "dqn_cartpole", f"--root_dir={root_dir}", "--seed=3", "--num_video_episodes=1", *bind(*TINY)
        )
        return FinishedRun(root_dir, command.wait(RUN_SECS), command.output)
