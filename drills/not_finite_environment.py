"""An environment for the drill whose observations become NaN after some steps, as after a division by zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import gin
import numpy as np
import tree
from tf_agents.environments import py_environment, wrappers
from tf_agents.trajectories import time_step as ts

from actorlearner.environments.base import EnvironmentFactory


@gin.configurable("not_finite_environment", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class NotFiniteEnvironment:
    """Makes another factory's environments, whose observations are NaN from some step on.

    Attributes:
      environment: The other factory.
      num_steps: Steps of each environment before that.
    """

    environment: EnvironmentFactory
    num_steps: int = 300

    @property
    def env_name(self) -> str:
        return self.environment.env_name

    def make_environment(self, seed: int) -> py_environment.PyEnvironment:
        """Returns a new environment; raises as the other factory does."""
        return _NotFinite(self.environment.make_environment(seed), self.num_steps)

    def real_steps_per_second(self, environment: py_environment.PyEnvironment) -> float:
        """Returns environment steps in one second of the task's own time."""
        assert isinstance(environment, _NotFinite)
        return self.environment.real_steps_per_second(environment.wrapped_env())


class _NotFinite(wrappers.PyEnvironmentBaseWrapper):
    def __init__(self, environment: py_environment.PyEnvironment, num_steps: int):
        super().__init__(environment)
        self._steps_to_go = num_steps

    def _step(self, action: Any) -> ts.TimeStep:
        time_step = super()._step(action)
        self._steps_to_go -= 1
        if self._steps_to_go > 0:
            return time_step
        # Whole numbers, as in images, have no NaN.
        reward = np.full_like(time_step.reward, np.nan)
        return time_step._replace(reward=reward, observation=tree.map_structure(_spoil, time_step.observation))


def _spoil(leaf: Any) -> Any:
    return np.full_like(leaf, np.nan) if np.asarray(leaf).dtype.kind == "f" else leaf
