"""The other shipped experiment: continuous actions, PyBullet."""

from __future__ import annotations

import json

from tests.e2e.processes import RUN_SECS, Processes, bind


def test_sac_trains_on_minitaur_to_the_end(processes: Processes, tmp_path):
    """An experiment that is only ever run in full breaks unseen: this is the default of `./launch/local.sh`."""
    train = processes.start(
        "train",
        "sac_minitaur",
        "--root_dir=run",
        "--seed=0",
        "--num_video_episodes=0",
        *bind(
            "train.num_iterations = 20",
            "train.initial_collect_steps = 100",
            "train.batch_size = 16",
            "train.log_interval = 10",
            "train.eval_interval = 20",
            "train.num_eval_episodes = 2",
            "train.policy_save_interval = 20",
            "pybullet_environment.max_episode_steps = 64",
            "replay_server.linger_secs = 1.0",
        ),
    )
    assert train.wait(RUN_SECS) == 0, train.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_steps"] == 20
    assert [evaluation["train_step"] for evaluation in summary["evaluations"]] == [0, 20]
    assert all(0 < evaluation["average_episode_length"] <= 64 for evaluation in summary["evaluations"])
    assert summary["environment_crashes"] == 0
