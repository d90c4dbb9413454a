"""The drill, for real: what a run survives when its processes are killed and its files damaged."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.drilled_runs import DRILL_SECS, TEST_SECS, Drill, broken, drill_with
from tests.e2e.processes import Processes, bind

pytestmark = pytest.mark.timeout(TEST_SECS)

FAULTS = (
    "kill-replay-server",
    "kill-learner",
    "kill-learner-saving",
    "kill-replay-server-twice",
    "garbage",
    "stray-insert",
    "hostile-rows",
    "lose-network",
    "kill-everything",
    "damage-checkpoints",
)


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with drill_with(tmp_path_factory.mktemp("drill"), FAULTS) as drill:
        yield drill


def test_the_run_reaches_its_end_with_every_evaluation_and_leaves_nothing_behind(drill: Drill):
    """One crash kills the run elsewhere (ray#4358, sample-factory#316), or leaves it waiting for ever (reverb#4)."""
    end = drill.outcomes.get("the end")
    assert end and not broken(end), drill.process.output
    assert end["evaluations_lost"] == 0


@pytest.mark.parametrize("fault", ["SIGKILL learner-0", "SIGKILL learner-0 while it saves"])
def test_a_killed_learner_goes_on_from_its_checkpoint_with_the_replay_and_the_ratio(drill: Drill, fault: str):
    """Other systems restart with an empty replay (agents#475), or with a wrong update ratio (sheeprl PR#280)."""
    outcome = drill.outcomes[fault]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] > 0
    assert outcome["ratio_error"] < 0.01


@pytest.mark.parametrize("fault", ["SIGKILL replay-server-0", "SIGKILL replay-server-0 twice"])
def test_training_outlives_its_replay_server(drill: Drill, fault: str):
    """In other systems a restarted server is empty, and training stops."""
    outcome = drill.outcomes[fault]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] >= outcome["train_step_before"]
    assert outcome["transitions_lost"] == 0


def test_training_goes_on_from_the_mirror_and_its_new_server_saves_what_it_is_given_back(
    processes: Processes, tmp_path: Path
):
    """A learner that samples from the server stops without it. Here it trains on as far as samples per insert allow."""
    process = processes.start(
        "drill", "dqn_cartpole", "--fault=kill-replay-server",
        f"--root_dir={tmp_path}", f"--json={tmp_path}/drill.json",
        *bind("train.num_environments = 4", "train.batch_size = 32", "resident_replay.error_buffer = 1e9"),
        *bind("learner.checkpoint_interval_secs = 3600.0"),  # by the clock nothing is saved a second time
    )  # fmt: skip
    process.wait(DRILL_SECS)
    outcome = json.loads((tmp_path / "drill.json").read_text())["outcomes"][0]
    assert not broken(outcome), process.output
    assert outcome["mirror_secs"] > outcome["held_again_secs"] / 2, "some 3 s, and a status is a second old at most"
    (log,) = tmp_path.glob("*/run/logs/learner-0.log")
    assert re.search(r"refilled with [1-9]\d* chunks that it had lost", log.read_text())


@pytest.mark.parametrize(
    "fault", ["insert with a wrong signature", "garbage to the port", "hostile rows in every table"]
)
def test_a_stranger_ends_nobody(drill: Drill, fault: str):
    """Reverb's server takes any item; the next to sample it fails, or what it says ends the run and every resume."""
    assert not broken(drill.outcomes[fault]), drill.process.output


def test_a_minute_without_a_network_ends_nobody(drill: Drill):
    """In other systems a role waits for ever for a peer that vanished silently (reverb#4, #144)."""
    outcome = drill.outcomes["network lost for 60 s"]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] > outcome["train_step_before"]


@pytest.mark.parametrize("fault", ["SIGKILL everything", "damaged checkpoints"])
def test_the_whole_run_is_resumed_from_what_is_whole(drill: Drill, fault: str):
    """A power cut in the middle of saving must cost a minute of training, not the run."""
    outcome = drill.outcomes[fault]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] > 0
    assert outcome["ratio_error"] < 0.01


def test_a_stopped_drill_leaves_no_process(processes, tmp_path, eventually):
    """What trains on in the background is in whatever is measured next."""
    drill = processes.start("drill", "dqn_cartpole", "--fault=kill-learner", f"--root_dir={tmp_path}/runs")
    eventually(lambda: len(_processes_of(tmp_path)) >= 5, secs=60)  # the launcher and four roles
    drill.send(signal.SIGTERM)
    assert drill.wait(60) == 143
    eventually(lambda: not _processes_of(tmp_path), secs=10)  # the kernel may still be at it


def _processes_of(folder: Path) -> list[str]:
    """Returns the command lines that name a run below `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
            if f"--root_dir={folder}/runs/" in command:
                found.append(command)
    return found
