"""A new environment suite, without gym: a corridor whose right end is worth a reward. It has a lane of its own."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import gin
import numpy as np
from tf_agents.environments import py_environment
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

from actorlearner.environments.base import FIRST, LAST, MID, Answer

MAX_STEPS = 20


class Corridor(py_environment.PyEnvironment):
    """Actions are 0, to the left, and 1; observes how far to the right it is, from 0 to 1."""

    def __init__(self, length: int, seed: int):
        super().__init__()
        self._length = length
        self._random = np.random.default_rng(seed)
        self._is_over = True

    def observation_spec(self) -> Any:
        return array_spec.BoundedArraySpec((1,), np.float32, 0.0, 1.0, "position")

    def action_spec(self) -> Any:
        return array_spec.BoundedArraySpec((), np.int64, 0, 1, "direction")

    def begin(self) -> np.ndarray:
        """Returns the first observation of an episode."""
        self._position = int(self._random.integers(self._length))
        self._num_steps, self._is_over = 0, False
        return self._observe()

    def walk(self, action: int) -> tuple[np.ndarray, float, bool]:
        """Returns observation, reward and whether the episode is over."""
        self._position = int(np.clip(self._position + 2 * int(action) - 1, 0, self._length))
        self._num_steps += 1
        at_end = self._position == self._length
        self._is_over = at_end or self._num_steps == MAX_STEPS
        return self._observe(), float(at_end), self._is_over

    def _observe(self) -> np.ndarray:
        return np.array([self._position / self._length], np.float32)

    def _reset(self) -> ts.TimeStep:
        return ts.restart(self.begin())

    def _step(self, action: Any) -> ts.TimeStep:
        if self._is_over:
            return self.reset()
        observation, reward, is_over = self.walk(action)
        return (ts.termination if is_over else ts.transition)(observation, np.float32(reward))


class CorridorLane:
    """Steps a corridor without making time steps. See `Lane`."""

    def __init__(self, environment: Corridor):
        self._environment = environment
        self._is_over = True

    def reset(self) -> Answer:
        self._is_over = False
        return FIRST, 0.0, 1.0, self._environment.begin()

    def step(self, action: Any) -> Answer:
        if self._is_over:
            return self.reset()
        observation, reward, self._is_over = self._environment.walk(action)
        return LAST if self._is_over else MID, reward, 0.0 if self._is_over else 1.0, observation

    def close(self) -> None:
        self._environment.close()


@gin.configurable("corridor_environment", module="extending")
@dataclasses.dataclass(frozen=True)
class CorridorSuite:
    """Makes corridors, each `length` steps long."""

    length: int = 6

    @property
    def env_name(self) -> str:
        return f"Corridor-{self.length}"

    def make_environment(self, seed: int) -> Corridor:
        return Corridor(self.length, seed)

    def make_lane(self, environment: Corridor, index: int) -> CorridorLane:
        logging.info("corridor %d has its own lane", index)
        return CorridorLane(environment)

    def real_steps_per_second(self, environment: Corridor) -> float:
        return 10.0
