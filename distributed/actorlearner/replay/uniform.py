"""Server-sampled uniform replay: Reverb's table draws the items; stock TF-Agents clients can write and read it too."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Optional

import gin
import numpy as np
import reverb
import tensorflow as tf
import tree
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import StepType

from actorlearner.replay.base import Sampling, describe_table
from actorlearner.replay.chunk_checks import are_plausible, step_limits
from actorlearner.replay.first_looks import FirstLooks
from actorlearner.replay.moments import Moments
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.configuration import PositiveFloat, PositiveInt
from actorlearner.runtime.lifecycle import find_reason
from actorlearner.runtime.messages import Unreachable, read_server_info, without_tuning
from actorlearner.runtime.row_checks import MAX_COUNT, Between
from actorlearner.runtime.tls.tunnel import reach

REPLAY_TABLE = "uniform_table"
"""Name of the table; the TF-Agents tutorials' own, so that their clients find it."""

_FROM_THE_ITERATOR = re.compile(r"\[\[(\{\{node )?[\w/]*Iterator\w*GetNext")  # rather than from the update
_UNTRUE = "A number that is not finite, too large, or out of the bounds of its spec"
_MISFIT = re.compile(
    r"(A number that is not finite|Inconsistent number|Received incompatible|Cannot batch|Shape of tensor).*(?<!\.)"
)

NUM_FIRST_LOOKS = 8
"""So many batches are looked at before the first update, where observations are counted; within any error buffer."""

_UNSTAMPED = 1.0  # the priority that stock TF-Agents observers write

_SELECTORS = {
    "uniform": reverb.selectors.Uniform,
    "fifo": reverb.selectors.Fifo,
    "lifo": reverb.selectors.Lifo,
}


@gin.configurable("uniform_replay", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class UniformReplay:
    """Uniform experience replay (Lin, 1992) in one Reverb table, sampled by the server.

    Attributes:
      replay_buffer_capacity: Items the table holds; with two-step windows an item is a transition.
      sampler: Which item a sample is: "uniform", or the oldest ("fifo") or newest ("lifo").
      remover: Which item leaves a full table: "fifo" the oldest, "lifo" the newest, "uniform" any.
      rate_limiter: "sample_to_insert_ratio" keeps samples per insert at the schedule's ratio in both directions (the
        learner waits for actors, actors for the learner); "min_size" only waits for `initial_collect_steps`; "queue"
        hands each item out once, in order.
      samples_per_insert: Overrides the ratio that `collect_steps_per_iteration` and `batch_size` give.
      error_buffer: How many samples the ratio may be off at any moment; None takes a hundred inserts' worth.
      num_workers: Streams that fetch samples.
      max_in_flight: Items each stream asks for ahead; None takes two batches.
      wait_secs: How long a batch may be awaited before the learner looks up, says so and tries again.
      chunk_length: Steps an actor's writer sends in one piece; items share pieces, and few long ones sample fastest.
      max_pending_items: Items one environment's writer may have unconfirmed before it waits for the server.
    """

    replay_buffer_capacity: PositiveInt = 100_000
    sampler: Literal["uniform", "fifo", "lifo"] = "uniform"
    remover: Literal["uniform", "fifo", "lifo"] = "fifo"
    rate_limiter: Literal["sample_to_insert_ratio", "min_size", "queue"] = "sample_to_insert_ratio"
    samples_per_insert: Optional[PositiveFloat] = None
    error_buffer: Optional[PositiveFloat] = None
    num_workers: PositiveInt = 2
    max_in_flight: Optional[PositiveInt] = None
    wait_secs: PositiveFloat = 5.0
    chunk_length: PositiveInt = 16
    max_pending_items: PositiveInt = 64

    can_lock_step: ClassVar[bool] = False  # Reverb's selectors cannot be seeded
    can_spread: ClassVar[bool] = False  # its rate limiter knows of one table

    def check(self, *, initial_collect_steps: int) -> None:
        """Raises `ValueError` when the table could never hold what training waits for."""
        if self.rate_limiter != "queue" and self.replay_buffer_capacity < initial_collect_steps:
            raise ValueError(
                f"uniform_replay.replay_buffer_capacity = {self.replay_buffer_capacity:,} is smaller than "
                f"train.initial_collect_steps = {initial_collect_steps:,}: training would never begin. "
                "Raise the first or lower the second."
            )

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        """Returns the one table's signature; the unknown outer dimension is what stock TF-Agents clients write."""
        return {REPLAY_TABLE: tensor_spec.add_outer_dim(step_spec)}

    def make_tables(self, step_spec: Any, sampling: Sampling) -> list[reverb.Table]:
        """Returns one table of windows. See `Replay.make_tables`.

        Raises:
          ValueError: `error_buffer` is too small for the ratio.
        """
        signature = self.table_signatures(step_spec)[REPLAY_TABLE]
        if self.rate_limiter == "queue":
            return [reverb.Table.queue(REPLAY_TABLE, max_size=self.replay_buffer_capacity, signature=signature)]
        return [
            reverb.Table(
                REPLAY_TABLE,
                sampler=_SELECTORS[self.sampler](),
                remover=_SELECTORS[self.remover](),
                max_size=self.replay_buffer_capacity,
                rate_limiter=self._make_rate_limiter(sampling),
                signature=signature,
            )
        ]

    def is_warm(self, servers: ReplayServers, initial_collect_steps: int) -> Optional[bool]:
        """Returns whether the table holds `initial_collect_steps` items. See `Replay.is_warm`."""
        table = read_server_info(servers.mine(), timeout_secs=5)[REPLAY_TABLE]
        # A queue is emptied as it fills.
        held = table.rate_limiter_info.insert_stats.completed if self.rate_limiter == "queue" else table.current_size
        return held >= initial_collect_steps

    def _make_rate_limiter(self, sampling: Sampling) -> reverb.rate_limiters.RateLimiter:
        min_size = max(1, sampling.initial_collect_steps)
        if self.rate_limiter == "min_size":
            return reverb.rate_limiters.MinSize(min_size)
        ratio = self.samples_per_insert or sampling.samples_per_insert
        error_buffer = self.error_buffer or max(100 * ratio, 10 * sampling.batch_size)
        if error_buffer < max(1.0, ratio):
            raise ValueError(
                f"uniform_replay.error_buffer = {error_buffer:g} must be at least max(1, samples_per_insert) = "
                f"{max(1.0, ratio):g}, or neither side could ever move. Raise it, or leave it out."
            )
        return reverb.rate_limiters.SampleToInsertRatio(
            samples_per_insert=ratio, min_size_to_sample=min_size, error_buffer=error_buffer
        )

    def make_sink(self, servers: ReplayServers, sampling: Sampling) -> WindowSink:
        """Returns a writer of overlapping `num_steps`-step items. See `Replay.make_sink`."""
        client = reverb.Client(reach(servers.mine()))
        num_beyond_end = sampling.num_steps - 2 if sampling.windows_may_end_early else 0
        return WindowSink(
            [
                _EpisodeWriter(client, sampling.num_steps, num_beyond_end, self.chunk_length, self.max_pending_items)
                for _ in range(sampling.num_environments)
            ]
        )

    def make_source(
        self, servers: ReplayServers, step_spec: Any, sampling: Sampling, strategy: tf.distribute.Strategy
    ) -> ServerSampledSource:
        """Returns batches sampled by the one server, which keeps the ratio. See `Replay.make_source`."""
        address = servers.mine()
        num_steps, batch_size = sampling.num_steps, sampling.batch_size
        limits = step_limits(step_spec)

        def make_dataset(leaves_out: bool, context: tf.distribute.InputContext) -> tf.data.Dataset:
            per_replica = context.get_per_replica_batch_size(batch_size)
            dataset = reverb.TrajectoryDataset(
                reach(address),
                REPLAY_TABLE,
                dtypes=tree.map_structure(lambda spec: spec.dtype, step_spec),
                # Of any length: Reverb compares items with the table's signature, which says no more.
                shapes=tree.map_structure(lambda spec: tf.TensorShape([None]).concatenate(spec.shape), step_spec),
                max_in_flight_samples_per_worker=self.max_in_flight or 2 * batch_size,
                num_workers_per_iterator=1 if self.rate_limiter == "queue" else self.num_workers,
                rate_limiter_timeout_ms=int(self.wait_secs * 1000),
            )
            if leaves_out:
                dataset = dataset.ignore_errors().filter(lambda sample: _is_ours(sample, num_steps, limits))
            batches = dataset.batch(per_replica, drop_remainder=True)

            def require_shape(leaf: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
                return tf.ensure_shape(leaf, [per_replica, num_steps, *spec.shape])

            def unpack(sample: reverb.ReplaySample) -> tuple[Any, tf.Tensor, tf.Tensor]:
                # Of a whole batch, as to look at each item takes far longer; the first that fails ends this dataset.
                can_be_true = tf.reduce_all(_can_be_true(sample, limits))
                with tf.control_dependencies([tf.debugging.Assert(can_be_true, [_UNTRUE])]):
                    priority = tf.identity(sample.info.priority)
                steps = tree.map_structure(require_shape, sample.data, step_spec)
                return steps, read_stamps(priority), tf.equal(sample.info.times_sampled, 1)

            return without_tuning(batches.map(unpack).prefetch(2))

        return ServerSampledSource(address, batch_size, strategy, make_dataset, is_queue=self.rate_limiter == "queue")


def make_stamp(acted_at: int) -> float:
    """Returns the priority of an item whose actions are by weights published at train step `acted_at`; -1 for none.

    The uniform selector ignores priorities, so they carry the stamp without changing the trajectory's structure: stock
    TF-Agents clients keep reading and writing the table.
    """
    return 0.0 if acted_at < 0 else _UNSTAMPED + 1.0 + acted_at


def read_stamps(priorities: tf.Tensor) -> tf.Tensor:
    """Returns `acted_at` from priorities of any shape, int64; -1 where no weights acted or nobody stamped."""
    return tf.cast(tf.where(priorities > _UNSTAMPED, priorities - _UNSTAMPED - 1.0, -1.0), tf.int64)


def _can_be_true(sample: reverb.ReplaySample, limits: Sequence[Optional[Between]]) -> tf.Tensor:
    """Returns for each item of a batch, [B, T, ...] each leaf, whether an actor of this experiment can have sent it."""
    is_stamped = sample.info.priority <= make_stamp(MAX_COUNT)  # false of a NaN
    return are_plausible(sample.data, limits) & is_stamped


def _is_ours(sample: reverb.ReplaySample, num_steps: int, limits: Sequence[Optional[Between]]) -> tf.Tensor:
    """Returns whether an item, [T, ...] each leaf, has `num_steps` steps and can be true."""
    lengths = [tf.shape(leaf)[0] for leaf in tree.flatten(sample.data)]
    batch = tree.map_structure(lambda leaf: leaf[None], sample)
    return tf.reduce_all(tf.stack(lengths) == num_steps) & _can_be_true(batch, limits)[0]


class ServerSampledSource:
    """Batches that Reverb sampled, distributed over a strategy's replicas. See `BatchSource`.

    Reverb's server takes whatever a client inserts, and its dataset fails at each item that does not fit. From the
    first one on (see `leave_out`) another dataset is read, which passes over them: to look at each costs time, and it
    would ask again and again a server that refuses for good.
    """

    can_fuse = False  # what is drawn comes out of an iterator

    def __init__(
        self,
        address: str,
        batch_size: int,
        strategy: tf.distribute.Strategy,
        make_dataset: Callable[[bool, tf.distribute.InputContext], tf.data.Dataset],
        is_queue: bool = False,
    ):
        """Args:
        address: The server's.
        batch_size: Windows in one batch, over all replicas together.
        strategy: Whose replicas share a batch.
        make_dataset: Returns a replica's batches; given whether to leave out items that do not fit.
        is_queue: Whether each item comes once: none is drawn to be looked at only.
        """
        self._is_queue = is_queue
        self._address = address
        self._batch_size = batch_size
        self._strategy = strategy
        self._make_dataset = make_dataset
        self.num_chunks = self.num_given_back = 0
        self._samples = 0
        self._first_looks: Optional[FirstLooks] = None
        self._leaves_out = False
        self._dataset = self._distribute()
        self.handle: Any = iter(self._dataset)
        self._meets_strangers: Any = None  # the iterator that failed at one, until it is renewed

    def _distribute(self) -> Any:
        return self._strategy.distribute_datasets_from_function(functools.partial(self._make_dataset, self._leaves_out))

    def restore(self, counts: Mapping[str, Any], on_progress: Callable[[], object] = lambda: None) -> None:
        del on_progress  # nothing is read
        self._samples = counts.get("samples", 0)

    def counts(self) -> dict[str, Any]:
        counts = {"samples": self._samples}
        with contextlib.suppress(Unreachable):
            counts["inserts"] = self._read_table(timeout_secs=1).rate_limiter_info.insert_stats.completed
        return counts

    def draw(self, handle: Any) -> tuple[Any, ...]:
        return next(handle)

    def unpack(self, *parts: Any) -> tuple[Any, tf.Tensor]:
        experience, acted_at, is_first_look = parts
        if self._first_looks is not None:
            self._first_looks.count(experience.observation, is_first_look)
        return experience, acted_at

    def count_observations(self) -> None:
        self._first_looks = FirstLooks(self._strategy, self._dataset.element_spec[0].observation)

    def take_moments(self) -> list[Moments]:
        """Returns the moments of what was drawn for the first time. See `BatchSource.take_moments`."""
        assert self._first_looks is not None, "count_observations first"
        return self._first_looks.take()

    def look_first(self) -> None:
        """Draws some batches that nothing is trained on; they count as samples. See `BatchSource.look_first`."""
        draw = tf.function(lambda handle: self._strategy.run(self.unpack, args=self.draw(handle)))
        while self._samples < NUM_FIRST_LOOKS * self._batch_size and not self._is_queue:
            draw(self.handle)
            self.note_updates(1)

    def standing_still(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def allow(self, num_updates: int) -> int:
        """Returns `num_updates`: the server's rate limiter holds `draw` back when it must."""
        return num_updates

    def note_updates(self, num_updates: int) -> None:
        self._samples += num_updates * self._batch_size

    def await_data(self, secs: float) -> None:
        """Returns at once: `draw` is what waits."""

    def renew(self) -> None:
        self.handle = iter(self._dataset)

    def leave_out(self, error: tf.errors.InvalidArgumentError) -> bool:
        """Returns whether some other client's item made `draw` fail; `renew` then. See `MeetsStrangers.leave_out`."""
        if self.handle is self._meets_strangers:  # its server was away when it was to be renewed
            return True
        if self._leaves_out or not _FROM_THE_ITERATOR.search(error.message):
            return False
        misfit = _MISFIT.search(error.message)
        logging.warning(
            "an item in the table '%s' at %s is not this experiment's: %s. It and all others that do not fit are left "
            "out from here on. Some other client inserts there; keep its port on a network you trust.",
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
        """Returns how the table stands, in figures. See `BatchSource.account`."""
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

    def close(self) -> None:
        """Nothing to close: the dataset ends with the process."""


class WindowSink:
    """Hands each environment's steps to a writer of its own. See `TrajectorySink`."""

    num_chunks = 0

    def __init__(self, writers: Sequence[_EpisodeWriter]):
        self._writers = writers

    def append(self, steps: Any, acted_at: int, crashed: np.ndarray) -> None:
        """Adds one step per environment; never blocks. See `TrajectorySink.append`."""
        for index, writer in enumerate(self._writers):
            if crashed[index]:
                writer.end_episode()
            else:
                writer.append(tree.map_structure(lambda column, row=index: column[row], steps), acted_at)

    def is_blocked(self) -> bool:
        """Returns whether some writer has too much unconfirmed; blocks at most half a second to find out."""
        return any(writer.is_blocked() for writer in self._writers)

    def close(self, timeout_secs: float) -> None:
        """Sends what is pending; gives up, with what is left, after about `timeout_secs` seconds."""
        deadline = time.monotonic() + timeout_secs
        for writer in self._writers:
            writer.close(max(0.0, deadline - time.monotonic()))


class _EpisodeWriter:
    """Writes each run of `num_steps` consecutive steps as one item; no item spans two episodes.

    The items are those of TF-Agents' `ReverbAddTrajectoryObserver(sequence_length=num_steps, stride_length=1)`: an
    episode of N environment steps has N + 1 steps here, the last one its boundary, and gives N + 2 - num_steps items.
    Where windows may end early its boundary is written `num_beyond_end` times more, and each step of it opens an item.
    """

    def __init__(
        self, client: reverb.Client, num_steps: int, num_beyond_end: int, chunk_length: int, max_pending_items: int
    ):
        self._client = client
        self._num_steps = num_steps
        self._num_beyond_end = num_beyond_end
        self._chunk_length = chunk_length
        self._num_kept = num_steps + chunk_length
        self._max_pending_items = max_pending_items
        self._must_end_episode = False
        # validate_items would compare every item in Python; the actor compared the signatures at its start.
        self._writer = self._client.trajectory_writer(num_keep_alive_refs=self._num_kept, validate_items=False)
        self._num_cached = self._num_unflushed = 0
        self._is_configured = False

    def append(self, step: Any, acted_at: int) -> None:
        """Adds one step; never blocks."""
        assert not self._must_end_episode, "append after a blocked boundary: ask is_blocked first"
        if not self._is_configured:
            for path, _ in tree.flatten_with_path(step):
                self._writer.configure(path, num_keep_alive_refs=self._num_kept, max_chunk_length=self._chunk_length)
            self._is_configured = True
        is_last = bool(step.step_type == StepType.LAST)
        for _ in range(1 + (self._num_beyond_end if is_last else 0)):
            self._writer.append(step)
            self._num_cached += 1
            self._num_unflushed += 1
            if self._num_cached >= self._num_steps:
                window = tree.map_structure(lambda column: column[-self._num_steps :], self._writer.history)
                self._writer.create_item(REPLAY_TABLE, priority=make_stamp(acted_at), trajectory=window)
        self._must_end_episode = is_last

    def is_blocked(self) -> bool:
        """Returns whether more than `max_pending_items` are unconfirmed; blocks at most half a second to find out.

        Raises:
          RuntimeError: The server refused an item.
        """
        try:
            if self._must_end_episode:
                self._writer.end_episode(clear_buffers=True, timeout_ms=500)
                self._must_end_episode, self._num_cached, self._num_unflushed = False, 0, 0
            elif self._num_unflushed >= self._max_pending_items:
                # Rarely: each flush closes the chunk under way, and an item of many short chunks is slow to sample.
                self._writer.flush(block_until_num_items=self._max_pending_items, timeout_ms=500)
                self._num_unflushed = 0
        except reverb.errors.DeadlineExceededError:
            return True
        return False

    def end_episode(self) -> None:
        """Lets no window span what comes next; items made before stay valid. `is_blocked` does the work."""
        self._must_end_episode = True

    def close(self, timeout_secs: float) -> None:
        """Sends what is pending; gives up, with what is left, after `timeout_secs` seconds."""
        with contextlib.suppress(reverb.errors.ReverbError, RuntimeError):  # unconfirmed items count for nobody
            self._writer.flush(timeout_ms=max(1, int(timeout_secs * 1000)))  # for Reverb 0 has no end
