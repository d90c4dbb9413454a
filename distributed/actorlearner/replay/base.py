"""What a replay offers to the three roles it joins: tables to the server, writers to actors, batches to the learner."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import reverb
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.runtime.messages import await_server, check_signature, read_server_info

REPLAY_TABLE = "uniform_table"
"""Name of the replay's table; the TF-Agents tutorials' own, so that their clients find it."""

RANDOM_POLICY_STAMP = 0.0
UNSTAMPED = 1.0  # the priority stock TF-Agents observers write
_FIRST_STAMP = 2.0


def make_stamp(train_step: int) -> float:
    """Returns the priority that marks an item as made with the weights published at `train_step` (0, 1, ...).

    The uniform selector ignores priorities, so they carry the stamp without changing the trajectory's structure: stock
    TF-Agents clients keep reading and writing the table.
    """
    return _FIRST_STAMP + train_step


def read_stamps(priorities: tf.Tensor) -> tf.Tensor:
    """Returns train steps from priorities of any shape, int64; -1 where no weights acted or nobody stamped."""
    return tf.cast(tf.where(priorities >= _FIRST_STAMP, priorities - _FIRST_STAMP, -1.0), tf.int64)


@dataclasses.dataclass(frozen=True)
class ReplayAccount:
    """What a replay server says of one table at one moment.

    Attributes:
      size: Items in the table now.
      capacity: Items it holds at most.
      inserts, samples: Items ever inserted and sampled, since the table was made or restored.
      min_size_to_sample: Items needed before the first sample.
      samples_per_insert, min_diff, max_diff: The rate limiter keeps `inserts * samples_per_insert - samples` within.
    """

    size: int
    capacity: int
    inserts: int
    samples: int
    min_size_to_sample: int
    samples_per_insert: float
    min_diff: float
    max_diff: float

    @property
    def can_start(self) -> bool:
        return self.size >= self.min_size_to_sample

    def __str__(self) -> str:
        if not self.can_start:
            return f"{self.size:,} of {self.min_size_to_sample:,} steps collected"
        counts = f"{self.size:,} of {self.capacity:,} steps held, {self.inserts:,} inserted, {self.samples:,} sampled"
        ahead = self.inserts * self.samples_per_insert - self.samples
        if ahead + self.samples_per_insert > self.max_diff:
            return f"{counts}: actors are as far ahead as the rate limiter allows"
        if ahead - 1 < self.min_diff:
            return f"{counts}: the learner is as far ahead as the rate limiter allows"
        return counts


def read_account(address: str, timeout_secs: float = 5.0) -> ReplayAccount:
    """Returns the replay table's account; blocks at most `timeout_secs` seconds.

    Raises:
      Unreachable: The server does not answer within the deadline.
    """
    return account_of(read_server_info(address, timeout_secs)[REPLAY_TABLE])


def account_of(table: Any) -> ReplayAccount:
    """Returns the account in Reverb's `TableInfo` of a replay table."""
    limiter = table.rate_limiter_info
    return ReplayAccount(
        size=table.current_size,
        capacity=table.max_size,
        inserts=limiter.insert_stats.completed,
        samples=limiter.sample_stats.completed,
        min_size_to_sample=limiter.min_size_to_sample,
        samples_per_insert=limiter.samples_per_insert,
        min_diff=limiter.min_diff,
        max_diff=limiter.max_diff,
    )


def await_replay_table(address: str, collect_data_spec: Any, *, stop: Stop, deadline_secs: float) -> None:
    """Returns once the replay server answers and its table holds trajectories of this spec.

    Raises:
      RoleError: It did not answer within `deadline_secs` seconds (UNAVAILABLE), or has no such table (DATA).
      Stopped: `stop` was set.
    """
    tables = await_server("the replay server", address, stop=stop, deadline_secs=deadline_secs)
    if REPLAY_TABLE not in tables:
        raise RoleError(
            f"the Reverb server at {address} has no table '{REPLAY_TABLE}' but {', '.join(sorted(tables)) or 'none'}: "
            "it is not an experiment's replay server. Mend --replay_address.",
            ExitCode.DATA,
        )
    expected = tensor_spec.add_outer_dim(collect_data_spec)
    check_signature(f"table '{REPLAY_TABLE}'", address, tables[REPLAY_TABLE].signature, expected)


class TrajectorySink(Protocol):
    """Takes one environment's steps to the replay server."""

    def append(self, step: Any, stamp: float) -> None:
        """Adds one unbatched `Trajectory` step; the steps of an episode come in order and end with its boundary."""

    def is_blocked(self) -> bool:
        """Returns whether the server holds writes back; the caller decides how long to go on trying."""

    def drop_episode(self) -> None:
        """Forgets the episode under way, as if its last step had never been: its environment crashed."""

    def close(self, timeout_secs: float) -> None:
        """Sends what is pending; blocks at most about `timeout_secs` seconds."""


class BatchSource(Protocol):
    """Hands training batches to the learner's compiled loop."""

    handle: Any
    """Passed to `draw` through the compiled function's arguments, so that replacing it does not retrace."""

    def draw(self, handle: Any) -> tuple[Any, tf.Tensor]:
        """Returns one batch, as `(experience, stamps)` for each replica; called inside a `tf.function`.

        Shapes: B = batch of one replica, T = num_steps. `experience` leaves are [B, T, ...], `stamps` is [B].

        Raises:
          tf.errors.OutOfRangeError: No batch came in time; call `renew` and try again.
        """

    def renew(self) -> None:
        """Makes a new `handle` after `draw` ran dry."""


class Replay(Protocol):
    """A replay as gin binds it; read only."""

    def check(self, *, batch_size: int, initial_collect_steps: int) -> None:
        """Raises `ValueError` when its settings do not fit the schedule's."""

    def make_tables(
        self, step_spec: Any, *, num_steps: int, batch_size: int, initial_collect_steps: int, samples_per_insert: float
    ) -> list[reverb.Table]:
        """Returns the server's tables for trajectories of `step_spec`."""

    def make_sink(self, address: str, num_steps: int) -> TrajectorySink:
        """Returns a writer for one environment's steps."""

    def make_source(
        self, address: str, step_spec: Any, *, num_steps: int, batch_size: int, strategy: tf.distribute.Strategy
    ) -> BatchSource:
        """Returns the learner's side; `batch_size` is the global one."""
