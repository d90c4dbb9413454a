"""Wrappers of gym environments that a gin binding puts around them: past steps as input, and late actions."""

from __future__ import annotations

import collections
from typing import Any

import gym
import numpy as np


class PastSteps(gym.Wrapper):
    """Adds to each observation the `num_steps` observations and actions before it, the newest first.

    One vector: [now, observation before, action before, ...]. At the start of an episode the first observation stands
    for those before it, and zeros for the actions. What one observation does not show, such as how fast the body turns,
    is in the difference of two (as in Hwangbo et al., 2019, "Learning agile and dynamic motor skills").
    """

    def __init__(self, environment: gym.Env, num_steps: int):
        """Raises `ValueError` when observation or action are not one vector of floats."""
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
        as_given = np.array(action, np.float32)  # an environment may work on it in its place
        observation, reward, done, info = self.env.step(action)
        self._past.appendleft(as_given)
        self._past.appendleft(self._now)
        self._now = np.array(observation, np.float32)
        return np.concatenate([self._now, *self._past]), reward, done, info


class LateActions(gym.Wrapper):
    """Hands each action to the environment `num_steps` steps after it was chosen; until then a neutral one acts.

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
