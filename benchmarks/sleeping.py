"""A gym environment that sleeps five milliseconds a step, so that cores are not the limit; with Minitaur's shapes."""

from __future__ import annotations

import time
from typing import Any

import gym
import numpy as np

STEP_SECS = 0.005


class Sleeping(gym.Env):
    """Sleeps in every step, and does nothing else."""

    observation_space = gym.spaces.Box(-1, 1, (28,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (8,), np.float32)

    def __init__(self) -> None:
        self._observation = np.zeros(28, np.float32)

    def reset(self) -> Any:
        return self._observation

    def step(self, action: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        time.sleep(STEP_SECS)
        return self._observation, 0.0, False, {}

    def seed(self, seed: Any = None) -> list[Any]:
        return [seed]  # nothing here is random


gym.register("Sleeping-v0", entry_point=Sleeping, max_episode_steps=1_000)
