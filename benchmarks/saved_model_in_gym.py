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


class Policy:
    """The action signature of a SavedModel, whose arguments TensorFlow names `arg_0_observation` or `0/observation`."""

    def __init__(self, saved_model: Any):
        self._act = saved_model.signatures["action"]
        self._names = {key.replace("/", "_").split("_", 1)[1].removeprefix("0_"): key for key in self._inputs}

    @property
    def _inputs(self) -> dict[str, Any]:
        return self._act.structured_input_signature[1]

    @property
    def num_past_steps(self) -> int:
        """Returns how many steps before the present one are part of an observation; each has 28 + 8 numbers."""
        return (self._inputs[self._names["observation"]].shape[1] - 28) // 36

    def act(self, observations: Any) -> Any:
        """Returns actions [B, 8] at observations [B, D]."""
        import tensorflow as tf

        size = len(observations)
        values = {
            "step_type": tf.ones(size, tf.int32),
            "reward": tf.zeros(size),
            "discount": tf.ones(size),
            "observation": tf.constant(observations),
        }
        (actions,) = self._act(**{self._names[name]: value for name, value in values.items()}).values()
        return actions.numpy()


def play(policy: Policy, num_episodes: int, late_steps: int, seed: int) -> list[Lane]:
    """Returns finished episodes, played side by side with one call of the policy for all."""
    import gym
    import numpy as np
    import pybullet_envs  # noqa: F401  (registers it)

    random.seed(seed)  # the physics are drawn from the global generators
    np.random.seed(seed)
    environments = [gym.make("MinitaurBulletEnv-v0") for _ in range(num_episodes)]
    lanes = [Lane(environment, policy.num_past_steps, late_steps) for environment in environments]
    while not all(lane.is_over for lane in lanes):
        actions = policy.act(np.stack([lane.observation() for lane in lanes]))
        for lane, action in zip(lanes, actions):
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

    # PyBullet prints lines of its own on standard output.
    result_stream = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    import tensorflow as tf
    import tensorflow_probability as tfp  # noqa: F401  (the SavedModel has types of it)

    policy = Policy(tf.saved_model.load(str(arguments.run / "policies" / "greedy_policy")))
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
    print(json.dumps(found), file=result_stream, flush=True)
    low, high = found.get("interval_of_the_run", [-math.inf, math.inf])
    is_disturbed = arguments.late_steps > 0 or arguments.seed is not None
    return 0 if is_disturbed or low <= found["average_return"] <= high else 1


if __name__ == "__main__":
    sys.exit(main())
