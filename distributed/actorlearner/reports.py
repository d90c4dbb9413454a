"""What actors tell the learner, which keeps the run's record: evaluation results and counts of collected steps.

eval actor --result--> [evaluations_done] --take--> learner
eval actor --still at it--> [evaluations_progress] --take--> learner
collect actor --counts--> [collect_reports] --take--> learner
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.runtime import messages
from actorlearner.runtime.messages import Unreachable
from actorlearner.variable_container import Purpose

EVALUATIONS_DONE_TABLE = "evaluations_done"
EVALUATIONS_PROGRESS_TABLE = "evaluations_progress"
COLLECT_REPORTS_TABLE = "collect_reports"

_INT64 = tf.TensorSpec((), tf.int64)
_FLOAT64 = tf.TensorSpec((), tf.float64)


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What a greedy policy did in `num_episodes` episodes; lengths are in environment steps."""

    train_step: int
    version: int
    purpose: int
    average_return: float
    average_episode_length: float
    min_episode_length: int
    num_episodes: int
    wall_secs: float
    task: int

    @property
    def is_delivered(self) -> bool:
        return self.purpose == Purpose.DELIVERED


@dataclasses.dataclass(frozen=True)
class EvaluationProgress:
    """An eval actor's word that it is at work on a snapshot, said again and again until the result is delivered."""

    train_step: int
    purpose: int
    task: int


@dataclasses.dataclass(frozen=True)
class CollectReport:
    """One collect actor's counts since its process began; a later report of the same `actor` replaces an earlier one.

    Attributes:
      actor: A number of this process, no two alike.
      task: Which of the collect actors.
      environment_steps, episodes, environment_crashes: Totals.
      average_return: Of the last finished episodes; NaN before the first.
      blocked_secs: Time spent waiting for the server to take items.
    """

    actor: int
    task: int
    environment_steps: int
    episodes: int
    environment_crashes: int
    average_return: float
    blocked_secs: float


def _signature(row: type) -> dict[str, Any]:
    # Annotations are strings here: `from __future__ import annotations`.
    return {field.name: _INT64 if field.type == "int" else _FLOAT64 for field in dataclasses.fields(row)}


def make_tables() -> list[reverb.Table]:
    """Returns the server's tables for reports."""
    return [
        messages.make_queue(EVALUATIONS_DONE_TABLE, 1_000, _signature(EvaluationResult)),
        messages.make_queue(EVALUATIONS_PROGRESS_TABLE, 1_000, _signature(EvaluationProgress)),
        messages.make_queue(COLLECT_REPORTS_TABLE, 10_000, _signature(CollectReport)),
    ]


def _row(report: Any) -> dict[str, Any]:
    convert: dict[Any, type] = {"int": np.int64, "float": np.float64}
    return {field.name: convert[field.type](getattr(report, field.name)) for field in dataclasses.fields(report)}


def _take(address: str, table: str, kind: type, timeout_secs: float) -> Sequence[Any]:
    rows = messages.take(address, table, _signature(kind), max_rows=1_000, timeout_secs=timeout_secs)
    return [kind(**{name: value.item() for name, value in row.items()}) for row in rows]


_TABLES: dict[type, str] = {
    EvaluationResult: EVALUATIONS_DONE_TABLE,
    EvaluationProgress: EVALUATIONS_PROGRESS_TABLE,
    CollectReport: COLLECT_REPORTS_TABLE,
}


class AtWork:
    """Says from a thread that an evaluation is being made, as long as the `with` lasts."""

    def __init__(self, address: str, progress: EvaluationProgress, interval_secs: float = 1.0):
        self._reporter = Reporter(address)
        self._progress = progress
        self._interval_secs = interval_secs
        self._closing = threading.Event()

    def __enter__(self) -> AtWork:
        threading.Thread(target=self._say, name="at work", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()

    def _say(self) -> None:
        while not self._closing.is_set():
            self._reporter.send(self._progress, timeout_secs=2.0)
            self._closing.wait(self._interval_secs)


class Reporter:
    """An actor's side; used from one thread."""

    def __init__(self, address: str):
        self._sender = messages.Sender(address)

    def send(self, report: EvaluationResult | EvaluationProgress | CollectReport, *, timeout_secs: float = 5.0) -> bool:
        """Returns whether the server took the report; blocks at most `timeout_secs` seconds."""
        try:
            self._sender.put(_TABLES[type(report)], _row(report), timeout_secs)
        except Unreachable as error:
            logging.info("report not delivered: %s", error)
            return False
        return True


class NewestReport:
    """Sends a collect actor's reports from a thread: no environment waits while the server is away.

    Totals make all but the newest needless, so a report that could not be sent yet is replaced by the next.
    """

    def __init__(self, address: str):
        self._reporter = Reporter(address)
        self._news = threading.Condition()
        self._newest: Optional[CollectReport] = None
        self._is_sending = False
        threading.Thread(target=self._send, name="reports", daemon=True).start()

    def put(self, report: CollectReport) -> None:
        """Takes the report in place of the one before; never blocks."""
        with self._news:
            self._newest = report
            self._news.notify_all()

    def await_sent(self, timeout_secs: float) -> bool:
        """Returns whether the server has taken the newest report; blocks at most `timeout_secs` seconds."""
        with self._news:
            return self._news.wait_for(lambda: self._newest is None and not self._is_sending, timeout_secs)

    def _send(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._newest is not None)
                report, self._newest, self._is_sending = self._newest, None, True
            assert report is not None
            is_sent = self._reporter.send(report)
            with self._news:
                self._is_sending = False
                if not is_sent and self._newest is None:
                    self._newest = report
                self._news.notify_all()
            if not is_sent:
                time.sleep(0.5)


def take_evaluation_results(address: str, timeout_secs: float = 5.0) -> Sequence[EvaluationResult]:
    """Returns the results that arrived since the last call. Blocks and raises as `messages.take`."""
    return _take(address, EVALUATIONS_DONE_TABLE, EvaluationResult, timeout_secs)


def take_evaluation_progress(address: str, timeout_secs: float = 5.0) -> Sequence[EvaluationProgress]:
    """Returns the signs of life that arrived since the last call. Blocks and raises as `messages.take`."""
    return _take(address, EVALUATIONS_PROGRESS_TABLE, EvaluationProgress, timeout_secs)


def take_collect_reports(address: str, timeout_secs: float = 5.0) -> Sequence[CollectReport]:
    """Returns the reports that arrived since the last call. Blocks and raises as `messages.take`."""
    return _take(address, COLLECT_REPORTS_TABLE, CollectReport, timeout_secs)
