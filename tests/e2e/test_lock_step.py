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
)


def _train(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Returns every variable of the agent at the end of a run."""
    folder.mkdir()
    with Processes(folder) as processes:
        train = processes.start(
            "train", "dqn_cartpole", "--root_dir=run", f"--seed={seed}", "--num_eval_actors=0",
            "--num_video_episodes=0", *bind(*TINY, *LOCK_STEP),
        )  # fmt: skip
        assert train.wait(RUN_SECS) == 0, train.output
    checkpoint = tf.train.load_checkpoint(str(folder / "run" / "checkpoints"))
    return {
        name: checkpoint.get_tensor(name)
        for name in checkpoint.get_variable_to_shape_map()
        if name.startswith("agent/")
    }


@pytest.fixture(scope="module")
def variables(tmp_path_factory) -> dict[str, np.ndarray]:
    return _train(tmp_path_factory.mktemp("lock_step") / "first", seed=5)


def test_two_runs_of_one_seed_have_equal_weights(variables, tmp_path):
    """Whether a change leaves learning as it was cannot be told where no two runs are alike."""
    again = _train(tmp_path / "again", seed=5)
    assert again.keys() == variables.keys() and len(variables) > 10
    for name, value in variables.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_another_seed_gives_other_weights(variables, tmp_path):
    """Else the test above would hold for a learner that learns nothing, too."""
    other = _train(tmp_path / "other", seed=6)
    assert any(np.any(other[name] != value) for name, value in variables.items())
