"""gym's environments with our time limits and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tf_agents.environments import utils

from actorlearner.environments.gym import GymEnvironment


def play(environment, policy, limit=10_000):
    """Returns the time steps of one episode, without its first."""
    time_step = environment.reset()
    steps: list[Any] = []
    while not time_step.is_last() and len(steps) < limit:
        time_step = environment.step(policy(time_step))
        steps.append(time_step)
    return steps


def balance(time_step):
    position, velocity, angle, angular_velocity = time_step.observation
    return np.int64(angle + 0.3 * angular_velocity + 0.02 * position + 0.05 * velocity > 0)


def test_an_episode_may_last_three_thousand_steps():
    """gym's own limit of 500 would end it first, whatever is wrapped around it."""
    environment = GymEnvironment("CartPole-v1", max_episode_steps=3_000).make_environment(0)
    steps = play(environment, balance)
    assert len(steps) == 3_000
    assert sum(float(step.reward) for step in steps) == 3_000


def test_an_episode_cut_by_the_limit_is_not_terminal():
    """With a last discount of 0 the agent learns that balancing for long is worth nothing from there on."""
    environment = GymEnvironment("CartPole-v1", max_episode_steps=20).make_environment(0)
    steps = play(environment, balance)
    assert len(steps) == 20
    assert steps[-1].is_last()
    assert steps[-1].discount == 1.0


def test_a_fallen_pole_is_terminal():
    """With a last discount of 1 the agent never learns that falling ends the reward."""
    steps = play(GymEnvironment("CartPole-v1", max_episode_steps=3_000).make_environment(0), lambda _: np.int64(0))
    assert len(steps) < 20
    assert steps[-1].discount == 0.0
    assert all(step.discount == 1.0 for step in steps[:-1])


@pytest.mark.parametrize(("limit", "length"), [(None, 500), (0, 700)])
def test_without_a_limit_of_ours_the_registered_one_holds_and_zero_means_none(limit, length):
    """Zero steps would be no episode at all."""
    environment = GymEnvironment("CartPole-v1", max_episode_steps=limit).make_environment(0)
    assert len(play(environment, balance, limit=700)) == length


def test_the_seed_decides_the_episodes():
    """Also the second episode, and also in the same process."""

    def observations(seed):
        environment = GymEnvironment("CartPole-v1").make_environment(seed)
        return [environment.reset().observation.tolist() for _ in range(2)]

    assert observations(1) == observations(1)
    assert observations(1) != observations(2)
    assert observations(2**31 + 1) == observations(1)


def test_environments_keep_their_specs():
    """Every role derives the shapes of everything from these."""
    utils.validate_py_environment(GymEnvironment("CartPole-v1").make_environment(0), episodes=2)
    utils.validate_py_environment(GymEnvironment("Pendulum-v1").make_environment(0), episodes=1)


@pytest.mark.parametrize(("steps_per_second", "expected"), [(None, 50.0), (20.0, 20.0)])
def test_real_time_is_the_tasks_own_unless_it_is_given(steps_per_second, expected):
    """Videos are slow motion otherwise."""
    factory = GymEnvironment("CartPole-v1", steps_per_second=steps_per_second)
    assert factory.real_steps_per_second(factory.make_environment(0)) == expected


def test_an_unknown_id_is_refused_with_the_nearest():
    """gym's message does not say which setting to mend."""
    with pytest.raises(ValueError, match="env_name = 'CartPol-v1'.*Did you mean 'CartPole-v1'"):
        GymEnvironment("CartPol-v1").make_environment(0)
    with pytest.raises(ValueError, match="env_name = 'Zzz'.*imported in the gin file"):
        GymEnvironment("Zzz").make_environment(0)
