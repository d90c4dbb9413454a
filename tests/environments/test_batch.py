"""A batch of environments outlives crashes, and gives up where they never end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tf_agents.environments import random_py_environment
from tf_agents.specs import array_spec
from tf_agents.trajectories import StepType

from actorlearner.environments.batch import MAX_CRASHES_WITHOUT_STEP, EnvironmentBatch
from actorlearner.environments.checks import NotFinite
from actorlearner.environments.gym import GymEnvironment, GymLane

TWO = np.zeros(2, np.int32)
ONE = np.zeros(1, np.int32)


class Fragile(random_py_environment.RandomPyEnvironment):
    """Crashes where its test says so."""

    def __init__(self, seed, crashes=()):
        super().__init__(
            array_spec.ArraySpec((2,), np.float32), array_spec.BoundedArraySpec((), np.int32, 0, 1), seed=seed
        )
        self.seed_given = seed
        self.is_closed = False
        self.crashes = set(crashes)

    def _step(self, action):
        if "step" in self.crashes:
            raise RuntimeError("the physics exploded")
        return super()._step(action)

    def _reset(self):
        if "reset" in self.crashes:
            raise RuntimeError("no display")
        return super()._reset()

    def close(self):
        self.is_closed = True
        if "close" in self.crashes:
            raise RuntimeError("not connected")


def make(crashes_by_seed, num_environments=2):
    """Returns a batch with seeds 0, 1, 2, ..., and the list of environments made so far."""
    made = []

    def make_environment(seed):
        made.append(Fragile(seed, crashes_by_seed.get(seed, ())))
        return made[-1]

    return EnvironmentBatch(make_environment, num_environments, itertools.count()), made


def test_each_environment_has_its_own_seed():
    """A batch of equal environments is one environment, at more cost."""
    batch, made = make({}, 3)
    assert [environment.seed_given for environment in made] == [0, 1, 2]
    assert len(batch) == 3
    assert len({tuple(observation) for observation in batch.reset().observation}) == 3


@pytest.mark.parametrize("crashes", [("step",), ("step", "close")])
def test_a_crash_in_a_step_is_answered_by_a_fresh_environment(crashes):
    """One NaN in a simulator would end a run of days; the others must not notice."""
    batch, made = make({1: crashes})
    batch.reset()
    time_step = batch.step(TWO)
    assert batch.crashed.tolist() == [False, True]
    assert time_step.step_type[1] == StepType.FIRST
    assert batch.num_crashes == 1
    assert made[1].is_closed
    assert [environment.seed_given for environment in made] == [0, 1, 2]
    batch.step(TWO)
    assert not batch.crashed.any()


def test_a_crash_in_a_reset_is_answered_by_a_fresh_environment():
    """Environments that connect to something fail at the reset."""
    batch, _ = make({0: ("reset",)})
    assert (batch.reset().step_type == StepType.FIRST).all()
    assert batch.num_crashes == 1


def test_an_environment_that_never_takes_a_step_is_given_up():
    """Restarting for ever would hide that nothing is collected."""
    batch, made = make(dict.fromkeys(range(100), ("step",)), 1)
    batch.reset()
    for _ in range(MAX_CRASHES_WITHOUT_STEP):
        batch.step(ONE)
        assert batch.crashed.all()
    with pytest.raises(RuntimeError, match="environment 0 crashed 4 times without one good step"):
        batch.step(ONE)
    assert len(made) == 1 + MAX_CRASHES_WITHOUT_STEP


def test_an_environment_that_never_resets_is_given_up():
    """The same at the start, where the role has not said anything yet."""
    batch, _ = make(dict.fromkeys(range(100), ("reset",)), 1)
    with pytest.raises(RuntimeError, match="without one good step"):
        batch.reset()


def test_a_good_step_makes_up_for_the_crashes_before():
    """Rare crashes over days must never add up to the end of the run."""
    batch, made = make(dict.fromkeys(range(0, 40, 2), ("step",)), 1)
    batch.reset()
    for _ in range(20):
        batch.step(ONE)  # even seeds
        assert batch.crashed.all()
        batch.step(ONE)  # odd ones
        assert not batch.crashed.any()
        made[-1].crashes.add("step")
        batch.step(ONE)
        assert batch.crashed.all()
    assert batch.num_crashes == 40


@pytest.mark.parametrize("env_name", ["CartPole-v1", "Pendulum-v1"])
def test_a_batch_gives_what_the_environments_own_steps_give(env_name):
    """Stepping past TF-Agents' wrappers for speed must not lose a reset, a discount or a time limit."""
    factory = GymEnvironment(env_name, max_episode_steps=30)
    batch = EnvironmentBatch(factory.make_environment, 2, itertools.count(7), factory.make_lane)
    others = [factory.make_environment(seed) for seed in (7, 8)]
    assert all(type(lane) is GymLane for lane in batch._lanes)
    rng = np.random.RandomState(0)
    pairs = [(batch.reset(), [other.reset() for other in others])]
    last_discounts = set()
    for _ in range(200):
        actions = np.stack([array_spec.sample_bounded_spec(others[0].action_spec(), rng) for _ in range(2)])
        pairs.append((batch.step(actions), [other.step(action) for other, action in zip(others, actions)]))
        columns, expected = pairs[-1]
        for index, time_step in enumerate(expected):
            for column, leaf in zip(columns, time_step):
                np.testing.assert_array_equal(column[index], leaf)
                assert column.dtype == np.asarray(leaf).dtype
            if time_step.is_last():
                last_discounts.add(float(time_step.discount))
    assert last_discounts == ({0.0, 1.0} if env_name == "CartPole-v1" else {1.0})


def test_a_time_step_stays_as_it_was_while_the_next_is_made():
    """A trajectory is made of both; one array under the two would record an environment that stands still."""
    batch, _ = make({})
    before = batch.reset()
    kept = before.observation.copy()
    after = batch.step(TWO)
    np.testing.assert_array_equal(before.observation, kept)
    assert not np.array_equal(before.observation, after.observation)


def test_environments_that_are_not_asked_to_step_stay_where_they_are():
    """An evaluation plays each environment's share of episodes, and no more."""
    batch, _ = make({})
    before = batch.reset()
    after = batch.step(TWO, [1])
    np.testing.assert_array_equal(before.observation[0], after.observation[0])
    assert not np.array_equal(before.observation[1], after.observation[1])


def test_nested_observations_and_actions_keep_their_structure():
    """Goal environments observe dictionaries."""

    class Nested(random_py_environment.RandomPyEnvironment):
        def __init__(self, seed):
            goal, image = array_spec.ArraySpec((2,), np.float32), array_spec.ArraySpec((3, 3), np.uint8)
            fire = array_spec.BoundedArraySpec((), np.int32, 0, 1)
            turn = array_spec.BoundedArraySpec((2,), np.float32, -1, 1)
            super().__init__({"goal": goal, "image": image}, {"fire": fire, "turn": turn}, seed=seed)
            self.actions = []

        def _step(self, action):
            self.actions.append(action)
            return super()._step(action)

    made = [Nested(0), Nested(1)]
    batch = EnvironmentBatch(made.__getitem__, 2, itertools.count())
    assert batch.reset().observation["image"].shape == (2, 3, 3)
    batch.step({"fire": np.array([0, 1], np.int32), "turn": np.array([[0, 0], [1, -1]], np.float32)})
    assert made[1].actions[0]["fire"] == 1
    assert made[1].actions[0]["turn"].tolist() == [1, -1]


def test_closing_closes_every_environment():
    """A physics client that is left behind holds its memory."""
    batch, made = make({})
    batch.close()
    assert all(environment.is_closed for environment in made)


class Diverging(Fragile):
    """Gives what its test says in place of one leaf, from `first_bad` calls on: 0 is the reset."""

    def __init__(self, seed, leaf, value, first_bad):
        super().__init__(seed)
        self._leaf, self._value, self._calls_left = leaf, value, first_bad

    def _spoil(self, time_step):
        self._calls_left -= 1
        if self._calls_left >= 0:
            return time_step
        if self._leaf == "reward":
            return time_step._replace(reward=np.float32(self._value))
        return time_step._replace(observation=np.array([0.0, self._value], np.float32))

    def _step(self, action):
        return self._spoil(super()._step(action))

    def _reset(self):
        return self._spoil(super()._reset())


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("reward", np.nan, "environment 1 gave reward = nan"),
        ("reward", -np.inf, "environment 1 gave reward = -inf"),
        ("observation", np.nan, r"environment 1 gave observation\[1\] = nan"),
    ],
)
def test_what_is_not_finite_is_refused_with_environment_and_leaf(leaf, value, message):
    """One NaN in the replay turns all weights into NaN of unknown origin."""
    batch = EnvironmentBatch(
        lambda seed: Diverging(seed, leaf, value, first_bad=1) if seed else Fragile(seed), 2, itertools.count()
    )
    batch.reset()
    with pytest.raises(NotFinite, match=f"^{message}$"):
        batch.step(TWO)


def test_a_first_observation_that_is_not_finite_is_refused_too():
    """It would be the start of the episode's first window."""
    batch = EnvironmentBatch(lambda seed: Diverging(seed, "observation", np.nan, 0), 2, itertools.count())
    with pytest.raises(NotFinite, match=r"environment 0 gave observation\[1\] = nan"):
        batch.reset()
