"""What actors report to the learner, which keeps the run's record: counts of collected steps, and exit reasons.

collect actor --counts--> [collect_reports] --take--> learner
any actor --exit reason--> [last_words] --take--> learner
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Optional

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.runtime import messages, rows
from actorlearner.runtime.lifecycle import FINAL_CODES, ExitCode, RoleError
from actorlearner.runtime.messages import Unreachable
from actorlearner.runtime.row_checks import MAX_TASK, say_left_out
from actorlearner.runtime.rows import MAX_ROWS, Reporter

EXIT_REASONS_TABLE = "last_words"

ACTORS = ("collect-actor", "eval-actor")
"""Roles that send an exit reason."""


@dataclasses.dataclass(frozen=True)
class CollectReport:
    """One collect actor's totals since its process started; a later report of the same `actor` replaces an earlier one.

    Attributes:
      actor: Unique number of this process.
      task: Task number of the collect actor.
      environment_steps, episodes, environment_crashes: Totals.
      average_return: Average over the last finished episodes; NaN before the first.
      blocked_secs: Time spent waiting for the learner: for the server to accept items, or in lock-step for its train
        steps.
      wall_secs: Time since it started to collect.
    """

    TABLE: ClassVar[str] = "collect_reports"

    actor: int
    task: int
    environment_steps: int
    episodes: int
    environment_crashes: int
    average_return: float
    blocked_secs: float
    wall_secs: float


@dataclasses.dataclass(frozen=True)
class ExitReason:
    """Why an actor ended with an error that a restart does not help.

    Attributes:
      role: "collect-actor" or "eval-actor".
      task: Its task number.
      exit_code: Its exit code.
      message: Its error; cut to the length of the row.
    """

    role: str
    task: int
    exit_code: int
    message: str


_WORDS_SIGNATURE = {"text": tf.TensorSpec((2_000,), tf.uint8)}  # JSON in UTF-8, then zeros


def make_tables() -> list[reverb.Table]:
    """Returns the server's tables for reports."""
    return [
        rows.make_queue(CollectReport, 10_000),
        messages.make_queue(EXIT_REASONS_TABLE, 1_000, _WORDS_SIGNATURE),
    ]


class NewestReport:
    """Sends a collect actor's reports from a thread, so that environments never wait for the server.

    Reports are totals, so only the newest matters: it replaces one that could not be sent yet.
    """

    def __init__(self, address: str):
        self._reporter = Reporter(address)
        self._news = threading.Condition()
        self._newest: Optional[CollectReport] = None
        self._is_sending = False
        threading.Thread(target=self._send, name="reports", daemon=True).start()

    def put(self, report: CollectReport) -> None:
        """Replaces the report to send; never blocks."""
        with self._news:
            self._newest = report
            self._news.notify_all()

    def await_sent(self, timeout_secs: float) -> bool:
        """Returns whether the server has the newest report; blocks at most `timeout_secs` seconds."""
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


def take_collect_reports(address: str, timeout_secs: float = 5.0) -> Sequence[CollectReport]:
    """Returns the reports that arrived since the last call. Blocks and raises as `messages.take_current`."""
    return rows.take_current(address, CollectReport, timeout_secs)


def send_exit_reason(address: str, words: ExitReason, timeout_secs: float = 2.0) -> bool:
    """Returns whether the server took it; blocks at most about `timeout_secs` seconds."""
    (length,) = _WORDS_SIGNATURE["text"].shape
    message = words.message
    while len(text := json.dumps(dataclasses.astuple(dataclasses.replace(words, message=message))).encode()) > length:
        # a character takes at most 6 bytes in JSON
        message = message[: len(message) - (len(text) - length + 5) // 6 - 1]
    row = np.zeros(length, np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    try:
        messages.Sender(address).put(EXIT_REASONS_TABLE, {"text": row}, timeout_secs)
    except Unreachable:
        return False
    return True


def take_exit_reasons(address: str, timeout_secs: float = 5.0) -> Sequence[ExitReason]:
    """Returns those that arrived since the last call, foreign rows left out. Blocks and raises as `messages.take`."""
    taken = messages.take(address, EXIT_REASONS_TABLE, _WORDS_SIGNATURE, max_rows=MAX_ROWS, timeout_secs=timeout_secs)
    found = []
    for row in taken:
        try:
            found.append(_read_words(row["text"].tobytes()))
        except (ValueError, TypeError) as error:  # one bad row must not hide the others or end the run
            say_left_out(address, EXIT_REASONS_TABLE, f"this is no exit reason of an actor: {error}")
    return found


def _read_words(text: bytes) -> ExitReason:
    """Returns a row's report. Raises `ValueError` or `TypeError` if no actor of this run can have sent it."""
    role, task, exit_code, message = json.loads(text.rstrip(b"\0"))
    if role not in ACTORS:
        raise ValueError(f"role = {role!r:.50}, expected one of {', '.join(ACTORS)}")
    if type(task) is not int or not 0 <= task <= MAX_TASK:
        raise ValueError(f"task = {task!r:.50}, expected 0 to {MAX_TASK:,}")
    if exit_code not in FINAL_CODES:  # with any other code, 0 above all, it would be restarted
        raise ValueError(f"exit_code = {exit_code!r:.50}, expected one of {sorted(map(int, FINAL_CODES))}")
    printable = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in str(message))
    return ExitReason(role, task, int(exit_code), printable)


class BlockedShare:
    """Share of their time that collect actors wait for the learner, from their reports. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[int, CollectReport] = {}  # by actor
        self._blocked_secs = self._wall_secs = 0.0  # of all actors, since the last `take`
        self._share: Optional[float] = None

    def note(self, report: CollectReport) -> None:
        """Adds the time since the same actor's previous report; its first report only starts the count."""
        with self._lock:
            before = self._newest.get(report.actor, report)
            self._newest[report.actor] = report
            self._blocked_secs += report.blocked_secs - before.blocked_secs
            self._wall_secs += report.wall_secs - before.wall_secs

    def take(self) -> Optional[float]:
        """Returns the share of waiting, 0 to 1, over the reports noted since the last call.

        Without new reports it returns the previous share; None before the first.
        """
        with self._lock:
            if self._wall_secs > 0.0:
                self._share = min(1.0, max(0.0, self._blocked_secs / self._wall_secs))
                self._blocked_secs = self._wall_secs = 0.0
            return self._share


class Attendance:
    """Whether actors of a kind may still arrive, so that the learner need not wait for none."""

    def __init__(self, silent_secs: float = 60.0, clock: Callable[[], float] = time.monotonic):
        """Args:
        silent_secs: A living actor reports more often than this, in seconds.
        clock: Returns seconds.
        """
        self._silent_secs = silent_secs
        self._clock = clock
        self._heard_at: dict[str, float] = {}
        self._ended: dict[str, tuple[float, ExitReason]] = {}  # arrival and text of the last reason, by role

    def note_life(self, role: str) -> None:
        """Notes that an actor of this kind has reported."""
        self._heard_at[role] = self._clock()

    def note_end(self, words: ExitReason) -> None:
        logging.warning(
            "%s %d failed for good (exit code %d): %s", words.role, words.task, words.exit_code, words.message
        )
        self._ended[words.role] = (self._clock(), words)

    def raise_if_all_failed(self, role: str) -> None:
        """Returns while an actor of this kind may still arrive; for whoever waits for one.

        Raises:
          RoleError: An exit reason is the last report of this kind, `silent_secs` old; with the actor's exit code.
        """
        if role not in self._ended:
            return
        ended_at, words = self._ended[role]
        heard_at = self._heard_at.get(role, ended_at)
        was_the_last = heard_at < ended_at + 10.0  # its own last report may arrive just after its exit reason
        silent_secs = self._clock() - max(ended_at, heard_at)
        if was_the_last and silent_secs > self._silent_secs:
            raise RoleError(
                f"no actor is left to wait for: {role} {words.task} failed for good (exit code {words.exit_code}), and "
                f"no other {role} was heard from in the {silent_secs:.0f} s since. Its error: {words.message}",
                ExitCode(words.exit_code),
            )
