"""What of a machine each role takes for itself."""

from __future__ import annotations

import sys

TELLING = """
import telling_cartpole
include 'dqn_cartpole.gin'
gym_environment.env_name = 'TellingCartPole-v0'
"""


def test_actors_hold_tensorflow_to_one_thread_and_to_no_gpu(processes, tmp_path, unused_address):
    """Acting is small: on more threads it takes the learner's cores, and on its GPU nearly all of the memory."""
    (tmp_path / "telling.gin").write_text(TELLING)
    with_gpus = ("env", "-u", "CUDA_VISIBLE_DEVICES", sys.executable)  # where there are any
    actors = [
        processes.start_program(
            *with_gpus, "-m", "actorlearner", role, "telling.gin", f"--replay_address={unused_address}"
        )
        for role in ("collect-actor", "eval-actor")
    ]
    told = [actor.await_line("^threads within .*").group() for actor in actors]
    assert told == ["threads within an operation 1, between operations 1, GPUs []"] * 2
