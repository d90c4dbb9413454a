"""Draws frames of one stride of a run's greedy policy, side by side, with the time of each.

    python -m benchmarks.gait_frames runs/minitaur docs/images/minitaur_gait.png
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

NUM_FRAMES = 6
FRAME_STEPS = 8  # of 10 ms: six frames are about one stride
FIRST_STEP = 300
CROP = (slice(170, 620), slice(200, 760))  # rows and columns of the 960 x 720 that PyBullet renders


def render_frames(policy: Any, seed: int = 0) -> list[tuple[float, Any]]:
    """Returns (seconds, uint8 [height, width, 3]) of each frame."""
    import gym
    import numpy as np

    from benchmarks.saved_model_in_gym import Lane

    random.seed(seed)
    np.random.seed(seed)
    environment = gym.make("MinitaurBulletEnv-v0", render=False)
    lane = Lane(environment, policy.num_past_steps, 0)
    frames = []
    wanted = [FIRST_STEP + FRAME_STEPS * number for number in range(NUM_FRAMES)]
    while not lane.is_over and lane.length <= wanted[-1]:
        if lane.length in wanted:
            frames.append((lane.length / 100, environment.render("rgb_array")[CROP]))
        lane.step(policy.act(lane.observation()[None])[0])
    return frames


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory whose training has ended")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pybullet_envs  # noqa: F401  (registers the environment)
    import tensorflow as tf
    import tensorflow_probability as tfp  # noqa: F401  (the SavedModel has types of it)

    from benchmarks.saved_model_in_gym import Policy

    policy = Policy(tf.saved_model.load(str(arguments.run / "policies" / "greedy_policy")))
    frames = render_frames(policy)
    if len(frames) < NUM_FRAMES:
        print(f"the robot fell after {len(frames)} of {NUM_FRAMES} frames", file=sys.stderr)
        return 1
    figure, axes = plt.subplots(1, NUM_FRAMES, figsize=(2.2 * NUM_FRAMES, 2.1))
    for axis, (secs, frame) in zip(axes, frames):
        axis.imshow(frame)
        axis.set_title(f"{secs:.2f} s", fontsize=9)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=80)
    return 0


if __name__ == "__main__":
    sys.exit(main())
