"""Odd but legal gym environments that write down what they were given and what they gave."""

from __future__ import annotations

from typing import Any, ClassVar

import gym
import numpy as np
from gym import spaces

NOTES: list[tuple] = []
"""("reset", observation) and ("step", action, observation, reward, discount, is_last), as they should be understood."""

ON_STEP = [lambda number: None]
"""Called with the number of each step."""


class Recording(gym.Env):
    """Observes three random numbers; episodes are seven steps long and end by themselves."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)
    num_steps = 0

    def __init__(self):
        self._random = np.random.default_rng(3)

    def observe(self):
        """Returns an observation, and what is to arrive of it."""
        observation = self._random.normal(size=3).astype(np.float32)
        return observation, observation.copy()

    def reset(self):
        self._length = 0
        given, meant = self.observe()
        NOTES.append(("reset", meant))
        return given

    def reward(self):
        return 0.5

    def end(self):
        """Returns done and info, and the discount that is meant."""
        done = self._length == 7
        return done, {}, 0.0 if done else 1.0

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        action = np.array(action)
        self._length += 1
        Recording.num_steps += 1
        ON_STEP[0](Recording.num_steps)
        (given, meant), reward, (done, info, discount) = self.observe(), self.reward(), self.end()
        NOTES.append(("step", action, meant, float(reward), discount, bool(done)))
        return given, reward, done, info


class CountsFromMinusTwo(Recording):
    """Actions below 0; rewards and `done` of numpy's types; observes a list."""

    action_space = spaces.Discrete(3, start=-2)

    def observe(self):
        given, meant = super().observe()
        return given.tolist(), meant

    def reward(self):
        return np.int64(2)

    def end(self):
        done, info, discount = super().end()
        return np.bool_(done), info, discount


class LimitsItself(Recording):
    """Every second episode is cut by a limit of its own, as gym's `TimeLimit` says it; `done` is 0 or 1."""

    def __init__(self):
        super().__init__()
        self._episodes = 0

    def end(self):
        done, _, discount = super().end()
        self._episodes += done
        truncated = done and self._episodes % 2 == 0
        return int(done), {"TimeLimit.truncated": np.bool_(truncated)} if done else {}, 1.0 if truncated else discount


class WorksInPlace(Recording):
    """Scales the action that it is given, and observes through one array that it writes over."""

    action_space = spaces.Box(np.array([0, -3], np.float32), np.array([2, 5], np.float32))

    def __init__(self):
        super().__init__()
        self._buffer = np.zeros(3, np.float32)

    def observe(self):
        _, meant = super().observe()
        self._buffer[:] = meant
        return self._buffer, meant

    def step(self, action):
        answer = super().step(action)
        action *= 0
        return answer


class SmallNumbers(Recording):
    """Bytes that it computes as ordinary whole numbers; a reward that is a bool."""

    observation_space = spaces.Box(0, 255, (3,), np.uint8)

    def observe(self):
        observation = self._random.integers(0, 256, 3)
        return observation, observation.astype(np.uint8)

    def reward(self):
        return True


for environment in (CountsFromMinusTwo, LimitsItself, WorksInPlace, SmallNumbers):
    gym.register(f"{environment.__name__}-v0", entry_point=environment)
