"""Writes windows as items of a server-sampled table, environment by environment, with the acting weights' stamp."""

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
"""Name of the table; the TF-Agents tutorials' name, so that their clients find it."""

_UNSTAMPED = 1.0  # the priority that stock TF-Agents observers write


def make_stamp(acted_at: int) -> float:
    """Returns the priority of an item whose acting weights are of train step `acted_at`; -1 for the random policy.

    The uniform selector ignores priorities, so they carry the stamp without changing the trajectory's structure: stock
    TF-Agents clients keep reading and writing the table.
    """
    return 0.0 if acted_at < 0 else _UNSTAMPED + 1.0 + acted_at


def read_stamps(priorities: tf.Tensor) -> tf.Tensor:
    """Returns `acted_at` from priorities of any shape, int64; -1 for the random policy and unstamped items."""
    return tf.cast(tf.where(priorities > _UNSTAMPED, priorities - _UNSTAMPED - 1.0, -1.0), tf.int64)


class WindowSink(TrajectorySink):
    """Writes each environment's steps with a writer of its own. See `TrajectorySink`."""

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
        """Returns whether a writer has too many unconfirmed items; takes at most half a second."""
        return any(writer.is_blocked() for writer in self._writers)

    def close(self, timeout_secs: float) -> None:
        """Sends pending items; drops what is left after about `timeout_secs` seconds."""
        deadline = time.monotonic() + timeout_secs
        for writer in self._writers:
            writer.close(max(0.0, deadline - time.monotonic()))


class EpisodeWriter:
    """Writes every `num_steps` consecutive steps as one item; no item spans two episodes.

    The items are those of TF-Agents' `ReverbAddTrajectoryObserver(sequence_length=num_steps, stride_length=1)`: an
    episode of N environment steps has N + 1 steps here, the last one its boundary, and makes N + 2 - num_steps items.
    If windows may end early, the boundary step is written `num_beyond_end` more times, and each step starts an item.
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
        # Without validate_items, which compares every item in Python: the actor compared the signatures at its start.
        self._writer = self._client.trajectory_writer(num_keep_alive_refs=self._num_kept, validate_items=False)
        self._num_cached = self._num_unflushed = 0
        self._is_configured = False

    def append(self, step: Any, acted_at: int) -> None:
        """Adds one step; never blocks."""
        assert not self._must_end_episode, "append after a blocked boundary: call is_blocked first"
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
        """Returns whether more than `max_pending_items` are unconfirmed; takes at most half a second.

        Raises:
          RuntimeError: The server refused an item.
        """
        try:
            if self._must_end_episode:
                self._writer.end_episode(clear_buffers=True, timeout_ms=500)
                self._must_end_episode, self._num_cached, self._num_unflushed = False, 0, 0
            elif self._num_unflushed >= self._max_pending_items:
                # Flush rarely: each flush closes the current chunk, and an item of many short chunks is slow to sample.
                self._writer.flush(block_until_num_items=self._max_pending_items, timeout_ms=500)
                self._num_unflushed = 0
        except reverb.errors.DeadlineExceededError:
            return True
        return False

    def end_episode(self) -> None:
        """Ends the episode, so that no item spans it and the next one; `is_blocked` does the work."""
        self._must_end_episode = True

    def close(self, timeout_secs: float) -> None:
        """Sends pending items; drops what is left after `timeout_secs` seconds."""
        with contextlib.suppress(reverb.errors.ReverbError, RuntimeError):  # unconfirmed items are not counted anywhere
            self._writer.flush(timeout_ms=max(1, int(timeout_secs * 1000)))  # Reverb takes 0 as no timeout
