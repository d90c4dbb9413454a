"""Past steps as input, and late actions."""

from __future__ import annotations

import gym
import numpy as np
import pytest

from actorlearner.environments.gym import GymEnvironment
from actorlearner.environments.gym_wrappers import LateActions, PastSteps


class Echo(gym.Env):
    """Observation: the number of the step and the action that led to it."""

    observation_space = gym.spaces.Box(-100, 100, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self):
        self.count = 0
        return np.array([0, 0], np.float32)

    def step(self, action):
        self.count += 1
        return np.array([self.count, action[0]], np.float32), 1.0, False, {}


def test_each_observation_is_followed_by_those_before_it_and_their_actions():
    """One in the wrong order shows a body that turns the other way."""
    environment = PastSteps(Echo(), 2)
    given = [environment.reset(), *(environment.step(np.array([a], np.float32))[0] for a in (0.1, 0.2, 0.3))]
    expected = [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0.1, 0, 0, 0.1, 0, 0, 0],
        [2, 0.2, 1, 0.1, 0.2, 0, 0, 0.1],
        [3, 0.3, 2, 0.2, 0.3, 1, 0.1, 0.2],
    ]
    np.testing.assert_allclose(given, np.array(expected, np.float32))
    assert all(environment.observation_space.contains(one) for one in given)


def test_a_new_episode_knows_nothing_of_the_one_before():
    """Its first observations would be of another body's fall."""
    environment = PastSteps(Echo(), 1)
    environment.reset()
    environment.step(np.array([0.5], np.float32))
    np.testing.assert_array_equal(environment.reset(), np.zeros(5))


def test_actions_arrive_late_by_as_many_steps():
    """A latency that is not there would make a policy look robust."""
    environment = LateActions(Echo(), 2)
    environment.reset()
    actions = [environment.step(np.array([a], np.float32))[0][1] for a in (0.1, 0.2, 0.3, 0.4)]
    np.testing.assert_allclose(actions, [0.0, 0.0, 0.1, 0.2], rtol=1e-6)


def test_an_environment_without_vectors_is_refused_by_name():
    """NumPy's message would be about arrays that cannot be joined."""
    with pytest.raises(ValueError, match="num_past_steps = 1 needs an action space of one vector"):
        GymEnvironment("CartPole-v1", num_past_steps=1).make_environment(0)
