"""Server-sampled uniform replay: Reverb draws the items; stock TF-Agents clients can also write and read them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Optional

import gin
import reverb
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner.replay.base import Replay, Sampling
from actorlearner.replay.server_sampled import ServerSampledSource, make_dataset
from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.windows import REPLAY_TABLE, EpisodeWriter, WindowSink
from actorlearner.runtime.configuration import PositiveFloat, PositiveInt
from actorlearner.runtime.messages import read_server_info
from actorlearner.runtime.tls.tunnel import reach

_SELECTORS = {
    "uniform": reverb.selectors.Uniform,
    "fifo": reverb.selectors.Fifo,
    "lifo": reverb.selectors.Lifo,
}


@gin.configurable("uniform_replay", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class UniformReplay(Replay):
    """Uniform experience replay (Lin, 1992) in one Reverb table, sampled by the server.

    Attributes:
      replay_buffer_capacity: Items in the table; a two-step window is a transition.
      sampler: Which item is sampled: any ("uniform"), the oldest ("fifo") or the newest ("lifo").
      remover: Which item is removed from a full table: the oldest ("fifo"), the newest ("lifo") or any ("uniform").
      rate_limiter: "sample_to_insert_ratio" keeps samples per insert at the schedule's ratio in both directions (the
        learner waits for actors, actors for the learner); "min_size" only waits for `initial_collect_steps`; "queue"
        hands each item out once, in order.
      samples_per_insert: Overrides the ratio derived from `collect_steps_per_iteration` and `batch_size`.
      error_buffer: Largest deviation from the ratio, in samples; None takes the samples of a hundred inserts.
      num_workers: Number of streams that fetch samples.
      max_in_flight: Items that each stream prefetches; None takes two batches.
      wait_secs: How long the learner waits for a batch, in seconds, before it logs the wait and tries again.
      chunk_length: Steps in one of Reverb's chunks; items share chunks, and few long ones are fastest to sample.
      max_pending_items: Largest number of unconfirmed items of one environment's writer, before it waits for the
        server.
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

    def check(self, *, initial_collect_steps: int) -> None:
        """Raises `ValueError` if the table could never hold what training waits for."""
        if self.rate_limiter != "queue" and self.replay_buffer_capacity < initial_collect_steps:
            raise ValueError(
                f"uniform_replay.replay_buffer_capacity = {self.replay_buffer_capacity:,} is smaller than "
                f"train.initial_collect_steps = {initial_collect_steps:,}: training would never start. "
                "Raise the first or lower the second."
            )

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        """Returns the one table's signature, with the unknown outer dimension that stock TF-Agents clients write."""
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
        # A queue never fills up, because it is emptied meanwhile.
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
                f"{max(1.0, ratio):g}, or neither side could ever proceed. Raise it, or leave it out."
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
                EpisodeWriter(client, sampling.num_steps, num_beyond_end, self.chunk_length, self.max_pending_items)
                for _ in range(sampling.num_environments)
            ]
        )

    def make_source(
        self, servers: ReplayServers, step_spec: Any, sampling: Sampling, strategy: tf.distribute.Strategy
    ) -> ServerSampledSource:
        """Returns batches that the one server samples, keeping the ratio. See `Replay.make_source`."""
        address, batch_size = servers.mine(), sampling.batch_size

        def make_batches(leaves_out: bool, context: tf.distribute.InputContext) -> tf.data.Dataset:
            return make_dataset(
                address,
                step_spec,
                sampling.num_steps,
                context.get_per_replica_batch_size(batch_size),
                leaves_out=leaves_out,
                max_in_flight=self.max_in_flight or 2 * batch_size,
                num_workers=1 if self.rate_limiter == "queue" else self.num_workers,
                wait_secs=self.wait_secs,
            )

        return ServerSampledSource(address, batch_size, strategy, make_batches, is_queue=self.rate_limiter == "queue")
