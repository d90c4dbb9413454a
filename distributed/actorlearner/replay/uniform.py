"""Server-sampled uniform replay: Reverb's table draws the items; stock TF-Agents clients can write and read it too."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Literal, Optional

import gin
import reverb
import tensorflow as tf
import tree
from tf_agents.specs import tensor_spec

from actorlearner.replay.base import REPLAY_TABLE, read_stamps
from actorlearner.runtime.configuration import NonNegativeInt, PositiveFloat, PositiveInt

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
    max_pending_items: NonNegativeInt = 64

    def check(self, *, batch_size: int, initial_collect_steps: int) -> None:
        """Raises `ValueError` when the table could never hold what training waits for."""
        del batch_size
        if self.rate_limiter != "queue" and self.replay_buffer_capacity < initial_collect_steps:
            raise ValueError(
                f"uniform_replay.replay_buffer_capacity = {self.replay_buffer_capacity:,} is smaller than "
                f"train.initial_collect_steps = {initial_collect_steps:,}: training would never begin. "
                "Raise the first or lower the second."
            )

    def make_tables(
        self, step_spec: Any, *, num_steps: int, batch_size: int, initial_collect_steps: int, samples_per_insert: float
    ) -> list[reverb.Table]:
        """Returns one table of `num_steps`-step items. See `Replay.make_tables`.

        Raises:
          ValueError: `error_buffer` is too small for the ratio.
        """
        # Clients check items of `num_steps` steps against this; the unknown outer dimension is what TF-Agents writes.
        signature = tensor_spec.add_outer_dim(step_spec)
        if self.rate_limiter == "queue":
            return [reverb.Table.queue(REPLAY_TABLE, max_size=self.replay_buffer_capacity, signature=signature)]
        return [
            reverb.Table(
                REPLAY_TABLE,
                sampler=_SELECTORS[self.sampler](),
                remover=_SELECTORS[self.remover](),
                max_size=self.replay_buffer_capacity,
                rate_limiter=self._make_rate_limiter(batch_size, initial_collect_steps, samples_per_insert),
                signature=signature,
            )
        ]

    def _make_rate_limiter(
        self, batch_size: int, initial_collect_steps: int, samples_per_insert: float
    ) -> reverb.rate_limiters.RateLimiter:
        min_size = max(1, initial_collect_steps)
        if self.rate_limiter == "min_size":
            return reverb.rate_limiters.MinSize(min_size)
        ratio = self.samples_per_insert or samples_per_insert
        error_buffer = self.error_buffer or max(100 * ratio, 10 * batch_size)
        if error_buffer < max(1.0, ratio):
            raise ValueError(
                f"uniform_replay.error_buffer = {error_buffer:g} must be at least max(1, samples_per_insert) = "
                f"{max(1.0, ratio):g}, or neither side could ever move. Raise it, or leave it out."
            )
        return reverb.rate_limiters.SampleToInsertRatio(
            samples_per_insert=ratio, min_size_to_sample=min_size, error_buffer=error_buffer
        )

    def make_sink(self, address: str, num_steps: int) -> WindowSink:
        """Returns a writer of overlapping `num_steps`-step items for one environment."""
        return WindowSink(reverb.Client(address), num_steps, self.chunk_length, self.max_pending_items)

    def make_source(
        self, address: str, step_spec: Any, *, num_steps: int, batch_size: int, strategy: tf.distribute.Strategy
    ) -> ServerSampledSource:
        """Returns batches sampled by the server at `address`. See `Replay.make_source`."""

        def make_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
            per_replica = context.get_per_replica_batch_size(batch_size)
            dataset = reverb.TrajectoryDataset(
                address,
                REPLAY_TABLE,
                dtypes=tree.map_structure(lambda spec: spec.dtype, step_spec),
                shapes=tree.map_structure(lambda spec: tf.TensorShape([num_steps]).concatenate(spec.shape), step_spec),
                max_in_flight_samples_per_worker=self.max_in_flight or 2 * batch_size,
                num_workers_per_iterator=1 if self.rate_limiter == "queue" else self.num_workers,
                rate_limiter_timeout_ms=int(self.wait_secs * 1000),
            )
            return (
                dataset.batch(per_replica, drop_remainder=True)
                .map(lambda sample: (sample.data, read_stamps(sample.info.priority)))
                .prefetch(2)
            )

        return ServerSampledSource(strategy, make_dataset)


class ServerSampledSource:
    """Batches that Reverb sampled, distributed over a strategy's replicas. See `BatchSource`."""

    def __init__(self, strategy: tf.distribute.Strategy, make_dataset: Any):
        self._dataset = strategy.distribute_datasets_from_function(make_dataset)
        self.handle = iter(self._dataset)

    def draw(self, handle: Any) -> tuple[Any, tf.Tensor]:
        return next(handle)

    def renew(self) -> None:
        self.handle = iter(self._dataset)


class WindowSink:
    """Writes each run of `num_steps` consecutive steps as one item; no item spans two episodes.

    The items are those of TF-Agents' `ReverbAddTrajectoryObserver(sequence_length=num_steps, stride_length=1)`: an
    episode of N environment steps has N + 1 steps here, the last one its boundary, and gives N + 2 - num_steps items.
    """

    def __init__(self, client: reverb.Client, num_steps: int, chunk_length: int, max_pending_items: int):
        self._client = client
        self._num_steps = num_steps
        self._chunk_length = chunk_length
        self._num_kept = num_steps + chunk_length
        self._max_pending_items = max_pending_items
        self._must_end_episode = False
        self._open()

    def _open(self) -> None:
        # validate_items would compare every item in Python; the actor compared the signatures at its start.
        self._writer = self._client.trajectory_writer(num_keep_alive_refs=self._num_kept, validate_items=False)
        self._num_cached = self._num_unflushed = 0
        self._is_configured = False

    def append(self, step: Any, stamp: float) -> None:
        """Adds one step; never blocks. See `TrajectorySink.append`."""
        assert not self._must_end_episode, "append after a blocked boundary: ask is_blocked first"
        if not self._is_configured:
            for path, _ in tree.flatten_with_path(step):
                self._writer.configure(path, num_keep_alive_refs=self._num_kept, max_chunk_length=self._chunk_length)
            self._is_configured = True
        self._writer.append(step)
        self._num_cached += 1
        self._num_unflushed += 1
        if self._num_cached >= self._num_steps:
            window = tree.map_structure(lambda column: column[-self._num_steps :], self._writer.history)
            self._writer.create_item(REPLAY_TABLE, priority=stamp, trajectory=window)
        self._must_end_episode = bool(step.is_boundary())

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

    def drop_episode(self) -> None:
        """Forgets the steps of the episode under way; items made of them before stay valid."""
        self._must_end_episode = False
        self._open()

    def close(self, timeout_secs: float) -> None:
        """Sends what is pending; gives up, with what is left, after `timeout_secs` seconds."""
        # What the server never confirmed is not counted by anybody.
        with contextlib.suppress(reverb.errors.ReverbError, RuntimeError):
            self._writer.flush(timeout_ms=int(timeout_secs * 1000))
