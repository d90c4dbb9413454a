"""The queue of snapshots due for evaluation and the queue of results, both ends.

learner --request--> [evaluations_due] --take--> eval actor
eval actor --result--> [evaluations_done] --take--> learner
eval actor --heartbeat--> [evaluations_progress] --take--> learner
"""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Optional

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.runtime import messages, rows
from actorlearner.runtime.rows import Reporter
from actorlearner.variable_container import Snapshot

EVALUATIONS_TABLE = "evaluations_due"
MAX_EVALUATIONS_DUE = 1_000

_INT64 = tf.TensorSpec((), tf.int64)


class Purpose(enum.IntEnum):
    """Why a snapshot is evaluated."""

    PERIODIC = 0
    DELIVERED = 1  # the policy that the run delivers


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """A snapshot that is due for evaluation."""

    snapshot: Snapshot
    purpose: Purpose


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The result of a greedy policy over `num_episodes` episodes; lengths are in environment steps.

    `return_std` is the standard deviation of the episodes' returns (0 for one episode); `num_truncated` is the number
    of episodes that were cut by the time limit.
    """

    TABLE: ClassVar[str] = "evaluations_done"

    train_step: int
    version: int
    purpose: int
    average_return: float
    return_std: float
    average_episode_length: float
    min_episode_length: int
    num_truncated: int
    num_episodes: int
    wall_secs: float
    task: int

    @property
    def is_delivered(self) -> bool:
        return self.purpose == Purpose.DELIVERED


@dataclasses.dataclass(frozen=True)
class EvaluationProgress:
    """An eval actor's heartbeat: it works on this snapshot. Sent every second until the result is delivered."""

    TABLE: ClassVar[str] = "evaluations_progress"

    train_step: int
    purpose: int
    task: int


def evaluation_signature(variables: Sequence[tf.Variable]) -> dict[str, Any]:
    """Returns the signature of a row of `evaluations_due`."""
    return {
        "policy_variables": [tf.TensorSpec(v.shape, v.dtype) for v in variables],
        "purpose": _INT64,
        "train_step": _INT64,
        "version": _INT64,
    }


def make_tables(variables: Sequence[tf.Variable]) -> list[reverb.Table]:
    """Returns the server's evaluation tables for acting variables of these shapes."""
    return [
        messages.make_queue(EVALUATIONS_TABLE, MAX_EVALUATIONS_DUE, evaluation_signature(variables)),
        rows.make_queue(EvaluationResult, 1_000),
        rows.make_queue(EvaluationProgress, 1_000),
    ]


class EvaluationRequests:
    """The learner's queue of snapshots to evaluate; used from one thread."""

    def __init__(self, address: str):
        self._sender = messages.Sender(address)

    def put(self, request: EvaluationRequest, *, timeout_secs: float = 5.0) -> None:
        """Queues one snapshot. Raises `Unreachable` if the server did not accept it within the deadline."""
        row = {
            "policy_variables": list(request.snapshot.variables),
            "purpose": np.int64(request.purpose),
            "train_step": np.int64(request.snapshot.train_step),
            "version": np.int64(request.snapshot.version),
        }
        self._sender.put(EVALUATIONS_TABLE, row, timeout_secs)


def count_evaluations_due(address: str, timeout_secs: float = 5.0) -> int:
    """Returns how many snapshots wait for an eval actor; blocks up to `timeout_secs` seconds. Raises `Unreachable`."""
    return messages.read_server_info(address, timeout_secs)[EVALUATIONS_TABLE].current_size


def take_evaluation(
    address: str, variables: Sequence[tf.Variable], *, timeout_secs: float = 5.0
) -> Optional[EvaluationRequest]:
    """Returns the oldest snapshot due, which no other eval actor will get; None when none is due.

    Foreign rows before it are skipped. Blocks at most about twice `timeout_secs` seconds.

    Raises:
      Unreachable: The server does not answer within the deadline.
    """
    taken = messages.take(address, EVALUATIONS_TABLE, evaluation_signature(variables), timeout_secs=timeout_secs)
    if not taken:
        return None
    row = taken[0]
    snapshot = Snapshot(int(row["version"]), int(row["train_step"]), list(row["policy_variables"]))
    return EvaluationRequest(snapshot, Purpose(int(row["purpose"])))


class EvaluationHeartbeat:
    """Sends an evaluation's heartbeat from a thread, as long as the `with` block lasts."""

    def __init__(self, address: str, progress: EvaluationProgress, interval_secs: float = 1.0):
        self._reporter = Reporter(address)
        self._progress = progress
        self._interval_secs = interval_secs
        self._closing = threading.Event()

    def __enter__(self) -> EvaluationHeartbeat:
        threading.Thread(target=self._say, name="evaluation heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()

    def _say(self) -> None:
        while not self._closing.is_set():
            self._reporter.send(self._progress, timeout_secs=2.0)
            self._closing.wait(self._interval_secs)


def take_evaluation_results(address: str, timeout_secs: float = 5.0) -> Sequence[EvaluationResult]:
    """Returns the results that arrived since the last call. Blocks and raises as `messages.take`."""
    return rows.take(address, EvaluationResult, timeout_secs)


def take_evaluation_progress(address: str, timeout_secs: float = 5.0) -> Sequence[EvaluationProgress]:
    """Returns the heartbeats that arrived since the last call. Blocks and raises as `messages.take_current`."""
    return rows.take_current(address, EvaluationProgress, timeout_secs)
