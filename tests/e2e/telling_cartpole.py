"""A CartPole that tells what TensorFlow may use around it: imported by the gin file of a test, it registers itself."""

from __future__ import annotations

import gym
import tensorflow as tf
from gym.envs.classic_control import CartPoleEnv


class TellingCartPole(CartPoleEnv):
    """Says, as it is made, to how many threads its process holds TensorFlow, and which GPUs it may use."""

    def __init__(self) -> None:
        intra = tf.config.threading.get_intra_op_parallelism_threads()
        inter = tf.config.threading.get_inter_op_parallelism_threads()
        gpus = tf.config.get_visible_devices("GPU")
        print(f"threads within an operation {intra}, between operations {inter}, GPUs {gpus}", flush=True)
        super().__init__()


gym.register("TellingCartPole-v0", entry_point=TellingCartPole, max_episode_steps=200)
