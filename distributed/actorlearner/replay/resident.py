"""Resident replay: the learner keeps the replay beside its compute and draws batches inside the compiled loop.

collect actors --chunks--> [stream, a queue] --> learner's mirror --windows--> agent.train
               \\--chunks--> [experience, durable] --> refills the mirror of a restarted learner
                                              <-- the learner refills a restarted server

Each of several replay servers has both tables. An actor writes to one; the learner reads all.
`chunks.py` defines a chunk.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Optional

import gin
import reverb
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner.replay.base import Replay, Sampling
from actorlearner.replay.chunk_checks import MAX_OF_OWN, ChunkCheck
from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE, ChunkSink
from actorlearner.replay.mirror import Mirror
from actorlearner.replay.pace import Free, Pace, TakingTurns
from actorlearner.replay.resident_source import ResidentSource
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.configuration import PositiveFloat, PositiveInt
from actorlearner.runtime.devices import compute_devices, free_host_bytes
from actorlearner.runtime.lifecycle import ExitCode, RoleError


@gin.configurable("resident_replay", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class ResidentReplay(Replay):
    """Uniform experience replay (Lin, 1992) held by the learner, mirrored by a table on the server.

    Attributes:
      replay_buffer_capacity: Largest number of windows in the mirror; a two-step window is a transition.
      samples_per_insert: Overrides the ratio derived from `collect_steps_per_iteration` and `batch_size`.
      error_buffer: Largest deviation from the ratio, in samples; None takes the samples of one compiled call.
      chunk_length: Steps in a full chunk, over all environments; at least three windows' length for each environment.
      chunk_secs: A chunk with at least half the windows of a full one is sent after this time, in seconds. Emptier ones
        are sent after `MAX_CHUNK_SECS`, because the durable table has room for only so many chunks: where steps take
        longer than half a second, lower `chunk_length`, or a restarted learner gets back only a part of its replay.
      stream_length: Chunks that wait in the queue; when it is full, actors wait.
    """

    replay_buffer_capacity: PositiveInt = 100_000
    samples_per_insert: Optional[PositiveFloat] = None
    error_buffer: Optional[PositiveFloat] = None
    chunk_length: PositiveInt = 100
    chunk_secs: PositiveFloat = 1.0
    stream_length: PositiveInt = 4

    def check(self, *, initial_collect_steps: int) -> None:
        """Raises `ValueError` if the mirror could never hold what training waits for."""
        if self.replay_buffer_capacity < initial_collect_steps:
            raise ValueError(
                f"resident_replay.replay_buffer_capacity = {self.replay_buffer_capacity:,} is smaller than "
                f"train.initial_collect_steps = {initial_collect_steps:,}: training would never start. "
                "Raise the first or lower the second."
            )

    can_spread = True

    def pace(self, lock_step: bool) -> Pace:
        """Returns lock-step if asked, because its draws are reproducible. See `Replay.pace`."""
        return TakingTurns() if lock_step else Free()

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        """Returns what each table of this replay holds, by table name."""
        signature = {
            "acted_at": tf.TensorSpec((None,), tf.int64),
            "chunk": tf.TensorSpec((), tf.int64),
            "ends_run": tf.TensorSpec((None, None), tf.bool),
            "length": tf.TensorSpec((), tf.int64),
            "step": tensor_spec.add_outer_dim(tensor_spec.add_outer_dim(step_spec)),
        }
        return {EXPERIENCE_TABLE: signature, STREAM_TABLE: signature}

    def make_tables(self, step_spec: Any, sampling: Sampling) -> list[reverb.Table]:
        """Returns the queue and the durable table. See `Replay.make_tables`."""
        signatures = self.table_signatures(step_spec)
        return [
            reverb.Table.queue(STREAM_TABLE, max_size=self.stream_length, signature=signatures[STREAM_TABLE]),
            reverb.Table(
                EXPERIENCE_TABLE,
                sampler=reverb.selectors.Uniform(),
                remover=reverb.selectors.Fifo(),
                max_size=self._num_durable_chunks(sampling),
                rate_limiter=reverb.rate_limiters.MinSize(1),
                signature=signatures[EXPERIENCE_TABLE],
            ),
        ]

    def _num_rows(self, sampling: Sampling) -> int:
        """Returns the number of steps of each environment in a full chunk."""
        return max(3 * sampling.num_steps, math.ceil(self.chunk_length / sampling.num_environments))

    def _num_durable_chunks(self, sampling: Sampling) -> int:
        """Returns the durable table's size, twice the mirror's: short episodes and slow environments half-fill it."""
        windows_per_chunk = sampling.num_environments * (self._num_rows(sampling) - sampling.num_steps + 1)
        return math.ceil(2 * self.replay_buffer_capacity / windows_per_chunk)

    def _make_check(self, step_spec: Any, sampling: Sampling, capacity: int) -> ChunkCheck:
        own = sampling.num_environments * self._num_rows(sampling)
        # larger ones do not fit into the mirror
        return ChunkCheck(step_spec, max(own, min(MAX_OF_OWN * own, capacity)))

    def make_sink(self, servers: ReplayServers, sampling: Sampling) -> ChunkSink:
        """Returns a writer of chunks. See `Replay.make_sink`."""
        return ChunkSink(
            servers,
            sampling.num_steps,
            sampling.num_environments,
            self._num_rows(sampling),
            math.inf if sampling.pace.sends_whole_chunks_only else self.chunk_secs,
            sampling.windows_may_end_early,
        )

    def make_source(
        self, servers: ReplayServers, step_spec: Any, sampling: Sampling, strategy: tf.distribute.Strategy
    ) -> ResidentSource:
        """Returns the mirror, divided over the replicas' devices, with a thread that reads each server's queue.

        Raises:
          RoleError: It does not fit (USAGE).
        """
        devices = compute_devices(strategy)
        capacity = math.ceil(self.replay_buffer_capacity / len(devices))
        num_bytes = Mirror.num_bytes_for(step_spec, sampling.num_steps, capacity)
        logging.info(
            "the resident replay holds %s transitions (windows of %d steps): %.1f MB on each of %s",
            f"{self.replay_buffer_capacity:,}",
            sampling.num_steps,
            num_bytes / 1e6,
            ", ".join(devices),
        )
        if "cpu" in devices[0].lower():
            self._check_fits(num_bytes * len(devices), free_host_bytes(), "the host")
        try:
            mirrors = [
                Mirror(
                    step_spec,
                    sampling.num_steps,
                    capacity,
                    device,
                    windows_may_end_early=sampling.windows_may_end_early,
                )
                for device in devices
            ]
        except tf.errors.ResourceExhaustedError as error:
            self._check_fits(num_bytes, 0, devices[0])
            raise AssertionError from error
        ratio = self.samples_per_insert or sampling.samples_per_insert
        return ResidentSource(
            servers,
            mirrors,
            batch_size=sampling.batch_size,
            initial_collect_steps=sampling.initial_collect_steps,
            samples_per_insert=ratio,
            error_buffer=self.error_buffer or max(sampling.num_updates_per_call * sampling.batch_size, ratio),
            num_durable_chunks=self._num_durable_chunks(sampling),
            check=self._make_check(step_spec, sampling, capacity),
        )

    def _check_fits(self, num_bytes: int, free: int, where: str) -> None:
        if num_bytes > free:
            raise RoleError(
                f"resident_replay.replay_buffer_capacity = {self.replay_buffer_capacity:,} takes {num_bytes / 1e9:.1f} "
                f"GB of memory, more than is free on {where}"
                + (f": {free / 1e9:.1f} GB" if free else "")
                + ". Lower it, or let the server hold and sample it: experiment.replay = @uniform_replay().",
                ExitCode.USAGE,
            )
