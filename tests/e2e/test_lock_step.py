"""Actor and learner in strict alternation: what a run learns depends on its seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.e2e.processes import RUN_SECS, TINY, Processes, bind

LOCK_STEP = (
    "train.lock_step = True",
    "train.num_iterations = 300",
    "train.policy_save_interval = 1_000_000",  # nobody looks at them
    "resident_replay.chunk_length = 50",
    "collect_actor.refresh_interval_secs = 0.02",
    "dqn.normalize_observations = 'running'",  # statistics, too, must depend on the seed alone
)


SEEDS = {"first": 5, "again": 5, "other": 6}


@pytest.fixture(scope="module")
def variables(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """Every variable of the agent at the end of each run; all run at once, which must make no difference either."""
    folder = tmp_path_factory.mktemp("lock_step")
    with Processes(folder) as processes:
        runs = {
            name: processes.start(
                "train", "dqn_cartpole", f"--root_dir={name}", f"--seed={seed}", "--num_eval_actors=0",
                "--num_video_episodes=0", *bind(*TINY, *LOCK_STEP),
            )
            for name, seed in SEEDS.items()
        }  # fmt: skip
        for train in runs.values():
            assert train.wait(RUN_SECS) == 0, train.output
    return {name: _read_agent(folder / name) for name in runs}


def _read_agent(root_dir: Path) -> dict[str, np.ndarray]:
    checkpoint = tf.train.load_checkpoint(str(root_dir / "checkpoints"))
    return {
        name: checkpoint.get_tensor(name)
        for name in checkpoint.get_variable_to_shape_map()
        if name.startswith("agent/")
    }


def test_two_runs_of_one_seed_have_equal_weights(variables):
    """Whether a change leaves learning as it was cannot be told where no two runs are alike."""
    first, again = variables["first"], variables["again"]
    assert again.keys() == first.keys() and len(first) > 10
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_the_statistics_of_observations_count_what_was_collected(variables):
    """They would also be equal in both runs if nothing were counted."""
    counts = [value for name, value in variables["first"].items() if "observation_statistics/count" in name]
    assert len(counts) == 1 and counts[0] >= 100  # those of the warm-up at least


def test_another_seed_gives_other_weights(variables):
    """Otherwise the test above would also hold for a learner that learns nothing."""
    first, other = variables["first"], variables["other"]
    assert any(np.any(other[name] != value) for name, value in first.items())
