"""What an environment gives beside its spaces is refused by name, stepped as gym and through TF-Agents' wrappers."""

from __future__ import annotations

import itertools
import logging

import gym
import numpy as np
import pytest
from gym import spaces
from tf_agents.environments import gym_wrapper, wrappers

from actorlearner.environments.actions import correct_starts
from actorlearner.environments.batch import EnvironmentBatch
from actorlearner.environments.checks import NUM_FULL_CHECKS, UnfitData
from actorlearner.environments.gym import make_lane

ONE = np.zeros(1, np.int64)


BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
BYTES = spaces.Box(0, 255, (2,), np.uint8)
DICT = spaces.Dict({"a": BOX, "b": spaces.Discrete(3, start=1)})


def good_of(space):
    if isinstance(space, spaces.Dict):
        return {name: good_of(part) for name, part in space.items()}
    return space.start if isinstance(space, spaces.Discrete) else np.zeros(space.shape, space.dtype)


class Given(gym.Env):
    """Gives what its test says, from the `first`-th answer on: 0 is the reset."""

    action_space = spaces.Discrete(2)

    def __init__(self, space, first=1, **given):
        self.observation_space = space
        self._good, self._given, self._first = good_of(space), given, first
        self._count = -1

    def _answer(self, name, otherwise):
        return self._given.get(name, otherwise) if self._count >= self._first else otherwise

    def reset(self):
        self._count += 1
        return self._answer("observation", self._good)

    def step(self, action):
        self._count += 1
        observation, reward = self._answer("observation", self._good), self._answer("reward", 1.0)
        done, info = self._answer("done", False), self._answer("info", {})
        return self._answer("answer", (observation, reward, done, info))


def make(fast, space=BOX, **given):
    """Returns a batch of one such environment, stepped as gym or through TF-Agents' wrappers."""

    def make_environment(seed):
        environment = gym_wrapper.GymWrapper(Given(space, **given))
        correct_starts(environment)
        return environment if fast else wrappers.PyEnvironmentBaseWrapper(environment)

    return EnvironmentBatch(make_environment, 1, itertools.count(), make_lane)


lanes = pytest.mark.parametrize("fast", [True, False], ids=["gym", "wrapped"])


@lanes
@pytest.mark.parametrize(
    ("space", "observation", "message"),
    [
        (BOX, np.zeros(1, np.float32), r"float32\[1\] where its space says float32\[2\]"),
        (BOX, np.zeros((1, 2), np.float32), r"float32\[1, 2\] where"),
        (BOX, 0.5, r"float64\[\] where"),
        (BOX, ["1", "2"], "list .* where its space says float32"),
        (BOX, None, "NoneType None where"),
        (BOX, [1e300, 0.0], r"1e\+300 \(float64\), which float32 cannot hold"),
        (BOX, (np.zeros(2), {}), "as in gymnasium"),
        (BYTES, [300, 0], r"300 \(int64\), which uint8 cannot hold where its space says uint8\[2\] from 0 to 255"),
        (BYTES, np.array([0, -1]), "-1 .*which uint8 cannot hold"),
        (BYTES, [0.5, 0.0], "0.5 .*which uint8 cannot hold"),
        (BYTES, [np.nan, 0.0], "nan .*which uint8 cannot hold"),
        (spaces.Discrete(3, start=1), 0, r"observation = 0 where its space says int64\[\] from 1 to 3"),
        (spaces.Box(0, 9, (2,), np.int32), np.array([0, 10], np.int32), "observation = 10 where"),
        (DICT, {"a": np.zeros(3, np.float32), "b": 1}, r"observation/a = float32\[3\]"),
        (DICT, {"a": np.zeros(2, np.float32)}, "another structure"),
        (DICT, np.zeros(2, np.float32), "another structure"),
    ],
)
def test_an_observation_beside_its_space_is_refused(fast, space, observation, message):
    """NumPy silently broadcasts, wraps and truncates."""
    batch = make(fast, space, observation=observation)
    batch.reset()
    with pytest.raises(UnfitData, match=f"environment 0 gave .*{message}"):
        batch.step(ONE)


@lanes
def test_a_first_observation_beside_its_space_is_refused(fast):
    """Every episode begins with one."""
    with pytest.raises(UnfitData, match="as in gymnasium"):
        make(fast, first=0, observation=(np.zeros(2, np.float32), {})).reset()


@lanes
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": np.nan}, "reward = nan"),
        ({"reward": np.array([1.0])}, r"reward = float64\[1\] where its space says float32\[\]"),
        ({"reward": [1.0, 2.0]}, r"reward = float64\[2\]"),
        ({"reward": None}, "reward = NoneType None"),
        ({"reward": "1.0"}, "reward = str '1.0'"),
        ({"reward": -1e300}, r"reward = -1e\+300 \(float64\), which float32 cannot hold"),
        ({"done": None}, r"done = None \(NoneType\) where gym says True or False"),
        ({"done": "no"}, r"done = 'no'"),
        ({"done": 0.5}, r"done = 0.5"),
        ({"done": np.array([True])}, r"done = array"),
    ],
)
def test_a_reward_or_an_end_that_is_none_is_refused(fast, given, message):
    """A None is no end for ever, a text is one at once, and a NaN spoils all weights."""
    batch = make(fast, **given)
    batch.reset()
    with pytest.raises(UnfitData, match=f"environment 0 gave {message}"):
        batch.step(ONE)


@lanes
def test_a_step_of_gymnasium_is_refused_with_what_to_do(fast):
    """Five values in place of four would count as a crash, again and again."""
    batch = make(fast, answer=(np.zeros(2, np.float32), 1.0, False, False, {}))
    batch.reset()
    with pytest.raises(UnfitData, match="environment 0's step gave 5 values where gym 0.23 says 4.*gymnasium"):
        batch.step(ONE)


@lanes
@pytest.mark.parametrize(
    ("space", "observation"),
    [(BOX, [0.5, 1]), (BOX, np.array([0.5, 1.0])), (BYTES, [200, 1.0]), (BYTES, np.array([True, False]))],
)
def test_what_another_type_holds_as_well_is_taken(fast, space, observation):
    """Most environments compute in float64, whatever their space says."""
    batch = make(fast, space, observation=observation, reward=np.int64(2))
    batch.reset()
    time_step = batch.step(ONE)
    np.testing.assert_array_equal(time_step.observation[0], np.asarray(observation, np.float64))
    assert time_step.reward.tolist() == [2.0]


@lanes
@pytest.mark.parametrize("truncated", [True, False, np.bool_(True), None])
def test_an_environment_that_limits_itself_is_truncated(fast, truncated):
    """Taken for terminal, the agent learns that nothing is worth anything beyond the limit."""
    batch = make(fast, done=True, info={} if truncated is None else {"TimeLimit.truncated": truncated})
    batch.reset()
    time_step = batch.step(ONE)
    assert time_step.step_type.tolist() == [2]
    assert time_step.discount.tolist() == [1.0 if truncated else 0.0]


@lanes
def test_shapes_and_types_are_looked_at_for_ever(fast):
    """An environment that has gone well for days may still return an error's observation."""
    batch = make(fast, BYTES, first=NUM_FULL_CHECKS + 50, observation=np.array([0, 300]))
    batch.reset()
    for _ in range(NUM_FULL_CHECKS + 49):
        batch.step(ONE)
    with pytest.raises(UnfitData, match="300"):
        batch.step(ONE)


@lanes
def test_a_float_outside_its_bounds_is_warned_of_once(fast, caplog):
    """Many environments overstep their bounds a little; a network takes it, but the user should know."""
    batch = make(fast, observation=np.array([0.0, 1.5], np.float32))
    batch.reset()
    with caplog.at_level(logging.WARNING):
        batch.step(ONE)
        batch.step(ONE)
    (message,) = [record.getMessage() for record in caplog.records if "outside" in record.getMessage()]
    assert "observation = 1.5, outside its space: float32[2] from -1.0 to 1.0" in message


def test_an_environment_that_does_not_close_ends_nothing(caplog):
    """All that it was for is done."""
    batch = make(True)
    batch._lanes[0].close = lambda: 1 / 0
    batch.close()
    assert "environment 0 did not close: ZeroDivisionError" in caplog.text
