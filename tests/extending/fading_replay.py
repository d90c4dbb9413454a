"""A new replay: sampled by the server, and the older the weights that acted, the less a window counts."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import gin
import reverb
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner.replay.base import Batch, Replay, Sampling
from actorlearner.replay.server_sampled import ServerSampledSource, make_dataset
from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.windows import REPLAY_TABLE, EpisodeWriter, WindowSink
from actorlearner.runtime.messages import read_server_info
from actorlearner.runtime.tls.tunnel import reach


@gin.configurable("fading_replay", module="extending")
@dataclasses.dataclass(frozen=True)
class FadingReplay(Replay):
    """One table of windows.

    Attributes:
      capacity: Windows it holds.
      half_life: Train steps after which a window counts half as much as the newest of its batch.
    """

    capacity: int = 10_000
    half_life: float = 100.0

    def warm_up_steps(self, initial_collect_steps: int) -> int:
        return min(initial_collect_steps, self.capacity)

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        return {REPLAY_TABLE: tensor_spec.add_outer_dim(step_spec)}

    def make_tables(self, step_spec: Any, sampling: Sampling) -> list[reverb.Table]:
        limiter = reverb.rate_limiters.SampleToInsertRatio(
            sampling.samples_per_insert,
            min_size_to_sample=max(1, sampling.initial_collect_steps),
            error_buffer=20 * sampling.batch_size,
        )
        signature = self.table_signatures(step_spec)[REPLAY_TABLE]
        uniform, oldest = reverb.selectors.Uniform(), reverb.selectors.Fifo()
        return [reverb.Table(REPLAY_TABLE, uniform, oldest, self.capacity, limiter, signature=signature)]

    def is_warm(self, servers: ReplayServers, initial_collect_steps: int) -> Optional[bool]:
        return read_server_info(servers.mine(), timeout_secs=5)[REPLAY_TABLE].current_size >= initial_collect_steps

    def make_sink(self, servers: ReplayServers, sampling: Sampling) -> WindowSink:
        client = reverb.Client(reach(servers.mine()))
        return WindowSink(
            [EpisodeWriter(client, sampling.num_steps, 0, 16, 64) for _ in range(sampling.num_environments)]
        )

    def make_source(
        self, servers: ReplayServers, step_spec: Any, sampling: Sampling, strategy: tf.distribute.Strategy
    ) -> FadingSource:
        address, batch_size = servers.mine(), sampling.batch_size

        def make_batches(leaves_out: bool, context: tf.distribute.InputContext) -> tf.data.Dataset:
            return make_dataset(
                address,
                step_spec,
                sampling.num_steps,
                context.get_per_replica_batch_size(batch_size),
                leaves_out=leaves_out,
                max_in_flight=2 * batch_size,
                num_workers=1,
                wait_secs=5.0,
            )

        return FadingSource(self.half_life, address, batch_size, strategy, make_batches)


class FadingSource(ServerSampledSource):
    """Gives each window a weight, and counts what the updates say of them."""

    def __init__(self, half_life: float, *arguments: Any):
        super().__init__(*arguments)
        self._half_life = half_life
        self._num_weighted = tf.Variable(0, dtype=tf.int64, trainable=False)

    def unpack(self, *parts: Any) -> Batch:
        batch = super().unpack(*parts)
        age = tf.cast(tf.reduce_max(batch.acted_at) - batch.acted_at, tf.float32)
        return batch._replace(weights=0.5 ** (age / self._half_life), keys=batch.acted_at)

    def after_update(self, batch: Batch, loss_info: Any) -> None:
        assert batch.keys is not None
        tf.debugging.assert_equal(tf.shape(loss_info.extra.td_loss), tf.shape(batch.keys))
        self._num_weighted.assign_add(tf.size(batch.keys, tf.int64))

    def account(self) -> dict[str, Any]:
        return {**super().account(), "weighted": int(self._num_weighted.numpy())}
