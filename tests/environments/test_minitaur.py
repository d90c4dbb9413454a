"""The quick Minitaur gives what the registered one gives, bit for bit."""

from __future__ import annotations

import contextlib
import io
import random

import gym
import numpy as np
import pytest

from actorlearner.environments import minitaur, pybullet  # noqa: F401  (the second registers PyBullet's environments)

SWING = {
    "walks": lambda step, draw: (0.5 * np.sin(step / 8 + np.arange(8))).astype(np.float32),
    "shakes": lambda step, draw: draw.uniform(-1, 1, 8).astype(np.float32),
    "overheats": lambda step, draw: np.array([1, 1, 1, 1, -1, -1, -1, -1], np.float32),
    "doubles": lambda step, draw: draw.uniform(-1, 1, 8),
}


def play(environment, name, num_steps):
    """Returns all that an environment gives, from the same seeds on."""
    random.seed(3)  # the physics are drawn from the global generators
    np.random.seed(3)
    draw = np.random.default_rng(3)
    given = []
    with contextlib.redirect_stdout(io.StringIO()):
        given.append(environment.reset())
        for step in range(num_steps):
            answer = environment.step(SWING[name](step, draw))
            given.append(answer)
            if answer[2]:
                given.append(environment.reset())
    return given


@pytest.fixture
def registered():
    with contextlib.redirect_stdout(io.StringIO()):
        environments = [gym.make("MinitaurBulletEnv-v0") for _ in range(2)]
    yield environments
    for environment in environments:
        environment.close()


@pytest.mark.parametrize(("name", "num_steps"), [("walks", 150), ("shakes", 60), ("overheats", 160), ("doubles", 30)])
def test_it_gives_what_the_registered_one_gives(registered, name, num_steps):
    """Figures on another robot than the registered one would not be comparable with anybody's."""
    stock, quick = registered
    minitaur.speed_up(quick)
    assert type(quick.unwrapped) is not type(stock.unwrapped)
    ours, theirs = play(quick, name, num_steps), play(stock, name, num_steps)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        if isinstance(other, tuple):
            (observation, *rest), (expected, *expected_rest) = one, other
            assert rest == expected_rest
        else:
            observation, expected = one, other
        assert observation.dtype == expected.dtype
        np.testing.assert_array_equal(observation, expected)


def test_an_action_out_of_bounds_is_refused_as_ever(registered):
    """The registered one says which component."""
    stock, quick = registered
    minitaur.speed_up(quick)
    for environment in (stock, quick):
        with pytest.raises(ValueError, match="2th action 1.5 out of bounds"):
            environment.unwrapped.step(np.array([0, 0, 1.5, 0, 0, 0, 0, 0]))


def test_another_robot_is_left_alone():
    """One with other motors is no Minitaur as registered."""
    with contextlib.redirect_stdout(io.StringIO()):
        environment = gym.make("MinitaurBulletEnv-v0", accurate_motor_model_enabled=False)
    kind = type(environment.unwrapped)
    minitaur.speed_up(environment)
    assert type(environment.unwrapped) is kind
    environment.close()
