"""A CartPole whose physics blows up: imported by the gin file of a test, it registers itself with gym."""

from __future__ import annotations

import gym
import numpy as np
from gym.envs.classic_control import CartPoleEnv


class NanCartPole(CartPoleEnv):
    """Observes a NaN at its 1,500th step, as after a division by zero; training is under way by then."""

    def __init__(self) -> None:
        super().__init__()
        self._steps_to_go = 1_500

    def step(self, action):
        observation, *rest = super().step(action)
        self._steps_to_go -= 1
        if not self._steps_to_go:
            observation[2] = np.nan
        return (observation, *rest)


gym.register("NanCartPole-v0", entry_point=NanCartPole, max_episode_steps=200)
