"""Mirror: a ring of steps in the learner's device memory, and the windows in it that may be drawn.

Has no servers and no threads; `resident.py` fills it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf
import tree
from tf_agents.trajectories import StepType


class Mirror:
    """Steps and the valid windows among them, in variables that the compiled loop reads; the oldest leave first.

    One ring holds step rows, another the rows at which a window starts. A chunk leaves as a whole.

    Two sides use it. One thread at a time writes chunks into rows that no drawable window uses, even while a compiled
    call draws. Between two calls the learner's loop reveals the written chunks to the next call, and makes room. If XLA
    compiled the call, it holds the locks of the variables it reads until it ends (seen on a CPU); a chunk then waits
    until the call has ended.

    Rows and windows are numbered from the first one ever written; a number modulo `_num_rows` is the place in the ring.
    """

    def __init__(
        self,
        step_spec: Any,
        num_steps: int,
        capacity: int,
        device: str = "/cpu:0",
        *,
        windows_may_end_early: bool = False,
    ):
        """Args:
        step_spec: Spec of one trajectory step.
        num_steps: Steps in a window.
        capacity: Largest number of windows.
        device: Where the variables live: the device that draws from them.
        windows_may_end_early: See `Sampling`.
        """
        self.num_steps = num_steps
        self._windows_may_end_early = windows_may_end_early
        self._capacity = capacity
        self._num_rows = _num_rows_for(num_steps, capacity)
        self._spec = {"acted_at": tf.TensorSpec((), tf.int64), "step": step_spec}
        self._device = device
        with tf.device(device):
            self._rows = [
                tf.Variable(tf.zeros([self._num_rows, *spec.shape], _held_dtype(spec.dtype)), trainable=False)
                for spec in tf.nest.flatten(self._spec)
            ]
            # As many places as rows, so that room for a chunk's rows is room for its windows.
            self._starts = tf.Variable(tf.zeros([self._num_rows], tf.int64), trainable=False)
            # Numbers of the first window and of the one after the last; one variable, because each assignment is slow.
            self._bounds = tf.Variable([0, 0], dtype=tf.int64, trainable=False)
        # Used by the writing thread: rows and windows written so far, and rows that still need room.
        self._next_row = self._next_window = 0
        self._num_wanted_rows = 0
        # Written but not revealed, then revealed, oldest first: (row after the last, number of windows) of each chunk.
        self._written: collections.deque[tuple[int, int]] = collections.deque()
        self._chunks: collections.deque[tuple[int, int]] = collections.deque()
        self._oldest_row = 0  # rows before it may be overwritten
        self._first_window = 0
        self.num_windows = 0
        int64 = tf.TensorSpec((), tf.int64)
        blocks = [tf.TensorSpec([None, *variable.shape[1:]], variable.dtype) for variable in self._rows]
        # A concrete function with flat positional arguments: a list would cost several times as much at every call.
        self._write = tf.function(self._write_block, autograph=False).get_concrete_function(
            int64, int64, tf.TensorSpec([None], tf.int64), *blocks
        )

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    @staticmethod
    def num_bytes_for(step_spec: Any, num_steps: int, capacity: int) -> int:
        """Returns the memory that a mirror takes, in bytes."""
        row = sum(int(np.prod(spec.shape)) * _held_dtype(spec.dtype).size for spec in tf.nest.flatten(step_spec))
        return (row + 2 * tf.int64.size) * _num_rows_for(num_steps, capacity)

    def make_block(self, chunk: Mapping[str, Any]) -> Block:
        """Returns a chunk in the form that `write` takes, with its rows on this mirror's device. Thread-safe.

        Raises:
          ValueError: It is larger than the mirror.
        """
        length = int(chunk["length"])
        ends_run = chunk["ends_run"][:, :length]
        num_environments = len(ends_run)
        is_last = chunk["step"].step_type[:, :length] == StepType.LAST if self._windows_may_end_early else None
        is_start = find_starts(ends_run, self.num_steps, is_last)
        acted_at = np.broadcast_to(chunk["acted_at"], chunk["ends_run"].shape)
        leaves = [leaf[:, :length] for leaf in tf.nest.flatten({"acted_at": acted_at, "step": chunk["step"]})]
        lanes, steps = np.nonzero(is_start)
        num_rows = num_environments * length
        if len(lanes) > self._capacity or num_rows > self._num_rows:
            raise ValueError(
                f"a chunk of {len(lanes):,} windows in {num_rows:,} steps does not fit into a replay of "
                f"{self._capacity:,} windows. Raise resident_replay.replay_buffer_capacity."
            )
        with tf.device(self._device):
            rows = [
                tf.cast(leaf.reshape(-1, *leaf.shape[2:]), variable.dtype) for leaf, variable in zip(leaves, self._rows)
            ]
        return Block(rows, num_rows, lanes * length + steps)

    def has_room(self, block: Block, *, more_follow: bool = False) -> bool:
        """Returns whether `write` may be called; if not, the next `reveal` makes room. For the writing thread.

        With `more_follow` it asks for room for at least a hundredth of the mirror, or four such chunks: a compiled call
        takes long, and with room for one chunk the others would wait for the next call.
        """
        has_room = self._next_row + block.num_rows - self._oldest_row <= self._num_rows
        self._num_wanted_rows = 0 if has_room else block.num_rows
        if more_follow and not has_room:
            at_most = max(block.num_rows, self._num_rows // 20)
            self._num_wanted_rows = min(at_most, max(4 * block.num_rows, self._num_rows // 100))
        return has_room

    def write(self, block: Block) -> int:
        """Copies a chunk's rows and windows into free rows, and returns the number of its first row.

        `has_room` must have returned True.
        """
        first_row, self._next_row = self._next_row, self._next_row + block.num_rows
        starts = (first_row + block.starts) % self._num_rows
        self._write(
            # NumPy ints: TensorFlow caches one tensor per Python int.
            tf.constant(np.int64(first_row % self._num_rows)),
            tf.constant(np.int64(self._next_window % self._num_rows)),
            tf.convert_to_tensor(starts, tf.int64),
            *block.rows,
        )
        self._next_window += len(starts)
        self._written.append((self._next_row, len(starts)))
        return first_row

    def holds(self, first_row: int) -> bool:
        """Returns whether the chunk written at `first_row` is still held."""
        return first_row >= self._oldest_row

    def read(self, first_row: int, num_rows: int) -> dict[str, Any]:
        """Returns written rows, as tensors {acted_at: [num_rows], step: [num_rows, ...]}.

        Nothing may be written until it returns.
        """
        positions = tf.constant(np.arange(first_row, first_row + num_rows) % self._num_rows)
        leaves = [
            tf.cast(tf.gather(variable, positions), spec.dtype)
            for variable, spec in zip(self._rows, tf.nest.flatten(self._spec))
        ]
        return dict(tf.nest.pack_sequence_as(self._spec, leaves))

    def _write_block(self, first_row: tf.Tensor, first: tf.Tensor, starts: tf.Tensor, *rows: tf.Tensor) -> None:
        positions = (first_row + tf.range(tf.shape(rows[0], tf.int64)[0], dtype=tf.int64)) % self._num_rows
        for variable, block in zip(self._rows, rows):
            variable.scatter_nd_update(positions[:, None], block)
        windows = (first + tf.range(tf.shape(starts, tf.int64)[0], dtype=tf.int64)) % self._num_rows
        self._starts.scatter_nd_update(windows[:, None], starts)

    def reveal(self) -> tuple[int, int]:
        """Makes written chunks drawable and drops the oldest; returns the number of revealed chunks and windows.

        Call it between two compiled calls.
        """
        num_chunks = num_windows = 0
        while self._written:
            chunk = self._written.popleft()
            self._chunks.append(chunk)
            num_chunks, num_windows = num_chunks + 1, num_windows + chunk[1]
        self.num_windows += num_windows
        end_row = self._next_row + self._num_wanted_rows
        num_evicted = 0
        while self._chunks and (self.num_windows > self._capacity or end_row - self._oldest_row > self._num_rows):
            self._oldest_row, num_left = self._chunks.popleft()
            self.num_windows -= num_left
            num_evicted += num_left
        if num_windows or num_evicted:
            self._first_window += num_evicted
            bounds = np.array([self._first_window, self._first_window + self.num_windows])
            self._bounds.assign(bounds, read_value=False)
        return num_chunks, num_windows

    def add(self, block: Block) -> None:
        """Writes and reveals a chunk, for use from a single thread."""
        if not self.has_room(block):
            self.reveal()
            assert self.has_room(block)
        self.write(block)
        self.reveal()

    def draw(self, batch_size: int) -> tuple[Any, tf.Tensor]:
        """Returns windows drawn uniformly, with replacement, as `(experience, acted_at)`; for compiled code.

        Shapes: B = batch_size, T = num_steps. `experience` leaves are [B, T, ...]; `acted_at` is [B], of each window's
          first step.
        """
        first, end = tf.unstack(self._bounds)
        windows = tf.random.uniform([batch_size], first, end, tf.int64)
        return self.gather(windows)

    def gather(self, windows: tf.Tensor) -> tuple[Any, tf.Tensor]:
        """Returns the windows with these numbers, which `draw` chooses."""
        starts = tf.gather(self._starts, windows % self._num_rows)
        rows = (starts[:, None] + tf.range(self.num_steps, dtype=tf.int64)) % self._num_rows
        drawn = [
            tf.cast(tf.gather(variable, rows), spec.dtype)
            for variable, spec in zip(self._rows, tf.nest.flatten(self._spec))
        ]
        packed = tf.nest.pack_sequence_as(self._spec, drawn)
        return packed["step"], packed["acted_at"][:, 0]


@dataclasses.dataclass(frozen=True)
class Block:
    """A chunk's rows, one tensor [num_rows, ...] per leaf, and the rows at which a window starts."""

    rows: Sequence[tf.Tensor]
    num_rows: int
    starts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a chunk is: its mirror, its rows, and the server it came from."""

    mirror: Mirror
    first_row: int
    length: int
    ends_run: np.ndarray  # as it was sent: [num_environments, rows of a full chunk]
    address: str

    def is_held(self) -> bool:
        """Returns whether the mirror still holds the chunk."""
        return self.mirror.holds(self.first_row)

    def read(self) -> dict[str, Any]:
        """Returns the chunk's rows, for `unfold`. Nothing may be written to the mirror until it returns."""
        return self.mirror.read(self.first_row, len(self.ends_run) * self.length)

    def unfold(self, number: int, held: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the chunk with this number as it was sent, made from the rows that `read` returned."""
        num_environments, num_rows = self.ends_run.shape

        def unfold(leaf: tf.Tensor) -> np.ndarray:
            rows = leaf.numpy()
            whole = np.zeros((num_environments, num_rows, *rows.shape[1:]), rows.dtype)
            whole[:, : self.length] = rows.reshape(num_environments, self.length, *rows.shape[1:])
            return whole

        return {
            "acted_at": unfold(held["acted_at"])[0],
            "chunk": np.int64(number),
            "ends_run": self.ends_run,
            "length": np.int64(self.length),
            "step": tree.map_structure(unfold, held["step"]),
        }


def find_starts(ends_run: np.ndarray, num_steps: int, is_last: Optional[np.ndarray] = None) -> np.ndarray:
    """Returns at which steps a window starts, as [num_environments, num_rows - num_steps + 1].

    Args:
      ends_run: [num_environments, num_rows]: whether the next step does not follow from this one.
      num_steps: Steps in a window.
      is_last: [num_environments, num_rows]: whether a step is the last of its episode, if windows may end early; None
        if only whole windows count. A window with a crash never counts.
    """
    num_environments, num_rows = ends_run.shape
    is_start = np.ones((num_environments, max(0, num_rows - num_steps + 1)), bool)
    has_ended = np.zeros_like(is_start)
    for ahead in range(num_steps - 1):
        steps = slice(ahead, ahead + is_start.shape[1])
        if is_last is not None and ahead:
            has_ended |= is_last[:, steps]
        is_start &= ~ends_run[:, steps] | has_ended
    return is_start


def _num_rows_for(num_steps: int, capacity: int) -> int:
    # Full chunks overlap by at most a third of their length; the end of an episode costs some more rows.
    return int(1.1 * capacity * 3 * num_steps / (2 * num_steps + 1)) + 1_000


def _held_dtype(dtype: tf.DType) -> tf.DType:
    return tf.int64 if dtype == tf.int32 else dtype  # TensorFlow keeps a GPU's int32 variables in host memory
