"""What the learner says while it waits, and when it gives up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from actorlearner.replay.base import BatchSource
from actorlearner.run.record import RunRecord
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, RoleError, Stop, wait_until


class Waiting:
    """Says in log and status what the learner waits for; raises when that takes longer than its patience."""

    def __init__(self, source: BatchSource, replay: str, record: RunRecord, patience_secs: float):
        """Args:
        source: Of the batches.
        replay: Where they come from, in words.
        record: Takes what is waited for, and knows how the actors are.
        patience_secs: Longest wait for anything, in seconds.
        """
        self._source = source
        self._replay = replay
        self._record = record
        self._patience_secs = patience_secs
        self._said_at = time.monotonic()

    def for_first_data(self, stop: Stop, when_not_ready: Callable[[], None]) -> None:
        """Returns when the replay holds enough to train on.

        Args:
          stop: Ends the wait.
          when_not_ready: Called after each look that found too little.

        Raises:
          Stopped: `stop` was set.
          RoleError: It took too long, or the actors ended for good (UNAVAILABLE).
        """
        described = "nothing yet"

        def poll() -> bool:
            nonlocal described
            described = self._source.describe()
            self._record.note_waiting(described)
            self._record.attendance.raise_if_all_failed("collect-actor")
            is_ready = self._source.is_ready()
            if not is_ready:
                when_not_ready()
            return is_ready

        wait_until(
            poll,
            lambda: f"collect actors to fill {self._replay}: {described}; {self._record.describe_actors()}",
            stop=stop,
            deadline_secs=self._patience_secs,
            setting="--peer_patience_secs",
            progress=lambda: described,
        )
        self._record.note_waiting(None)

    def for_data(self, since: float) -> None:
        """Says that no data came since then. Raises `RoleError` when that is too long, or the actors ended for good."""
        self._record.attendance.raise_if_all_failed("collect-actor")
        actors = self._record.describe_actors()
        what = f"collect actors: no data from {self._replay}: {self._source.describe()}; {actors}"
        self._say(since, what, "Start collect actors, or raise the setting.")

    def for_an_update(self, since: float) -> None:
        """Says that a compiled call made no update since then. Raises `RoleError` when that is too long."""
        if not self._source.can_fuse:
            self.for_data(since)
            return
        # Drawing never waits then: actors are not the reason.
        what = "an update in the compiled call: its device is busy with other work, or is compiling"
        self._say(since, what, "Give the learner more of the machine, or raise the setting.")

    def _say(self, since: float, what: str, remedy: str) -> None:
        beat()  # a wait counts as progress, because it has the deadline below
        now = time.monotonic()
        self._record.note_waiting(what)
        if now - self._said_at > SAY_EVERY_SECS:
            self._said_at = now
            logging.info("waiting for %s (%.0f s)", what, now - since)
        if now - since > self._patience_secs:
            raise RoleError(
                f"waited {now - since:.0f} s for {what}, longer than --peer_patience_secs = "
                f"{self._patience_secs:g}. {remedy}",
                ExitCode.UNAVAILABLE,
            )
