"""A CartPole that falls over in its own way: imported by the gin file of a test, it registers itself with gym."""

from __future__ import annotations

import gym
from gym.envs.classic_control import CartPoleEnv


class CrashingCartPole(CartPoleEnv):
    """Raises at its 150th step, as a simulator with a leak would."""

    def __init__(self) -> None:
        super().__init__()
        self._steps_to_live = 150

    def step(self, action):
        self._steps_to_live -= 1
        if not self._steps_to_live:
            raise OSError("the simulator is gone")
        return super().step(action)


gym.register("CrashingCartPole-v0", entry_point=CrashingCartPole, max_episode_steps=200)
