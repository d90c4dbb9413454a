"""A batch of environments outlives crashes, and gives up where they never end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tf_agents.environments import random_py_environment
from tf_agents.specs import array_spec

from actorlearner.environments.batch import MAX_CRASHES_WITHOUT_STEP, EnvironmentBatch

ACTION = np.int32(0)


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
    assert len({tuple(step.observation) for step in batch.reset()}) == 3


@pytest.mark.parametrize("crashes", [("step",), ("step", "close")])
def test_a_crash_in_a_step_is_answered_by_a_fresh_environment(crashes):
    """One NaN in a simulator would end a run of days; the others must not notice."""
    batch, made = make({1: crashes})
    batch.reset()
    assert batch.step(0, ACTION) is not None
    assert batch.step(1, ACTION) is None
    assert batch.restart(1).is_first()
    assert batch.num_crashes == 1
    assert made[1].is_closed
    assert [environment.seed_given for environment in made] == [0, 1, 2]
    assert batch.step(1, ACTION) is not None


def test_a_crash_in_a_reset_is_answered_by_a_fresh_environment():
    """Environments that connect to something fail at the reset."""
    batch, _ = make({0: ("reset",)})
    assert all(step.is_first() for step in batch.reset())
    assert batch.num_crashes == 1


def test_an_environment_that_never_takes_a_step_is_given_up():
    """Restarting for ever would hide that nothing is collected."""
    batch, made = make(dict.fromkeys(range(100), ("step",)), 1)
    batch.reset()
    for _ in range(MAX_CRASHES_WITHOUT_STEP):
        assert batch.step(0, ACTION) is None
        batch.restart(0)
    assert batch.step(0, ACTION) is None
    with pytest.raises(RuntimeError, match="environment 0 crashed 4 times without one good step"):
        batch.restart(0)
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
        assert batch.step(0, ACTION) is None  # even seeds
        batch.restart(0)
        assert batch.step(0, ACTION) is not None  # odd ones
        made[-1].crashes.add("step")
        assert batch.step(0, ACTION) is None
        batch.restart(0)
    assert batch.num_crashes == 40


def test_closing_closes_every_environment():
    """A physics client that is left behind holds its memory."""
    batch, made = make({})
    batch.close()
    assert all(environment.is_closed for environment in made)
