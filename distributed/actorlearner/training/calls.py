"""Compiled calls as the loop makes them: as long as is allowed, watched, and going on when the replay runs dry."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Optional

import tensorflow as tf

from actorlearner.replay.base import BatchSource
from actorlearner.run.record import RunRecord
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import Stop, Stopped
from actorlearner.training.divergence import refuse_not_finite
from actorlearner.training.observations import Observations
from actorlearner.training.step import TrainFunction
from actorlearner.training.timing import TimeShares
from actorlearner.training.waiting import Waiting


class Calls:
    """Makes compiled calls, and waits for data between them."""

    def __init__(
        self,
        train: TrainFunction,
        train_step: tf.Variable,
        source: BatchSource,
        observations: Observations,
        record: RunRecord,
        waiting: Waiting,
        variables: Sequence[tf.Variable],
        before_waiting: Callable[[], None],
    ):
        """Args:
        train: The compiled function.
        train_step: What the agent counts.
        source: Of the batches.
        observations: Counted before each call.
        record: Takes the train steps that a long call has reached.
        waiting: Says what is waited for.
        variables: All that is trained, looked through when a number is not finite.
        before_waiting: Called when no update is allowed.
        """
        self._train = train
        self._train_step = train_step
        self._source = source
        self._observations = observations
        self._record = record
        self._waiting = waiting
        self._variables = variables
        self._before_waiting = before_waiting
        self._starved_since: Optional[float] = None
        self.num_made = 0
        """How many updates the last call made."""
        self._total_made = train.num_made()
        self.shares = TimeShares()
        # A call may block inside Reverb, where no signal interrupts it: a thread makes it, the loop watches the clock.
        self._caller = concurrent.futures.ThreadPoolExecutor(1, "train")

    def make(self, num_updates: int, stop: Stop) -> Optional[dict[str, float]]:
        """Makes as many updates as are allowed, `num_updates` at most.

        Returns the last one's scalars; None after a moment's wait where data ran out before.

        Raises:
          Stopped: `stop` was set and the call did not return; it is left behind, with the updates it made.
          RoleError: No update was made for longer than the deadline (UNAVAILABLE), or the actors ended for good.
          Diverged: A number in the update was not finite.
        """
        with self.shares.ingesting():
            num_allowed = self._source.allow(num_updates)
            self._observations.count()
        scalars = None
        if num_allowed:
            scalars = self._run(num_allowed, stop)
        else:
            self._before_waiting()
        # Asked only where it is not known: a variable on a GPU takes long to read.
        self.num_made = num_allowed if scalars is not None else self._train.num_made() - self._total_made
        self._total_made += self.num_made
        self._source.note_updates(self.num_made)
        if self.num_made:
            self._starved_since = None
        if scalars is not None:
            self._record.note_waiting(None)
            beat()
        else:
            with self.shares.waiting():
                self._await_more_data()
        return scalars

    def _step(self) -> int:
        return int(self._train_step.numpy())

    def _run(self, num_updates: int, stop: Stop) -> Optional[dict[str, float]]:
        """Returns the last update's scalars; None when the data did not suffice."""
        try:
            with self.shares.computing():
                return self._run_watched(num_updates, stop)
        except (tf.errors.OutOfRangeError, tf.errors.UnavailableError):
            pass  # the batches that arrived were trained on
        except tf.errors.InvalidArgumentError as error:
            # TF-Agents checks some losses itself.
            refuse_not_finite(self._step(), error, self._variables)
            if not self._source.leave_out(error):
                raise
        return None

    def _run_watched(self, num_updates: int, stop: Stop) -> dict[str, float]:
        future = self._caller.submit(self._train, self._source.handle, tf.constant(num_updates))
        reached, moved_at = self._total_made, time.monotonic()
        while True:
            done, _ = concurrent.futures.wait([future], timeout=1.0)
            if done:
                return {name: float(value) for name, value in future.result().items()}
            now = self._train.num_made()
            if now != reached:
                reached, moved_at = now, time.monotonic()
                self._record.note_train_step(self._step())
                beat()
            elif time.monotonic() - moved_at > 5.0:  # much longer than an update
                self._waiting.for_an_update(moved_at)
            if stop.is_set() and time.monotonic() - moved_at > 2.0:
                raise Stopped("stopped while waiting for a batch")

    def _await_more_data(self) -> None:
        """Waits briefly for data, and logs what is missing. Raises `RoleError` when it is missing for too long."""
        self._starved_since = self._starved_since or time.monotonic()
        if time.monotonic() - self._starved_since > 1.0:  # shorter waits are normal: samples per insert are being kept
            self._waiting.for_data(self._starved_since)
        self._source.await_data(secs=0.25)
        with contextlib.suppress(tf.errors.OpError):  # the server is away; the next call tries again
            self._source.renew()
