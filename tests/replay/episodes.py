"""Episodes whose observations are the numbers of their steps, as sinks and mirrors take them."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tf_agents.trajectories import StepType, trajectory

from actorlearner.replay.base import Sampling
from actorlearner.replay.mirror import Mirror
from actorlearner.replay.servers import ReplayServers

RANDOM = -1


def episode(first: int, num_environment_steps: int) -> list[trajectory.Trajectory]:
    """Returns an episode's steps and its boundary; observations are `first`, `first + 1`, ..."""
    steps = []
    for number in range(num_environment_steps + 1):
        is_boundary = number == num_environment_steps
        step_type = StepType.FIRST if number == 0 else StepType.LAST if is_boundary else StepType.MID
        next_type = (
            StepType.FIRST if is_boundary else StepType.LAST if number == num_environment_steps - 1 else StepType.MID
        )
        steps.append(
            trajectory.Trajectory(
                step_type=np.int32(step_type),
                observation=np.array([first + number], np.float32),
                action=np.int64(number % 2),
                policy_info=(),
                next_step_type=np.int32(next_type),
                reward=np.float32(1.0),
                discount=np.float32(0.0 if next_type == StepType.LAST else 1.0),
            )
        )
    return steps


def columns(*steps):
    """Returns one step of each environment as columns."""
    return tf.nest.map_structure(lambda *leaves: np.stack(leaves), *steps)


def flush(sink):
    """Sends what is pending, as at the end of a run."""
    sink.close(timeout_secs=5)


def as_chunk(*lanes, acted_at=RANDOM):
    """Returns what a sink sends of these runs of steps, one for each environment."""
    stacked = columns(*(columns(*steps) for steps in lanes))
    return {
        "acted_at": np.full(len(lanes[0]), acted_at),
        "ends_run": stacked.step_type == StepType.LAST,
        "length": np.int64(len(lanes[0])),
        "step": stacked,
    }


def held_windows(mirror: Mirror, num_draws: int = 4_000) -> set[tuple[float, ...]]:
    drawn, _ = mirror.draw(num_draws)
    return {tuple(window) for window in drawn.observation.numpy()[..., 0]}


def sample(**changes):
    """Returns a plan of two-step windows, one update for each window after the tenth."""
    plan = {
        "num_steps": 2,
        "batch_size": 4,
        "num_updates_per_call": 5,
        "num_environments": 1,
        "initial_collect_steps": 10,
        "samples_per_insert": 4.0,
    }
    return Sampling(**{**plan, **changes})


def write(sink, *lanes, acted_at=RANDOM, crashes=()):
    """Writes runs of steps of equal length, one for each environment; `crashes` are (row, environment)."""
    for row, steps in enumerate(zip(*lanes)):
        crashed = np.array([(row, index) in crashes for index in range(len(lanes))])
        sink.append(columns(*steps), acted_at, crashed)
        assert not sink.is_blocked()


def make_source(replay, address, spec, **changes):
    """Returns the learner's side of a replay."""
    return replay.make_source(ReplayServers([address]), spec, sample(**changes), tf.distribute.get_strategy())
