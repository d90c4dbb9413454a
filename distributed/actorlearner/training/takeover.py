"""A learner's start: a run that is already over, another running learner, and the previous learner's state."""

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
"""Upper bound on a plausible version: at ten publishes a second, 3,000 years."""

UNKNOWN_STEPS, UNKNOWN_SECS = 10_000, 30.0
"""Upper bounds on the train steps and the seconds that a killed learner trained after its last status."""

NUM_HEARTBEATS = 3
"""Another learner is assumed after this many heartbeats in a row; any client can write one or two such rows."""


def identity_of(experiment: Experiment, policies: Policies) -> dict[str, Any]:
    """Returns what must not change between two starts on one run directory."""
    return {
        "agent": type(policies.agent).__name__,
        "environment": experiment.environment.env_name,
        "observation": str(experiment.time_step_spec.observation),
        "action": str(experiment.action_spec),
        "variables": [f"{v.name.split(':')[0]} {v.shape.as_list()}" for v in policies.variables],
    }


def has_ended(directory: RunDirectory, num_iterations: int) -> bool:
    """Returns whether an earlier learner finished the run, except perhaps for the curve and the videos."""
    summary = directory.read_json(directory.summary)
    return bool(summary and summary.get("has_ended") and summary["train_steps"] >= num_iterations)


def say_it_is_over(cluster: Cluster, num_iterations: int, stop: Stop, patience_secs: float = 60.0) -> None:
    """Announces to the other roles that training is over.

    All roles may just have been restarted, with the replay server still starting; or none is left, because the previous
    learner announced the end. So this waits for the server for at most `patience_secs` seconds.

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
            lambda: f"the variable container at {cluster.variables_address} to accept the end of training",
            stop=stop,
            deadline_secs=min(patience_secs, cluster.peer_patience_secs),
            setting="--peer_patience_secs",
        )
    except RoleError:
        logging.info("no server answers at %s: no role is left to announce the end to", cluster.variables_address)


def restore_replay(source: BatchSource, counts: dict[str, Any], cluster: Cluster, stop: Stop) -> None:
    """Fills the source with what the replay server holds; the server may be restarting.

    Raises:
      RoleError: The server was unreachable for longer than the deadline (UNAVAILABLE).
      Stopped: `stop` was set.
    """

    def go_on() -> None:
        beat()
        if stop.is_set():
            raise Stopped(f"stopped while reading the replay server at {cluster.replay_address}")

    def restore() -> bool:
        try:
            source.restore(counts, go_on)
        except (Unreachable, tf.errors.OpError) as error:
            logging.warning("the replay is not restored yet: %s", error)
            return False
        return True

    wait_until(
        restore,
        lambda: f"the replay server at {cluster.replay_address} to send its replay",
        stop=stop,
        deadline_secs=cluster.peer_patience_secs,
        setting="--peer_patience_secs",
    )


def furthest_step(directory: RunDirectory, num_iterations: int) -> int:
    """Returns an upper bound on the previous learner's train step; its status was at most a second old."""
    status = directory.read_json(directory.status) or {}
    since = max(UNKNOWN_STEPS, int(UNKNOWN_SECS * (status.get("train_steps_per_sec") or 0.0)))
    if "train_step" not in status:
        return num_iterations
    return min(max(num_iterations, status["train_step"]), status["train_step"] + since)


def refuse_second_learner(
    cluster: Cluster, past_learners: Sequence[int], furthest_step: int, stop: Stop, watch_secs: float = 6.0
) -> Optional[Version]:
    """Checks that no other learner publishes; watches for at most `watch_secs` if there is an old heartbeat.

    Learners in `past_learners` held this run directory before: they are dead and need not be watched. Returns what
    they published last, if this run can have come that far.
    """
    try:
        before = variable_container.read_version(cluster.variables_address)
        if before is None or before.phase is Phase.OVER:
            return None
        if before.learner in past_learners:
            # Otherwise actors would keep its weights, or readers would not believe this learner's versions.
            can_be_its = before.train_step <= furthest_step and before.version <= MAX_PAST_VERSION
            return before if can_be_its else None
        deadline, num_heartbeats = time.monotonic() + watch_secs, 0
        now = before
        while num_heartbeats < NUM_HEARTBEATS:
            if time.monotonic() > deadline or stop.wait(0.5):
                return None  # another run's: its weights are of no use here
            now = variable_container.read_version(cluster.variables_address) or before
            if now.learner != before.learner:
                before, num_heartbeats = now, 0
            elif now.heartbeat > before.heartbeat:
                before, num_heartbeats = now, num_heartbeats + 1
                deadline = time.monotonic() + watch_secs  # on a busy machine heartbeats come slowly
    except Unreachable:
        return None
    raise RoleError(
        f"another learner publishes to the variable container at {cluster.variables_address} (train step "
        f"{now.train_step:,}). Stop it, or give this run a replay server of its own.",
        ExitCode.OCCUPIED,
    )
