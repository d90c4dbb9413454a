"""Chunks: consecutive steps of all of one actor's environments, and how an actor writes them.

A chunk is [num_environments, length, ...]. It is self-contained: it starts with the last `num_steps - 1` steps of the
previous one, so each window of an episode lies in exactly one chunk, as it is exactly one item in a stock TF-Agents
table.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import Any

import numpy as np
import reverb
import tree
from tf_agents.trajectories import StepType

from actorlearner.replay.base import TrajectorySink
from actorlearner.replay.mirror import find_starts
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.tls.tunnel import reach

STREAM_TABLE = "stream"
EXPERIENCE_TABLE = "experience"

MAX_CHUNK_SECS = 30.0
"""A chunk is sent after this time, in seconds, however few steps it has: the learner waits for it."""


class ChunkSink(TrajectorySink):
    """Writes the steps of one actor's environments as chunks. See `TrajectorySink`.

    Each chunk goes to the server that is the actor's own at that moment. If that changes before the chunk is confirmed,
    it is also sent to the new one, under the same number: the learner leaves out duplicates.
    """

    def __init__(
        self,
        servers: ReplayServers,
        num_steps: int,
        num_environments: int,
        num_rows: int,
        chunk_secs: float,
        windows_may_end_early: bool = False,
    ):
        self.num_chunks = 0
        self._num_steps = num_steps
        self._num_environments = num_environments
        self._num_rows = num_rows
        self._chunk_secs = chunk_secs
        self._servers = servers
        self._address = servers.mine()
        self._writer = _make_writer(self._address)
        self._columns: Any = None  # leaves of a chunk, [num_rows, num_environments, ...]
        self._acted_at = np.zeros(num_rows, np.int64)
        self._ends_run = np.zeros((num_rows, num_environments), bool)
        # Which rows end an episode, for windows that may end early.
        self._is_last = np.zeros((num_rows, num_environments), bool) if windows_may_end_early else None
        self._length = 0  # rows filled; a new chunk starts with the last rows of the previous one
        self._opened_at = 0.0
        self._sending: Any = None  # the chunk that the server has not confirmed yet

    def append(self, steps: Any, acted_at: int, crashed: np.ndarray) -> None:
        """Adds one step per environment; sends the chunk when it is full, or half full and old."""
        assert self._sending is None, "append while blocked: call is_blocked first"
        now = time.monotonic()
        leaves = tree.flatten(steps)
        if self._columns is None:
            self._structure = steps
            self._columns = [np.zeros((self._num_rows, *leaf.shape), leaf.dtype) for leaf in leaves]
        if not self._length:
            self._opened_at = now
        row = self._length
        for column, leaf in zip(self._columns, leaves):
            column[row] = leaf
        self._acted_at[row] = acted_at
        np.equal(steps.step_type, StepType.LAST, out=self._ends_run[row])
        if self._is_last is not None:
            self._is_last[row] = self._ends_run[row]
        if crashed.any():
            self._ends_run[row] |= crashed  # no window may span the crash: neither from this row ...
            if row:
                self._ends_run[row - 1] |= crashed  # ... nor into it
        self._length += 1
        if self._length == self._num_rows or self._is_due(now - self._opened_at):
            self._send()
            self._opened_at = now

    def _is_due(self, age_secs: float) -> bool:
        if age_secs <= self._chunk_secs or self._length < self._num_steps:
            return False
        most = self._num_environments * (self._num_rows - self._num_steps + 1)
        is_last = None if self._is_last is None else self._is_last[: self._length].T
        num_windows = np.count_nonzero(find_starts(self._ends_run[: self._length].T, self._num_steps, is_last))
        return 2 * num_windows >= most or age_secs > max(self._chunk_secs, MAX_CHUNK_SECS)

    def _send(self) -> None:
        length, kept = self._length, self._num_steps - 1
        # Send whole arrays, though only `length` rows count: the shapes of a writer's columns must not change.
        columns = [np.ascontiguousarray(np.swapaxes(column, 0, 1)) for column in self._columns]
        # Numbers are times, so that a restarted learner knows the oldest chunks; the last bits tell actors apart.
        number = (time.time_ns() & ~0xFFFF) | secrets.randbits(16)
        self._sending = {
            "acted_at": self._acted_at.copy(),
            "chunk": np.int64(number),
            "ends_run": np.ascontiguousarray(self._ends_run.T),
            "length": np.int64(length),
            "step": tree.unflatten_as(self._structure, columns),
        }
        self._write()
        is_last = [] if self._is_last is None else [self._is_last]
        for array in (*self._columns, self._acted_at, self._ends_run, *is_last):
            array[:kept] = array[length - kept : length].copy()
        self._length = kept
        self.num_chunks += 1

    def _write(self) -> None:
        address = self._servers.mine()
        if address != self._address:
            logging.info("switching to the replay server at %s", address)
            # If its server is away, closing takes about a second; its unsent data is sent to the new server.
            threading.Thread(target=self._writer.close, name="closing writer", daemon=True).start()
            self._address, self._writer = address, _make_writer(address)
        self._writer.append(self._sending)
        trajectory = tree.map_structure(lambda column: column[-1], self._writer.history)
        # First the durable table: what the learner gets must be there for its restart.
        for table in (EXPERIENCE_TABLE, STREAM_TABLE):
            self._writer.create_item(table, priority=1.0, trajectory=trajectory)

    def is_blocked(self) -> bool:
        """Returns whether the queue has not accepted the last chunk. See `TrajectorySink.is_blocked`."""
        if self._sending is None:
            return False
        try:
            self._writer.flush(timeout_ms=500)
        except reverb.errors.DeadlineExceededError:
            if self._servers.mine() != self._address:
                self._write()
            return True
        self._sending = None
        return False

    def close(self, timeout_secs: float) -> None:
        """Sends the unfinished chunk if the previous one was accepted; blocks at most `timeout_secs` seconds."""
        if self._sending is None and self._length >= self._num_steps:
            self._send()
        if self._sending is not None:
            try:
                self._writer.flush(timeout_ms=int(timeout_secs * 1000))
                self._sending = None
            except (reverb.errors.ReverbError, RuntimeError):
                logging.debug("the last chunk was not confirmed")


def _make_writer(address: str) -> reverb.TrajectoryWriter:
    return reverb.Client(reach(address)).trajectory_writer(num_keep_alive_refs=1, validate_items=False)
