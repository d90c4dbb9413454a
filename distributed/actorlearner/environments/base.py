"""The interface of an environment suite: a factory of environments, and the lane that steps one of a batch."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import tree
from tf_agents.environments import py_environment
from tf_agents.trajectories import StepType

from actorlearner.environments.checks import CheckedGym, UnfitData, find_gym, is_truncated

FIRST, MID, LAST = int(StepType.FIRST), int(StepType.MID), int(StepType.LAST)

Answer = tuple[int, Any, Any, Any]
"""The result of one environment's step: step type, reward, discount, observation."""


class EnvironmentFactory(Protocol):
    """What the experiment needs from an environment suite; a suite need not import this class.

    A suite with a faster way to step its environments also has the method `make_lane(environment, index) -> Lane`;
    others are stepped by a `PyLane`.
    """

    @property
    def env_name(self) -> str:
        """Name of the environment it makes; a run directory belongs to one environment."""
        ...

    def make_environment(self, seed: int) -> py_environment.PyEnvironment:
        """Returns a new environment; raises `ValueError` if none has that name."""
        ...

    def real_steps_per_second(self, environment: py_environment.PyEnvironment) -> float:
        """Returns environment steps per second of the task's real time."""
        ...


class Lane(Protocol):
    """Steps one environment of a batch and returns its own values unconverted; the batch converts them."""

    def reset(self) -> Answer:
        """Returns the first time step of a new episode."""
        ...

    def step(self, action: Any) -> Answer:
        """Returns the environment's time step; after a last one, the first of a new episode."""
        ...

    def close(self) -> None:
        """Closes the environment."""


class PyLane:
    """Any of TF-Agents' environments."""

    def __init__(self, environment: py_environment.PyEnvironment, index: int):
        self._environment = environment
        self._index = index
        spec = environment.action_spec()
        self._dtype = None if tree.is_nested(spec) else spec.dtype
        self._gym = find_gym(environment)
        if self._gym is not None:
            self._gym._gym_env = CheckedGym(index, self._gym)

    def reset(self) -> Answer:
        time_step = self._environment.reset()
        if time_step.step_type != FIRST:
            raise UnfitData(f"environment {self._index}'s reset gave step_type = {time_step.step_type!r}, expected 0.")
        return time_step.step_type, time_step.reward, time_step.discount, time_step.observation

    def step(self, action: Any) -> Answer:
        action = action if self._dtype is None else np.asarray(action, self._dtype)
        time_step = self._environment.step(action)
        discount = time_step.discount
        if self._gym is not None:
            is_end_of_gym = self._gym.done and time_step.step_type == LAST
            if is_end_of_gym and is_truncated(self._gym.get_info()):
                discount = self._gym._discount
        return time_step.step_type, time_step.reward, discount, time_step.observation

    def close(self) -> None:
        self._environment.close()
