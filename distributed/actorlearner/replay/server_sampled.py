"""The learner's side of server-sampled replay: batches of windows that Reverb's server samples."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import reverb
import tensorflow as tf
import tree

from actorlearner.replay.base import Batch, BatchSource
from actorlearner.replay.chunk_checks import are_plausible, step_limits
from actorlearner.replay.first_looks import FirstLooks
from actorlearner.replay.moments import Moments
from actorlearner.replay.tables import describe_table
from actorlearner.replay.windows import REPLAY_TABLE, make_stamp, read_stamps
from actorlearner.runtime.lifecycle import find_reason
from actorlearner.runtime.messages import Unreachable, read_server_info, without_tuning
from actorlearner.runtime.row_checks import MAX_COUNT, Between
from actorlearner.runtime.tls.tunnel import reach

_FROM_THE_ITERATOR = re.compile(r"\[\[(\{\{node )?[\w/]*Iterator\w*GetNext")  # rather than from the update
_UNTRUE = "A number that is not finite, too large, or out of the bounds of its spec"
_MISFIT = re.compile(
    r"(A number that is not finite|Inconsistent number|Received incompatible|Cannot batch|Shape of tensor).*(?<!\.)"
)

NUM_FIRST_LOOKS = 8
"""Batches drawn before the first update to count observations; fewer than any error buffer allows."""


def make_dataset(
    address: str,
    step_spec: Any,
    num_steps: int,
    batch_size: int,
    *,
    leaves_out: bool,
    max_in_flight: int,
    num_workers: int,
    wait_secs: float,
) -> tf.data.Dataset:
    """Returns a dataset of batches of windows that the server samples.

    Shapes: B = batch_size, T = num_steps. An element is (steps, acted_at, is_first_look): leaves [B, T, ...], [B], [B].

    Args:
      address: Address of the server.
      step_spec: Spec of one step.
      num_steps, batch_size: Steps in a window, windows in a batch.
      leaves_out: Whether to skip foreign items; otherwise reading fails at the first one.
      max_in_flight: Items that each stream prefetches.
      num_workers: Number of streams that fetch items.
      wait_secs: The dataset ends after this time without a batch, in seconds.
    """
    limits = step_limits(step_spec)
    dataset = reverb.TrajectoryDataset(
        reach(address),
        REPLAY_TABLE,
        dtypes=tree.map_structure(lambda spec: spec.dtype, step_spec),
        # Any length, as in the table's signature, with which Reverb compares items.
        shapes=tree.map_structure(lambda spec: tf.TensorShape([None]).concatenate(spec.shape), step_spec),
        max_in_flight_samples_per_worker=max_in_flight,
        num_workers_per_iterator=num_workers,
        rate_limiter_timeout_ms=int(wait_secs * 1000),
    )
    if leaves_out:
        dataset = dataset.ignore_errors().filter(lambda sample: _is_ours(sample, num_steps, limits))
    batches = dataset.batch(batch_size, drop_remainder=True)

    def require_shape(leaf: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
        return tf.ensure_shape(leaf, [batch_size, num_steps, *spec.shape])

    def unpack(sample: reverb.ReplaySample) -> tuple[Any, tf.Tensor, tf.Tensor]:
        # Check whole batches, because checking each item takes far longer; the first failure ends this dataset.
        can_be_true = tf.reduce_all(_can_be_true(sample, limits))
        with tf.control_dependencies([tf.debugging.Assert(can_be_true, [_UNTRUE])]):
            priority = tf.identity(sample.info.priority)
        steps = tree.map_structure(require_shape, sample.data, step_spec)
        return steps, read_stamps(priority), tf.equal(sample.info.times_sampled, 1)

    return without_tuning(batches.map(unpack).prefetch(2))


def _can_be_true(sample: reverb.ReplaySample, limits: Sequence[Optional[Between]]) -> tf.Tensor:
    """Returns whether each item of a batch, leaves [B, T, ...], can come from an actor of this experiment."""
    is_stamped = sample.info.priority <= make_stamp(MAX_COUNT)  # False for a NaN
    return are_plausible(sample.data, limits) & is_stamped


def _is_ours(sample: reverb.ReplaySample, num_steps: int, limits: Sequence[Optional[Between]]) -> tf.Tensor:
    """Returns whether an item, leaves [T, ...], has `num_steps` steps and is plausible."""
    lengths = [tf.shape(leaf)[0] for leaf in tree.flatten(sample.data)]
    batch = tree.map_structure(lambda leaf: leaf[None], sample)
    return tf.reduce_all(tf.stack(lengths) == num_steps) & _can_be_true(batch, limits)[0]


class ServerSampledSource(BatchSource):
    """Batches that Reverb sampled, distributed over a strategy's replicas. See `BatchSource`.

    Reverb's server accepts whatever a client inserts, and its dataset fails at each item that does not fit. After the
    first failure (see `leave_out`) another dataset is used, which skips such items. It is not used from the start,
    because checking each item costs time, and it would endlessly retry a server that refuses for good.
    """

    def __init__(
        self,
        address: str,
        batch_size: int,
        strategy: tf.distribute.Strategy,
        make_dataset: Callable[[bool, tf.distribute.InputContext], tf.data.Dataset],
        is_queue: bool = False,
    ):
        """Args:
        address: Address of the server.
        batch_size: Windows in one batch, over all replicas together.
        strategy: Its replicas share a batch.
        make_dataset: Returns a replica's dataset; its argument is whether to skip foreign items.
        is_queue: Whether each item is handed out once; then none is drawn only to be counted.
        """
        self._is_queue = is_queue
        self._address = address
        self._batch_size = batch_size
        self._strategy = strategy
        self._make_dataset = make_dataset
        self._samples = 0
        self._first_looks: Optional[FirstLooks] = None
        self._leaves_out = False
        self._dataset = self._distribute()
        self.handle: Any = iter(self._dataset)
        self._meets_strangers: Any = None  # the iterator that failed at a foreign item, until it is renewed

    def _distribute(self) -> Any:
        return self._strategy.distribute_datasets_from_function(functools.partial(self._make_dataset, self._leaves_out))

    def restore(self, counts: Mapping[str, Any], on_progress: Callable[[], object] = lambda: None) -> None:
        del on_progress  # this reads nothing
        self._samples = counts.get("samples", 0)

    def counts(self) -> dict[str, Any]:
        counts = {"samples": self._samples}
        with contextlib.suppress(Unreachable):
            counts["inserts"] = self._read_table(timeout_secs=1).rate_limiter_info.insert_stats.completed
        return counts

    def draw(self, handle: Any) -> tuple[Any, ...]:
        return next(handle)

    def unpack(self, *parts: Any) -> Batch:
        experience, acted_at, is_first_look = parts
        if self._first_looks is not None:
            self._first_looks.count(experience.observation, is_first_look)
        return Batch(experience, acted_at)

    def count_observations(self) -> None:
        self._first_looks = FirstLooks(self._strategy, self._dataset.element_spec[0].observation)

    def take_moments(self) -> list[Moments]:
        """Returns the moments of the items drawn for the first time. See `BatchSource.take_moments`."""
        assert self._first_looks is not None, "call count_observations first"
        return self._first_looks.take()

    def look_first(self) -> None:
        """Draws some batches only to count them; they count as samples. See `BatchSource.look_first`."""
        draw = tf.function(lambda handle: self._strategy.run(self.unpack, args=self.draw(handle)))
        while self._samples < NUM_FIRST_LOOKS * self._batch_size and not self._is_queue:
            draw(self.handle)
            self.note_updates(1)

    def note_updates(self, num_updates: int) -> None:
        self._samples += num_updates * self._batch_size

    def renew(self) -> None:
        self.handle = iter(self._dataset)

    def leave_out(self, error: tf.errors.InvalidArgumentError) -> bool:
        """Returns whether a foreign item made `draw` fail; then call `renew`. See `BatchSource.leave_out`."""
        if self.handle is self._meets_strangers:  # the server was away when it should have been renewed
            return True
        if self._leaves_out or not _FROM_THE_ITERATOR.search(error.message):
            return False
        misfit = _MISFIT.search(error.message)
        logging.warning(
            "an item in the table '%s' at %s is not this experiment's: %s. It and all others that do not fit are "
            "skipped from now on. Another client inserts there; keep the port on a network you trust.",
            REPLAY_TABLE,
            self._address,
            misfit[0] if misfit else find_reason(error),
        )
        self._leaves_out = True
        self._meets_strangers = self.handle
        self._dataset = self._distribute()
        return True

    def is_ready(self) -> bool:
        try:
            table = self._read_table(timeout_secs=5)
        except Unreachable:
            return False
        return table.current_size >= table.rate_limiter_info.min_size_to_sample

    def account(self) -> dict[str, float]:
        """Returns the table's account, in figures. See `BatchSource.account`."""
        try:
            table = self._read_table(timeout_secs=1)
        except Unreachable:
            return {}
        limiter = table.rate_limiter_info
        inserts, samples = limiter.insert_stats.completed, limiter.sample_stats.completed
        middle = (limiter.min_diff + limiter.max_diff) / 2
        return {
            "held": table.current_size,
            "inserts": inserts,
            "samples": samples,
            "ahead": inserts * limiter.samples_per_insert - samples - middle,
            "error_buffer": limiter.max_diff - middle,
        }

    def describe(self) -> str:
        try:
            table = self._read_table(timeout_secs=5)
        except Unreachable as error:
            return str(error)
        return describe_table(table)

    def _read_table(self, timeout_secs: float) -> Any:
        return read_server_info(self._address, timeout_secs)[REPLAY_TABLE]
