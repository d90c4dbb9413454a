"""OpenAI Gym 0.23 environments, through TF-Agents' `suite_gym`."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from collections.abc import Callable
from typing import Annotated, Any, Optional

import annotated_types
import gin

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # rendering needs no display
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import gym
from tf_agents.environments import gym_wrapper, py_environment, suite_gym, wrappers

from actorlearner.environments.base import FIRST, LAST, MID, Answer, Lane, PyLane
from actorlearner.environments.checks import fit_flag, is_truncated, unpack_step
from actorlearner.environments.gym_wrappers import LateActions, PastSteps


@gin.configurable("gym_environment", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class GymEnvironment:
    """Makes environments registered with gym.

    Attributes:
      env_name: gym's id, e.g. "CartPole-v1".
      max_episode_steps: Time limit in environment steps; None takes the id's registered limit, 0 no limit. An episode
        cut by the limit is truncated, not terminated: its last discount stays 1.
      steps_per_second: Environment steps per second of the task's real time, for videos; None takes gym's metadata.
      num_past_steps: Number of earlier observations and actions that are added to each observation. See `PastSteps`.
      num_late_steps: Number of steps by which actions are delayed, to test robustness. See `LateActions`.
    """

    env_name: str
    max_episode_steps: Optional[Annotated[int, annotated_types.Ge(0)]] = None
    steps_per_second: Optional[Annotated[float, annotated_types.Gt(0)]] = None
    num_past_steps: Annotated[int, annotated_types.Ge(0)] = 0
    num_late_steps: Annotated[int, annotated_types.Ge(0)] = 0

    def make_environment(self, seed: int) -> py_environment.PyEnvironment:
        """Returns a new environment with its own seed; called again after each crash.

        Raises:
          ValueError: gym does not know `env_name`; the message has the nearest id.
        """
        return make_registered(self.env_name, self.max_episode_steps, seed, self.wrap)

    def wrap(self, environment: gym.Env) -> gym.Env:
        """Returns the environment with the wrappers that the bindings ask for."""
        if self.num_late_steps:
            environment = LateActions(environment, self.num_late_steps)
        if self.num_past_steps:
            environment = PastSteps(environment, self.num_past_steps)
        return environment

    def make_lane(self, environment: py_environment.PyEnvironment, index: int) -> Lane:
        """Returns the fastest lane for `environment` with the results of its own `step`."""
        return make_lane(environment, index)

    def real_steps_per_second(self, environment: py_environment.PyEnvironment) -> float:
        """Returns environment steps per second of the task's real time."""
        metadata = getattr(environment, "metadata", None) or {}
        return float(
            self.steps_per_second or metadata.get("video.frames_per_second") or metadata.get("render_fps") or 30
        )


def make_registered(
    env_name: str, max_episode_steps: Optional[int], seed: int, wrap: Callable[[gym.Env], gym.Env]
) -> py_environment.PyEnvironment:
    """Returns what gym's registry has under `env_name`, wrapped. See `GymEnvironment.make_environment`."""
    try:
        spec = copy.copy(gym.spec(env_name))
    except gym.error.Error as error:
        known = [spec.id for spec in gym.envs.registry.all()]
        near = difflib.get_close_matches(env_name, known, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "Is the package that registers it imported in the gin file?"
        raise ValueError(f"env_name = '{env_name}' is not registered with gym. {hint}") from error
    limit = spec.max_episode_steps if max_episode_steps is None else max_episode_steps
    # Without gym's own time limit, which may be shorter than ours and would mark the state as terminal.
    spec.max_episode_steps = None
    environment = suite_gym.wrap_env(wrap(spec.make()), max_episode_steps=limit)
    environment.seed(seed % 2**31)
    return environment


def make_lane(environment: py_environment.PyEnvironment, index: int) -> Lane:
    """Returns the fastest lane for `environment` with the results of its own `step`."""
    duration, inner = float("inf"), environment
    if type(inner) is wrappers.TimeLimit:
        duration, inner = inner.duration, inner.wrapped_env()
    if type(inner) is gym_wrapper.GymWrapper and inner._discount == 1.0 and inner._match_obs_space_dtype:
        return GymLane(inner.gym, duration, index)
    return PyLane(environment, index)


class GymLane:
    """A gym environment, stepped with the results of TF-Agents' `GymWrapper` and `TimeLimit` but without their cost.

    The wrappers take three quarters of a CartPole step: they convert and check what the columns convert anyway.
    """

    def __init__(self, environment: Any, max_episode_steps: float, index: int):
        self._environment = environment
        self._index = index
        self._max_episode_steps = max_episode_steps
        self._num_steps = 0
        self._is_over = True

    def reset(self) -> Answer:
        observation = self._environment.reset()
        self._num_steps, self._is_over = 0, False
        return FIRST, 0.0, 1.0, observation

    def step(self, action: Any) -> Answer:
        if self._is_over:
            return self.reset()
        answer = self._environment.step(action)
        try:
            observation, reward, done, info = answer
        except (TypeError, ValueError):
            observation, reward, done, info = unpack_step(self._index, answer)
        self._num_steps += 1
        if done is not False and fit_flag(self._index, done):
            self._is_over = True
            return LAST, reward, 1.0 if is_truncated(info) else 0.0, observation
        if self._num_steps >= self._max_episode_steps:
            self._is_over = True
            return LAST, reward, 1.0, observation
        return MID, reward, 1.0, observation

    def close(self) -> None:
        self._environment.close()
