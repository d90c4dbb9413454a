"""Wrappers of gym environments, chosen by gin bindings: past steps as input, and delayed actions."""

from __future__ import annotations

import collections
from typing import Any

import gym
import numpy as np


class PastSteps(gym.Wrapper):
    """Adds to each observation the `num_steps` observations and actions before it, the newest first.

    One vector: [now, observation before, action before, ...]. At the start of an episode its first observation replaces
    earlier ones, and zeros replace the actions. The difference of two observations contains what one lacks, such as the
    body's angular velocity (as in Hwangbo et al., 2019, "Learning agile and dynamic motor skills").
    """

    def __init__(self, environment: gym.Env, num_steps: int):
        """Raises `ValueError` if the observation or the action is not one vector of floats."""
        super().__init__(environment)
        for name, space in (("observation", environment.observation_space), ("action", environment.action_space)):
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                raise ValueError(
                    f"num_past_steps = {num_steps} needs an {name} space of one vector (a Box of rank 1), but it is "
                    f"{space}. Leave num_past_steps out."
                )
        spaces = [
            environment.observation_space,
            *([environment.observation_space, environment.action_space] * num_steps),
        ]
        self.observation_space = gym.spaces.Box(
            np.concatenate([space.low for space in spaces]).astype(np.float32),
            np.concatenate([space.high for space in spaces]).astype(np.float32),
            dtype=np.float32,
        )
        self._past: collections.deque[Any] = collections.deque(maxlen=2 * num_steps)

    def reset(self, **settings: Any) -> np.ndarray:
        observation = np.array(self.env.reset(**settings), np.float32)
        nothing = np.zeros(self.action_space.shape, np.float32)
        for _ in range(self._past.maxlen or 0):
            self._past.appendleft(nothing)
            self._past.appendleft(observation)
        self._now = observation
        return np.concatenate([observation, *self._past])

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        as_given = np.array(action, np.float32)  # a copy, because an environment may change it in place
        observation, reward, done, info = self.env.step(action)
        self._past.appendleft(as_given)
        self._past.appendleft(self._now)
        self._now = np.array(observation, np.float32)
        return np.concatenate([self._now, *self._past]), reward, done, info


class LateActions(gym.Wrapper):
    """Delays each action by `num_steps` steps; at the start of an episode neutral actions are used.

    For tests of a policy's robustness: a real robot's sensing, computing and sending take time.
    """

    def __init__(self, environment: gym.Env, num_steps: int):
        super().__init__(environment)
        self._num_steps = num_steps
        self._queue: collections.deque[Any] = collections.deque()

    def reset(self, **settings: Any) -> Any:
        space = self.env.action_space
        if not isinstance(space, gym.spaces.Box):
            raise ValueError(f"num_late_steps = {self._num_steps} needs actions that are a Box, but they are {space}.")
        neutral = np.clip(np.zeros(space.shape, space.dtype), space.low, space.high)
        self._queue = collections.deque([neutral] * self._num_steps)
        return self.env.reset(**settings)

    def step(self, action: Any) -> Any:
        self._queue.append(np.copy(action))
        return self.env.step(self._queue.popleft())
