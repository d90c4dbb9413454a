"""What a learner finds at its start: a run that is over, another learner at work, what the one before it left."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf

from actorlearner import variable_container
from actorlearner.agents.policies import Policies
from actorlearner.cluster import Cluster
from actorlearner.experiment import Experiment
from actorlearner.replay.base import BatchSource
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, Stopped, wait_until
from actorlearner.runtime.messages import Unreachable
from actorlearner.variable_container import Phase, Version

MAX_PAST_VERSION = 10**12
"""A learner that died cannot have published so often: ten times a second it would have taken 3,000 years."""

UNKNOWN_STEPS, UNKNOWN_SECS = 10_000, 30.0
"""So much further than its status says a learner that was killed may have been; a disk may be slow."""

NUM_HEARTBEATS = 3
"""So many heartbeats in a row make another learner: a row or two that say so may be any client's."""


def identity_of(experiment: Experiment, policies: Policies) -> dict[str, Any]:
    """What must not change between two starts on one run directory."""
    return {
        "agent": type(policies.agent).__name__,
        "environment": experiment.environment.env_name,
        "observation": str(experiment.time_step_spec.observation),
        "action": str(experiment.action_spec),
        "variables": [f"{v.name.split(':')[0]} {v.shape.as_list()}" for v in policies.variables],
    }


def has_ended(directory: RunDirectory, num_iterations: int) -> bool:
    """Returns whether a learner before this one did all there is to do but, maybe, the curve and the videos."""
    summary = directory.read_json(directory.summary)
    return bool(summary and summary.get("has_ended") and summary["train_steps"] >= num_iterations)


def say_it_is_over(cluster: Cluster, num_iterations: int, stop: Stop, patience_secs: float = 60.0) -> None:
    """Returns when whoever listens has been told.

    All roles may just have been started again, and the replay server be on its way; or nobody is left, as the others
    heard it from the learner before this one. So it is looked for for at most `patience_secs` seconds.

    Raises:
      Stopped: `stop` was set.
    """
    logging.info("this run has ended at train step %d", num_iterations)

    def announce() -> bool:
        try:
            variable_container.announce_end(cluster.variables_address, num_iterations, secrets.randbits(62))
        except Unreachable:
            return False
        return True

    try:
        wait_until(
            announce,
            lambda: f"the variable container at {cluster.variables_address} to take the news that training is over",
            stop=stop,
            deadline_secs=min(patience_secs, cluster.peer_patience_secs),
            setting="--peer_patience_secs",
        )
    except RoleError:
        logging.info("nobody answers at %s: nobody is left to be told", cluster.variables_address)


def restore_replay(source: BatchSource, counts: dict[str, Any], cluster: Cluster, stop: Stop) -> None:
    """Returns once the source has what the replay server holds; its server may be on its way back.

    Raises:
      RoleError: It was out of reach for longer than the deadline (UNAVAILABLE).
      Stopped: `stop` was set.
    """

    def go_on() -> None:
        beat()
        if stop.is_set():
            raise Stopped(f"stopped while reading what the replay server at {cluster.replay_address} holds")

    def restore() -> bool:
        try:
            source.restore(counts, go_on)
        except (Unreachable, tf.errors.OpError) as error:
            logging.warning("the replay did not come back yet: %s", error)
            return False
        return True

    wait_until(
        restore,
        lambda: f"the replay server at {cluster.replay_address} to hand out what it holds",
        stop=stop,
        deadline_secs=cluster.peer_patience_secs,
        setting="--peer_patience_secs",
    )


def furthest_step(directory: RunDirectory, num_iterations: int) -> int:
    """Returns a train step that the learner before this one cannot have passed; its status was a second old at most."""
    status = directory.read_json(directory.status) or {}
    since = max(UNKNOWN_STEPS, int(UNKNOWN_SECS * (status.get("train_steps_per_sec") or 0.0)))
    return min(num_iterations, status["train_step"] + since) if "train_step" in status else num_iterations


def refuse_second_learner(
    cluster: Cluster, past_learners: Sequence[int], furthest_step: int, stop: Stop, watch_secs: float = 6.0
) -> Optional[Version]:
    """Returns once no other learner's heartbeat goes on; watches for at most `watch_secs` if one ever did.

    Those in `past_learners` held this run directory before: they are dead, need not be watched, and what they published
    last is returned, if this run can have come so far.
    """
    try:
        before = variable_container.read_version(cluster.variables_address)
        if before is None or before.phase is Phase.OVER:
            return None
        if before.learner in past_learners:
            # Else actors keep its weights for ever, or this learner's versions go on where no reader believes them.
            can_be_its = before.train_step <= furthest_step and before.version <= MAX_PAST_VERSION
            return before if can_be_its else None
        deadline, num_heartbeats = time.monotonic() + watch_secs, 0
        now = before
        while num_heartbeats < NUM_HEARTBEATS:
            if time.monotonic() > deadline or stop.wait(0.5):
                return None  # another run's, whose weights are nothing to this one
            now = variable_container.read_version(cluster.variables_address) or before
            if now.learner != before.learner:
                before, num_heartbeats = now, 0
            elif now.heartbeat > before.heartbeat:
                before, num_heartbeats = now, num_heartbeats + 1
                deadline = time.monotonic() + watch_secs  # a busy machine's come slowly
    except Unreachable:
        return None
    raise RoleError(
        f"another learner publishes to the variable container at {cluster.variables_address} (train step "
        f"{now.train_step:,}). Stop it, or give this run a replay server of its own.",
        ExitCode.OCCUPIED,
    )
