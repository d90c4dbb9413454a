"""Windows as items of a table that Reverb samples: written one environment at a time, stamped by who acted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import reverb
import tensorflow as tf
import tree
from tf_agents.trajectories import StepType

from actorlearner.replay.base import TrajectorySink

REPLAY_TABLE = "uniform_table"
"""Name of the table; the TF-Agents tutorials' own, so that their clients find it."""

_UNSTAMPED = 1.0  # the priority that stock TF-Agents observers write


def make_stamp(acted_at: int) -> float:
    """Returns the priority of an item whose actions are by weights published at train step `acted_at`; -1 for none.

    The uniform selector ignores priorities, so they carry the stamp without changing the trajectory's structure: stock
    TF-Agents clients keep reading and writing the table.
    """
    return 0.0 if acted_at < 0 else _UNSTAMPED + 1.0 + acted_at


def read_stamps(priorities: tf.Tensor) -> tf.Tensor:
    """Returns `acted_at` from priorities of any shape, int64; -1 where no weights acted or nobody stamped."""
    return tf.cast(tf.where(priorities > _UNSTAMPED, priorities - _UNSTAMPED - 1.0, -1.0), tf.int64)


class WindowSink(TrajectorySink):
    """Hands each environment's steps to a writer of its own. See `TrajectorySink`."""

    def __init__(self, writers: Sequence[EpisodeWriter]):
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


class EpisodeWriter:
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
