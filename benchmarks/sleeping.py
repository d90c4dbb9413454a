"""An environment that sleeps five milliseconds a step, so that the cores are no limit; its shapes are Minitaur's."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import gin
import numpy as np
from tf_agents.environments import py_environment
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step as ts

EPISODE_STEPS = 1_000


class SleepingEnvironment(py_environment.PyEnvironment):
    """Sleeps `step_secs` seconds in every step."""

    def __init__(self, step_secs: float):
        super().__init__()
        self._step_secs = step_secs
        self._num_steps = 0
        self._observation = np.zeros(28, np.float32)

    def observation_spec(self) -> Any:
        return array_spec.BoundedArraySpec((28,), np.float32, -1, 1)

    def action_spec(self) -> Any:
        return array_spec.BoundedArraySpec((8,), np.float32, -1, 1)

    def _reset(self) -> ts.TimeStep:
        self._num_steps = 0
        return ts.restart(self._observation)

    def _step(self, action: Any) -> ts.TimeStep:
        if self._num_steps == EPISODE_STEPS:
            return self._reset()
        time.sleep(self._step_secs)
        self._num_steps += 1
        if self._num_steps == EPISODE_STEPS:
            return ts.termination(self._observation, np.float32(0))
        return ts.transition(self._observation, np.float32(0))


@gin.configurable("sleeping_environment", module="benchmarks")
@dataclasses.dataclass(frozen=True)
class SleepingEnvironmentFactory:
    """Makes sleeping environments.

    Attributes:
      step_secs: How long a step takes, in seconds.
    """

    step_secs: float = 0.005
    env_name: str = "sleeping"

    def make_environment(self, seed: int) -> SleepingEnvironment:
        """Returns a new environment; all are alike."""
        del seed
        return SleepingEnvironment(self.step_secs)

    def real_steps_per_second(self, environment: py_environment.PyEnvironment) -> float:
        """Returns environment steps per second of the environment's own time."""
        del environment
        return 1 / self.step_secs
