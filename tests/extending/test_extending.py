"""A new algorithm, environment suite, replay or experiment is one file, anywhere, and changes no existing line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
import tf_agents.policies  # noqa: F401  (knows the types that a SavedModel of a policy has)

from tests.e2e.processes import RUN_SECS, Processes

NEW = Path(__file__).parent

FILES = ("twice_dqn.py", "corridor.py", "fading_replay.py", "twice_in_corridor.gin", "fading.gin")

MAX_LINES = 120

RUNS = {"twice_in_corridor": 1, "fading": 0}  # how many eval actors each has


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The run directory of each new experiment, trained to its end from a folder that is no part of the package."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in FILES:
        shutil.copy(NEW / name, folder)
    with Processes(folder, modules=folder) as processes:
        trainings = {
            name: processes.start(
                "train", f"{name}.gin", f"--root_dir=run-{name}", f"--num_eval_actors={num_eval_actors}",
                "--num_video_episodes=0",
            )
            for name, num_eval_actors in RUNS.items()
        }  # fmt: skip
        for training in trainings.values():
            assert training.wait(RUN_SECS) == 0, training.output
    return {name: folder / f"run-{name}" for name in RUNS}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", FILES)
def test_each_is_short(name):
    """What takes more lines than this has to do what the package should."""
    assert len((NEW / name).read_text().splitlines()) <= MAX_LINES


def test_an_agent_that_counts_twice_in_an_update_trains_is_evaluated_and_is_handed_over(runs):
    """A learner that computes the train step would stop half-way, or never come by what is due."""
    summary = read(runs["twice_in_corridor"] / "summary.json")
    assert summary["train_steps"] == 200
    assert [entry["train_step"] for entry in summary["evaluations"]] == [0, 100, 200]
    assert summary["delivered"]["num_episodes"] == 3
    policies = runs["twice_in_corridor"] / "policies"
    assert (policies / "checkpoints" / "policy_checkpoint_0000000100").is_dir()
    assert int(tf.saved_model.load(str(policies / "greedy_policy")).get_train_step()) in (0, 100, 200)


def test_updates_are_counted_as_such_whatever_the_agent_counts(runs):
    """Samples per insert is of updates: counted by train steps, half of them would be missing."""
    replay = read(runs["twice_in_corridor"] / "status.json")["replay"]
    assert replay["samples"] == 100 * 32


def test_a_suite_steps_by_its_own_lane(runs):
    """Stepped through TF-Agents' own, it would be as slow as it is there."""
    log = (runs["twice_in_corridor"] / "logs" / "collect-actor-0.log").read_text()
    assert "corridor 1 has its own lane" in log
    summary = read(runs["twice_in_corridor"] / "summary.json")
    assert summary["environment_steps"] >= 100
    assert all(0 <= entry["average_return"] <= 1 for entry in summary["evaluations"])


def test_a_replays_weights_reach_the_updates_and_its_keys_come_back(runs):
    """Prioritized replay needs no more than that."""
    run = runs["fading"]
    assert read(run / "summary.json")["train_steps"] == 100
    assert read(run / "status.json")["replay"]["weighted"] == 100 * 32
