"""A CartPole that hangs as it is made: imported by the gin file of a test, it registers itself with gym."""

from __future__ import annotations

import ctypes

import gym
from gym.envs.classic_control import CartPoleEnv


class HangingCartPole(CartPoleEnv):
    """Sleeps in native code that holds Python's lock, as a simulator that waits for its licence would."""

    def __init__(self) -> None:
        ctypes.PyDLL(None).sleep(600)
        super().__init__()


gym.register("HangingCartPole-v0", entry_point=HangingCartPole, max_episode_steps=200)
