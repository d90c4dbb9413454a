"""The drill, for real: what a run survives when its processes are killed and its files damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.e2e.processes import RUN_SECS, Process, Processes, bind

FAULTS = (
    "kill-replay-server",
    "kill-learner",
    "kill-learner-saving",
    "kill-replay-server-twice",
    "garbage",
    "stray-insert",
    "lose-network",
    "kill-everything",
    "damage-checkpoints",
    "interrupt",
    "read-only-directory",
    "nan-observation",
    "diverge",
)
DRILL_SECS = 500.0  # a quiet machine needs a quarter of it; less than the test may take


@dataclasses.dataclass(frozen=True)
class Drill:
    process: Process
    outcomes: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """The faults in one run, which then ends by itself; times are not judged, as the machine may be busy."""
    folder = tmp_path_factory.mktemp("drill")
    with Processes(folder) as processes:
        process = processes.start(
            "drill", "dqn_cartpole", f"--root_dir={folder}/runs", f"--json={folder}/drill.json",
            *(f"--fault={fault}" for fault in FAULTS),
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


def test_the_run_reaches_its_end_with_every_evaluation_and_leaves_nothing_behind(drill: Drill):
    """One crash kills the run elsewhere (ray#4358, sample-factory#316), or leaves it waiting for ever (reverb#4)."""
    end = drill.outcomes.get("the end")
    assert end and not broken(end), drill.process.output
    assert end["evaluations_lost"] == 0


@pytest.mark.parametrize("fault", ["SIGKILL learner-0", "SIGKILL learner-0 while it saves"])
def test_a_killed_learner_goes_on_from_its_checkpoint_with_the_replay_and_the_ratio(drill: Drill, fault: str):
    """Others begin with an empty replay (agents#475), or with a wrong update ratio (sheeprl PR#280)."""
    outcome = drill.outcomes[fault]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] > 0
    assert outcome["ratio_error"] < 0.01


@pytest.mark.parametrize("fault", ["SIGKILL replay-server-0", "SIGKILL replay-server-0 twice"])
def test_training_outlives_its_replay_server(drill: Drill, fault: str):
    """A restarted server comes back empty elsewhere, and nobody moves any more."""
    outcome = drill.outcomes[fault]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] >= outcome["train_step_before"]
    assert outcome["transitions_lost"] == 0


def test_training_goes_on_from_the_mirror_until_its_server_is_back(processes: Processes, tmp_path: Path):
    """Whoever samples from the server stands still without it. Samples per insert, which are exact, allow it here."""
    process = processes.start(
        "drill", "dqn_cartpole", "--fault=kill-replay-server",
        f"--root_dir={tmp_path}", f"--json={tmp_path}/drill.json",
        *bind("train.num_environments = 4", "train.batch_size = 32", "resident_replay.error_buffer = 1e9"),
    )  # fmt: skip
    process.wait(DRILL_SECS)
    outcome = json.loads((tmp_path / "drill.json").read_text())["outcomes"][0]
    assert not broken(outcome), process.output
    assert outcome["mirror_secs"] > outcome["held_again_secs"] / 2, "some 3 s, and a status is a second old at most"


@pytest.mark.parametrize("fault", ["insert with a wrong signature", "garbage to the port"])
def test_a_stranger_ends_nobody(drill: Drill, fault: str):
    """Reverb's server takes any item, and the next to sample it fails."""
    assert not broken(drill.outcomes[fault]), drill.process.output


def test_a_minute_without_a_network_ends_nobody(drill: Drill):
    """Who has lost its peer without a word waits for ever elsewhere (reverb#4, #144)."""
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


@pytest.mark.parametrize("fault", ["read-only directory", "NaN observation", "loss that overflows"])
def test_what_must_end_a_run_ends_it_with_an_error_and_costs_nothing_that_was_saved(drill: Drill, fault: str):
    """A traceback says nothing to whoever started the run, and a run that goes on with NaN is lost without a word."""
    outcome = drill.outcomes[fault]
    assert not broken(outcome) and not outcome["not_done"], drill.process.output
    assert outcome["train_step_after"] > 0


def test_ctrl_c_stops_the_run_and_saves_it(drill: Drill):
    """A terminal sends it to every process at once."""
    outcome = drill.outcomes["SIGINT launcher"]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] >= outcome["train_step_before"]


def test_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(processes: Processes, tmp_path: Path):
    """NaN weights saved over the last good ones end a run of days."""
    train = processes.start(
        "train", "dqn_cartpole", "--root_dir=run", "--seed=1", "--num_video_episodes=0", "--num_eval_actors=0",
        *bind("train.num_iterations = 1_000", "train.initial_collect_steps = 200", "train.batch_size = 32"),
        *bind("dqn.learning_rate = 1e30", "dqn.final_learning_rate = 1e30", "train.num_updates_per_call = 1"),
        *bind("learner.checkpoint_interval_secs = 0"),
    )  # fmt: skip
    assert train.wait(RUN_SECS) == 65, train.output
    assert "at train step" in train.stderr and "training has diverged" in train.stderr
    assert re.search(r"\b(nan|inf)\b|is not finite is '", train.stderr, re.IGNORECASE)
    newest = tf.train.load_checkpoint(str(tmp_path / "run" / "checkpoints"))
    for name, shape in newest.get_variable_to_shape_map().items():
        value = newest.get_tensor(name)
        if np.issubdtype(np.asarray(value).dtype, np.floating):
            assert np.isfinite(value).all(), f"{name} {shape}"


SAC = """
include 'base.gin'
include 'agents/sac.gin'
include 'environments/cartpole.gin'
gym_environment.env_name = 'Pendulum-v1'
sac.actor_fc_layer_params = (16,)
sac.critic_joint_fc_layer_params = (16,)
"""


def test_what_a_diverged_update_left_is_not_saved(processes: Processes, tmp_path: Path):
    """Its loss is looked at beside the update: weights may be finite and Adam's moments not."""
    (tmp_path / "sac.gin").write_text(SAC)
    train = (
        "train", "sac.gin", "--root_dir=run", "--seed=1", "--num_video_episodes=0", "--num_eval_actors=0",
        *bind("train.initial_collect_steps = 200", "train.batch_size = 32", "train.eval_interval = 0"),
    )  # fmt: skip
    first = processes.start(*train, *bind("train.num_iterations = 100"))
    assert first.wait(RUN_SECS) == 0, first.output
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.glob("ckpt-*")}
    assert before
    second = processes.start(*train, *bind("train.num_iterations = 1_000", "sac.reward_scale_factor = 1e36"))
    assert second.wait(RUN_SECS) == 65, second.output
    assert "training has diverged" in second.stderr
    assert {path.name: path.read_bytes() for path in checkpoints.glob("ckpt-*")} == before


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
