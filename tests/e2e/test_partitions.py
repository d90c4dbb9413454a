"""Actors behind a wire that stalls and breaks: nobody hangs, nobody crashes, and patience has an end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actorlearner.local import find_free_port
from tests.e2e.processes import RUN_SECS, TINY, Process, Processes, bind
from tests.e2e.tcp_wire import Wire

STALL_SECS = 8.0  # longer than any one answer is waited for
ACTORS = ("collect-actor", "eval-actor")


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire(find_free_port()) as wire:
        yield wire


def _start_all(processes: Processes, wire: Wire, *, patience_secs: float, bindings: tuple[str, ...]) -> dict[str, Any]:
    """Starts the replay server and the learner on one side of the wire, and the actors on the other."""
    near = f"127.0.0.1:{wire.to_port}"
    started: dict[str, Process] = {}
    for role, address in (("replay-server", near), ("learner", near), *((actor, wire.address) for actor in ACTORS)):
        command = [role, "dqn_cartpole", f"--replay_address={address}", f"--peer_patience_secs={patience_secs}"]
        if role in ("learner", "collect-actor"):
            command.append(f"--root_dir={role}")
        if role == "learner":
            command.append("--num_video_episodes=0")
        started[role] = processes.start(*command, *bind(*TINY, *bindings))
    return started


def _phase(folder: Path) -> str:
    status = folder / "learner" / "status.json"  # written every second, so not at once
    return json.loads(status.read_text())["phase"] if status.exists() else ""


def test_a_run_goes_on_after_its_actors_were_stalled_and_cut_off(processes, tmp_path, wire, eventually):
    """Elsewhere a reader whose server has gone silent waits for ever (reverb#4, #144)."""
    started = _start_all(
        processes, wire, patience_secs=300, bindings=("train.num_iterations = 1000", "train.eval_interval = 200")
    )
    started["learner"].await_line("train step 50:", RUN_SECS)
    wire.stall()
    eventually(lambda: _phase(tmp_path) == "waiting")
    time.sleep(STALL_SECS)
    step = json.loads((tmp_path / "learner" / "status.json").read_text())["train_step"]
    wire.mend()
    started["learner"].await_line(f"train step {(step // 50 + 1) * 50}:", RUN_SECS)
    wire.cut()
    eventually(lambda: _phase(tmp_path) == "waiting")
    wire.mend()
    exit_codes = {role: process.wait(RUN_SECS) for role, process in started.items()}
    assert exit_codes == dict.fromkeys(started, 0), "\n".join(process.output for process in started.values())
    summary = json.loads((tmp_path / "learner" / "summary.json").read_text())
    assert summary["train_steps"] == 1000
    assert [evaluation["train_step"] for evaluation in summary["evaluations"]] == list(range(0, 1001, 200))


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_past_their_patience_roles_end_and_say_whom_they_waited_for(processes, wire, fault):
    """A role that waits for a dead peer for ever costs a machine, and nobody is told."""
    started = _start_all(processes, wire, patience_secs=20, bindings=("train.num_iterations = 1_000_000",))
    started["learner"].await_line("train step 50:", RUN_SECS)
    getattr(wire, fault)()
    for role in ("learner", *ACTORS):
        assert started[role].wait(RUN_SECS) == 69, started[role].output
        assert "--peer_patience_secs = 20" in started[role].stderr
    assert wire.address in started["collect-actor"].stderr
    assert wire.address in started["eval-actor"].stderr
