"""Steps several environments side by side, with columns as input and output; replaces a crashed one by a new one.

A column holds one leaf for every environment: arrays of shape [num_environments, ...].
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional

import numpy as np
import tree
from tf_agents.environments import py_environment
from tf_agents.trajectories import time_step as ts

from actorlearner.environments.actions import offsets
from actorlearner.environments.base import Answer, Lane, PyLane
from actorlearner.environments.checks import BoundsCheck, NotFinite, UnfitData, fit, fit_observation
from actorlearner.runtime.health import beat

MAX_CRASHES_WITHOUT_STEP = 3


# Types of rewards that need no conversion.
_FLOATS = frozenset({float, np.float32, np.float64})


class EnvironmentBatch:
    """Steps `num_environments` environments, each with its own seed, and survives their crashes."""

    def __init__(
        self,
        make_environment: Callable[[int], py_environment.PyEnvironment],
        num_environments: int,
        seeds: Iterator[int],
        make_lane: Callable[[py_environment.PyEnvironment, int], Lane] = PyLane,
    ):
        """Makes the environments.

        Args:
          make_environment: Makes one environment from a seed.
          num_environments: How many.
          seeds: One for each environment, and one for each replacement after a crash.
          make_lane: Returns the lane of an environment, given its index in the batch.
        """
        self._make_environment = make_environment
        self._seeds = seeds
        self._make_lane = make_lane
        environments = []
        for seed in itertools.islice(seeds, num_environments):
            environments.append(make_environment(seed))
            beat()  # each may take long; the same for the two below
        self._lanes = [make_lane(environment, index) for index, environment in enumerate(environments)]
        self._crashes_in_a_row = [0] * num_environments
        self.num_crashes = 0
        self.crashed = np.zeros(num_environments, bool)
        """Which environments crashed in the last `step`; each was replaced by a new one, at a first time step."""
        spec = environments[0].time_step_spec()
        self._spec = spec
        self._has_one_leaf = not tree.is_nested(spec.observation)
        self._dtype, self._shape = (
            (spec.observation.dtype, spec.observation.shape) if self._has_one_leaf else (None, ())
        )
        self._bounds = BoundsCheck(num_environments, spec)
        offset = offsets(environments[0].action_spec())
        self._action_offset = offset if any(map(np.any, tree.flatten(offset))) else None
        self._whole_bounds = [
            (path, int(np.min(leaf.minimum)), int(np.max(leaf.maximum)))
            for path, leaf in tree.flatten_with_path(spec.observation)
            if np.issubdtype(leaf.dtype, np.integer) and hasattr(leaf, "minimum")
        ]
        # Two sets of columns: the previous time step stays unchanged while the next one is filled in.
        sets = [
            tree.map_structure(lambda leaf: np.zeros((num_environments, *leaf.shape), leaf.dtype), spec)
            for _ in range(2)
        ]
        self._columns = itertools.cycle([(columns, _float_columns(columns)) for columns in sets])
        self._current, self._current_floats = next(self._columns)

    def __len__(self) -> int:
        return len(self._lanes)

    def reset(self) -> ts.TimeStep:
        """Returns the first time step of a new episode in each environment, as columns."""
        for index in range(len(self)):
            self._fill(index, self._reset(index))
            beat()
        self._require_plausible()
        return self._current

    def step(self, actions: Any, indices: Optional[Iterable[int]] = None) -> ts.TimeStep:
        """Returns the environments' time steps, as columns; they stay valid until the second call after this one.

        After a last time step, the next call starts a new episode and ignores its action. For an environment that
        crashed, the result is the first time step of its replacement; see `crashed`.

        Args:
          actions: Columns; discrete actions count from 0, wherever the environment's own start.
          indices: Which environments to step; the columns of others stay unchanged. All by default.

        Raises:
          RuntimeError: An environment crashed repeatedly without one good step.
          UnfitData: A reward, an observation or `done` does not fit its spec, which would silently spoil the weights.
            `NotFinite` for a NaN or an infinity.
        """
        if self._action_offset is not None:
            actions = tree.map_structure(np.add, actions, self._action_offset)
        before = self._current
        self._current, self._current_floats = next(self._columns)
        if indices is not None:
            tree.map_structure(np.copyto, self._current, before)
        self.crashed[:] = False
        for index, action in enumerate(_rows(actions)):
            if indices is not None and index not in indices:
                continue
            try:
                answer = self._lanes[index].step(action)
                self._crashes_in_a_row[index] = 0
            except UnfitData:  # a replacement would give the same
                raise
            except Exception:  # whatever an environment raises, the actor continues
                logging.exception("environment %d crashed in step", index)
                self.crashed[index] = True
                answer = self._restart(index)
            self._fill(index, answer)
            beat()
        self._require_plausible()
        return self._current

    def _require_plausible(self) -> None:
        """Checks that all values are finite and whole numbers within bounds: the learner would leave out others."""
        for column in self._current_floats:
            if not np.isfinite(column).all():
                raise self._implausible()
        for path, least, most in self._whole_bounds:
            column = functools.reduce(lambda part, key: part[key], path, self._current.observation)
            if (column < least).any() or (column > most).any():
                raise self._implausible()

    def _implausible(self) -> UnfitData:
        found: Any = {"reward": self._current.reward, "observation": self._current.observation}
        bounds = {("observation", *path): (least, most) for path, least, most in self._whole_bounds}
        for path, column in tree.flatten_with_path(found):
            least, most = bounds.get(path, (-np.inf, np.inf))
            is_bad = (column < least) | (column > most) | ~np.isfinite(column)
            bad = np.argwhere(is_bad)
            if len(bad):
                index, *place = bad[0].tolist()
                value = column[tuple(bad[0])]
                where = "/".join(map(str, path)) + (str(place) if place else "")
                if column.dtype.kind == "f" and not np.isfinite(value):
                    return NotFinite(f"environment {index} gave {where} = {value}")
                return UnfitData(f"environment {index} gave {where} = {value}, expected {least:g} to {most:g}")
        raise AssertionError("called when a leaf is implausible")

    def _fill(self, index: int, answer: Answer) -> None:
        columns = self._current
        step_type, reward, discount, observation = answer
        if type(reward) not in _FLOATS:
            reward = fit(index, "reward", reward, self._spec.reward)
        if not self._has_one_leaf:
            observation = fit_observation(index, observation, self._spec.observation)
        elif (
            type(observation) is not np.ndarray
            or observation.dtype is not self._dtype
            or observation.shape != self._shape
        ):
            observation = fit(index, "observation", observation, self._spec.observation)
        if self._bounds.num_left[index]:
            fit(index, "reward", reward, self._spec.reward)
            self._bounds.check(index, step_type, discount, observation)
        columns.step_type[index], columns.reward[index], columns.discount[index] = step_type, reward, discount
        if self._has_one_leaf:
            columns.observation[index] = observation
        else:
            for column, leaf in zip(tree.flatten(columns.observation), tree.flatten(observation)):
                column[index] = leaf

    def _restart(self, index: int) -> Answer:
        """Replaces a crashed environment by a new one, and returns its first time step."""
        self.num_crashes += 1
        self._crashes_in_a_row[index] += 1
        if self._crashes_in_a_row[index] > MAX_CRASHES_WITHOUT_STEP:
            raise RuntimeError(
                f"environment {index} crashed {self._crashes_in_a_row[index]} times without one good step; see the log"
            )
        try:
            self._lanes[index].close()
        except Exception:
            logging.warning("the crashed environment %d did not close", index)
        self._lanes[index] = self._make_lane(self._make_environment(next(self._seeds)), index)
        self._bounds.begin(index)
        logging.warning("environment %d was replaced by a new one; %d crashes so far", index, self.num_crashes)
        return self._reset(index)

    def _reset(self, index: int) -> Answer:
        try:
            return self._lanes[index].reset()
        except UnfitData:
            raise
        except Exception:
            logging.exception("environment %d crashed in reset", index)
            return self._restart(index)

    def close(self) -> None:
        """Closes every environment; logs a warning if one raises."""
        for index, lane in enumerate(self._lanes):
            try:
                lane.close()
            except Exception as error:
                logging.warning("environment %d did not close: %s: %s", index, type(error).__name__, error)


def _float_columns(columns: ts.TimeStep) -> list[np.ndarray]:
    """Returns the columns of a time step that may hold a NaN; discounts are checked separately."""
    return [column for column in tree.flatten((columns.reward, columns.observation)) if column.dtype.kind == "f"]


def _rows(actions: Any) -> Iterable[Any]:
    """Returns one action per environment; a plain int for a scalar discrete action, as gym expects."""
    if isinstance(actions, np.ndarray):
        # Copies, because environments that clip or scale an action in place would change the recorded one.
        return actions.tolist() if actions.ndim == 1 and actions.dtype.kind == "i" else actions.copy()
    return [tree.unflatten_as(actions, row) for row in zip(*(np.array(column) for column in tree.flatten(actions)))]
