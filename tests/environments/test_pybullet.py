"""PyBullet's environments through the same factory."""

from __future__ import annotations

import numpy as np

from actorlearner.environments.pybullet import PybulletEnvironment


def test_two_minitaurs_in_one_process_are_two_worlds():
    """Sharing a physics client, one would move the other's robot."""
    one, other = (PybulletEnvironment("MinitaurBulletEnv-v0").make_environment(seed) for seed in (1, 2))
    assert one.observation_spec().shape == (28,)
    assert one.action_spec().shape == (8,)
    before = one.reset().observation
    start = other.reset().observation
    for _ in range(5):
        after = one.step(np.full(8, 0.5, np.float32)).observation
    assert not np.allclose(before, after)
    again = other.step(np.zeros(8, np.float32)).observation
    assert np.abs(again[:8] - start[:8]).max() < np.abs(after[:8] - before[:8]).max()
    one.close()
    other.close()


def test_an_episode_is_cut_at_our_limit_without_being_terminal(capfd):
    """Minitaur registers a limit of its own, and prints its paths at every start."""
    environment = PybulletEnvironment("MinitaurBulletEnv-v0", max_episode_steps=5).make_environment(1)
    environment.reset()
    steps = [environment.step(np.zeros(8, np.float32)) for _ in range(5)]
    assert [bool(step.is_last()) for step in steps] == [False] * 4 + [True]
    assert steps[-1].discount == 1.0
    environment.close()
    assert "urdf" not in capfd.readouterr().out
