"""Plays a run's exported greedy policy in plain TensorFlow and raw gym, and compares it with what the run says of it.

    python -m benchmarks.saved_model_in_gym runs/minitaur --num_episodes=50
    python -m benchmarks.saved_model_in_gym runs/minitaur --late_steps=2  # 20 ms more latency
    python -m benchmarks.saved_model_in_gym runs/minitaur --seed=7        # other masses, friction, battery

Nothing of this package acts here: the policy is the SavedModel, the environment what gym's registry has. Prints one
line of JSON. Exit status 1 where neither --late_steps nor --seed was given and the mean is outside the 95 % interval of
the run's own.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


class Lane:
    """One episode of the registered Minitaur, with the past steps that the policy was trained to see."""

    def __init__(self, environment: Any, num_past_steps: int, late_steps: int):
        import numpy as np

        self._environment = environment
        self._num_past_steps = num_past_steps
        self._late = collections.deque([np.zeros(8, np.float32)] * late_steps)
        self._now = np.float32(environment.reset())
        self._past = [part for _ in range(num_past_steps) for part in (self._now, np.zeros(8, np.float32))]
        self.total, self.length, self.is_over = 0.0, 0, False

    def observation(self) -> Any:
        import numpy as np

        return np.concatenate([self._now, *self._past])

    def step(self, action: Any) -> None:
        if self.is_over:
            return
        self._late.append(action)
        observation, reward, self.is_over, _ = self._environment.step(self._late.popleft())
        self._past = [self._now, action, *self._past][: 2 * self._num_past_steps]
        self._now = observation.astype("float32")
        self.total, self.length = self.total + reward, self.length + 1


def play(policy: Any, num_episodes: int, late_steps: int, seed: int) -> list[Lane]:
    """Returns finished episodes, played side by side with one call of the policy for all."""
    import gym
    import numpy as np
    import pybullet_envs  # noqa: F401  (registers it)
    import tensorflow as tf

    random.seed(seed)  # the physics are drawn from the global generators
    np.random.seed(seed)
    num_features = policy.signatures["action"].structured_input_signature[1]["0/observation"].shape[1]
    num_past_steps = (num_features - 28) // 36
    lanes = [Lane(gym.make("MinitaurBulletEnv-v0"), num_past_steps, late_steps) for _ in range(num_episodes)]
    act = policy.signatures["action"]
    while not all(lane.is_over for lane in lanes):
        observations = np.stack([lane.observation() for lane in lanes])
        batch = {
            "0/step_type": tf.ones(num_episodes, tf.int32),
            "0/reward": tf.zeros(num_episodes),
            "0/discount": tf.ones(num_episodes),
            "0/observation": tf.constant(observations),
        }
        (actions,) = act(**batch).values()
        for lane, action in zip(lanes, actions.numpy()):
            lane.step(action)
    return lanes


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory whose training has ended")
    parser.add_argument("--num_episodes", type=int, default=50)
    parser.add_argument("--late_steps", type=int, default=0, help="actions arrive so many steps of 10 ms late")
    parser.add_argument("--seed", type=int, default=None, help="of the physics; 0 by default")
    arguments = parser.parse_args()

    import tensorflow as tf
    import tensorflow_probability as tfp  # noqa: F401  (the SavedModel has types of it)

    policy = tf.saved_model.load(str(arguments.run / "policies" / "greedy_policy"))
    lanes = play(policy, arguments.num_episodes, arguments.late_steps, arguments.seed or 0)
    returns = [lane.total for lane in lanes]
    found = {
        "num_episodes": len(returns),
        "average_return": round(statistics.mean(returns), 3),
        "return_std": round(statistics.stdev(returns), 3),
        "lowest_return": round(min(returns), 3),
        "num_whole_episodes": sum(lane.length >= 1_000 for lane in lanes),
        "late_steps": arguments.late_steps,
        "seed": arguments.seed or 0,
    }
    delivered = json.loads((arguments.run / "summary.json").read_text()).get("delivered") or {}
    if "return_std" in delivered:
        half = 1.96 * delivered["return_std"] / math.sqrt(delivered["num_episodes"])
        found["interval_of_the_run"] = [delivered["average_return"] - half, delivered["average_return"] + half]
    print(json.dumps(found))
    low, high = found.get("interval_of_the_run", [-math.inf, math.inf])
    is_disturbed = arguments.late_steps > 0 or arguments.seed is not None
    return 0 if is_disturbed or low <= found["average_return"] <= high else 1


if __name__ == "__main__":
    sys.exit(main())
