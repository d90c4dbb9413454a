"""Actors behind a network that stalls and breaks: no role hangs or crashes, and patience ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actorlearner.runtime.ports import find_free_port
from drills.wire import Wire
from tests.e2e.processes import RUN_SECS, TINY, Process, Processes, bind

STALL_SECS = 8.0  # longer than any one answer is waited for
ACTORS = ("collect-actor", "eval-actor")


@pytest.fixture
def port() -> int:
    return find_free_port()


@pytest.fixture
def wire(port: int) -> Iterator[Wire]:
    with Wire(lambda: port) as wire:
        yield wire


def _start_all(
    processes: Processes, port: int, *wires: Wire, patience_secs: float, bindings: tuple[str, ...]
) -> dict[str, Process]:
    """Starts the replay server and the learner on one side, and both actors at the other end of each wire.

    Of the second wire their task, and the number in their name, is 1.
    """
    near = f"127.0.0.1:{port}"
    started: dict[str, Process] = {}

    def start(role: str, address: str, task: int = 0) -> None:
        name = f"{role}-{task}"
        command = [role, "dqn_cartpole", f"--replay_address={address}", f"--peer_patience_secs={patience_secs}"]
        if task:
            command.append(f"--task={task}")
        if role in ("learner", "collect-actor"):
            command.append(f"--root_dir={name}")
        if role == "learner":
            command.append("--num_video_episodes=0")
        started[name] = processes.start(*command, *bind(*TINY, *bindings))

    start("replay-server", near)
    start("learner", near)
    for task, wire in enumerate(wires):
        for actor in ACTORS:
            start(actor, wire.address, task)
    return started


def _phase(folder: Path) -> str:
    status = folder / "learner-0" / "status.json"  # written every second, so not at once
    return json.loads(status.read_text())["phase"] if status.exists() else ""


def test_a_run_goes_on_after_its_actors_were_stalled_and_cut_off(processes, tmp_path, port, wire, eventually):
    """Elsewhere a reader whose server has gone silent waits for ever (reverb#4, #144)."""
    started = _start_all(
        processes, port, wire, patience_secs=300, bindings=("train.num_iterations = 1000", "train.eval_interval = 200")
    )
    started["learner-0"].await_line("train step 50:", RUN_SECS)
    wire.stall()
    eventually(lambda: _phase(tmp_path) == "waiting")
    time.sleep(STALL_SECS)
    step = json.loads((tmp_path / "learner-0" / "status.json").read_text())["train_step"]
    wire.mend()
    started["learner-0"].await_line(f"train step {(step // 50 + 1) * 50}:", RUN_SECS)
    wire.cut()
    eventually(lambda: _phase(tmp_path) == "waiting")
    wire.mend()
    exit_codes = {role: process.wait(RUN_SECS) for role, process in started.items()}
    assert exit_codes == dict.fromkeys(started, 0), "\n".join(process.output for process in started.values())
    summary = json.loads((tmp_path / "learner-0" / "summary.json").read_text())
    assert summary["train_steps"] == 1000
    assert [evaluation["train_step"] for evaluation in summary["evaluations"]] == list(range(0, 1001, 200))


def test_past_their_patience_roles_end_and_say_whom_they_waited_for(processes, port, wire):
    """A role that waits for a dead peer for ever silently occupies a machine."""
    stalled = wire
    with Wire(lambda: port) as cut:
        bindings = ("train.num_iterations = 1_000_000",)
        started = _start_all(processes, port, stalled, cut, patience_secs=20, bindings=bindings)
        started["learner-0"].await_line("train step 50:", RUN_SECS)
        for task in (0, 1):
            started[f"collect-actor-{task}"].await_line("acting with the collect policy", RUN_SECS)
        stalled.stall()
        cut.cut()
        for name in ("learner-0", *(f"{actor}-{task}" for actor in ACTORS for task in (0, 1))):
            assert started[name].wait(RUN_SECS) == 69, started[name].output
            assert "--peer_patience_secs = 20" in started[name].stderr
        for task, broken in enumerate((stalled, cut)):
            for actor in ACTORS:
                assert broken.address in started[f"{actor}-{task}"].stderr
