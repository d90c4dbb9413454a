"""Drills for the tests: small runs, and what was found of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.e2e.processes import Process, Processes, bind

DRILL_SECS = 1_100.0  # a quiet machine needs a tenth of it; a busy one with a cold disk has taken more than 500
TEST_SECS = DRILL_SECS + 100.0  # for tests that wait for one


@dataclasses.dataclass(frozen=True)
class Drill:
    process: Process
    outcomes: dict[str, dict[str, Any]]


@contextlib.contextmanager
def drill_with(folder: Path, faults: Sequence[str]) -> Iterator[Drill]:
    """The faults in one run, which then ends by itself; times are not judged, as the machine may be busy."""
    with Processes(folder) as processes:
        process = processes.start(
            "drill", "dqn_cartpole", f"--root_dir={folder}/runs", f"--json={folder}/drill.json",
            *(f"--fault={fault}" for fault in faults),
            *bind("train.num_environments = 4", "gym_environment.max_episode_steps = 100"),
            *bind("train.initial_collect_steps = 200", "train.batch_size = 32"),
        )  # fmt: skip
        process.wait(DRILL_SECS)
        outcomes = json.loads((folder / "drill.json").read_text())["outcomes"]
        yield Drill(process, {outcome["fault"]: outcome for outcome in outcomes})


def broken(outcome: dict[str, Any]) -> list[str]:
    """Returns what is broken but for what only came late."""
    late = ("recovered after", "resumed after", "stopped after", "ended after", "held its checkpoint again after")
    return [promise for promise in outcome["broken"] if not promise.startswith(late)]
