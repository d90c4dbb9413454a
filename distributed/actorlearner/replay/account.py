"""The samples-per-insert account of the resident replay, exact across restarts of either side.

ahead = (inserts - initial_collect_steps) * samples_per_insert - samples
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from actorlearner.replay.tables import describe_account

MAX_KNOWN_CHUNKS = 100_000
"""Number of chunk numbers that are remembered, so that no chunk is counted twice."""


class Account:
    """Counts inserted and sampled windows, and their chunks. Callers that change it hold a lock."""

    def __init__(self, *, batch_size: int, initial_collect_steps: int, samples_per_insert: float, error_buffer: float):
        """Args:
        batch_size: Windows in one update, over all replicas together.
        initial_collect_steps: Windows inserted before training starts.
        samples_per_insert: The ratio to keep.
        error_buffer: Largest deviation from the ratio, in samples.
        """
        self._batch_size = batch_size
        self._initial_collect_steps = initial_collect_steps
        self._samples_per_insert = samples_per_insert
        self.error_buffer = error_buffer
        self._inserts = self._samples = 0
        self.num_staged = 0
        """Windows received that cannot be drawn yet."""
        self._known_chunks: dict[int, bool] = {}  # number -> whether received too; counted as inserts, oldest first
        self._counted_before = 0  # restored chunks with lower numbers count as inserts already

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Restores a checkpoint's counts; without one, all chunks are new."""
        # The checkpoint has counted the chunks it knew; those that reached a server later are inserts too. Without a
        # checkpoint all are: what an earlier learner received still counts for the warm-up.
        self._known_chunks = dict.fromkeys(reversed(_unpack_ids(counts.get("chunks", ""))), False)
        self._counted_before = counts.get("counted_before", 0)
        self._inserts = counts.get("inserts", 0)
        self._samples = counts.get("samples", 0)

    def counts(self, max_chunks: int) -> dict[str, Any]:
        """Returns what a checkpoint stores; of the chunks the newest `max_chunks`, as many as servers can restore."""
        # The newest chunks.
        known = heapq.nlargest(max_chunks, reversed(self._known_chunks))
        # Numbers grow with time. Older chunks than the listed ones count as inserts already: a restarted server may
        # bring back chunks from before those that it lost.
        are_all = len(known) < max_chunks
        counted_before = self._counted_before if are_all else max(self._counted_before, known[-1])
        return {
            "inserts": self._inserts + self.num_staged,
            "samples": self._samples,
            "chunks": _pack_ids(known),
            "counted_before": counted_before,
        }

    def has_taken_in(self, number: int) -> bool:
        return self._known_chunks.get(number, False)

    def is_new(self, number: int, from_actor: bool) -> bool:
        """Returns whether a chunk adds inserts, because no checkpoint has counted it.

        Args:
          number: Number of the chunk.
          from_actor: Whether an actor sent it just now; otherwise a server restored it.
        """
        # The bound applies only to restored chunks: an actor whose clock is behind keeps sending low numbers.
        return number not in self._known_chunks and (from_actor or number >= self._counted_before)

    def take_in(self, number: int, num_windows: int, is_new: bool, max_chunks: int) -> None:
        """Counts a chunk that was received and cannot be drawn yet.

        Args:
          number: Number of the chunk.
          num_windows: Windows in it.
          is_new: Result of `is_new` for it.
          max_chunks: At least this many chunks are remembered.
        """
        self._known_chunks[number] = True
        if len(self._known_chunks) > max(MAX_KNOWN_CHUNKS, max_chunks):
            forgotten = next(iter(self._known_chunks))
            del self._known_chunks[forgotten]
            self._counted_before = max(self._counted_before, forgotten + 1)
        self.num_staged += num_windows
        if not is_new:  # the checkpoint has counted it, so the sum of the two stays the same
            self._inserts -= num_windows

    def reveal(self, num_windows: int) -> None:
        """Counts windows that become drawable now."""
        self._inserts += num_windows
        self.num_staged -= num_windows

    def note_updates(self, num_updates: int) -> None:
        """Counts the samples of `num_updates` updates."""
        self._samples += num_updates * self._batch_size

    def is_warm(self) -> bool:
        """Returns whether training may start, or has started."""
        return self._samples > 0 or self._inserts >= self._initial_collect_steps

    def num_updates_allowed(self) -> int:
        """Returns how many updates may be made now."""
        # Count only drawable windows: the reader's progress depends on the clock, and taking turns must not.
        spare = self.ahead(self._inserts) + self.error_buffer
        return max(0, int(spare // self._batch_size))

    def ahead(self, inserts: Optional[int] = None) -> float:
        """Returns the samples that `inserts` (default: all so far) allow, minus those made."""
        inserts = self._inserts + self.num_staged if inserts is None else inserts
        return (inserts - self._initial_collect_steps) * self._samples_per_insert - self._samples

    def are_actors_ahead(self) -> bool:
        """Returns whether actors must wait for the learner."""
        return self.ahead() > self.error_buffer

    def figures(self) -> dict[str, Any]:
        """Returns the account for people and tools. See `BatchSource.account`."""
        return {
            "inserts": self._inserts + self.num_staged,
            "samples": self._samples,
            "ahead": self.ahead(),
            "error_buffer": self.error_buffer,
        }

    def describe(self, held: int) -> str:
        """Returns the account in words, with `held` windows in the replay."""
        return describe_account(
            held,
            self._inserts,
            self._samples,
            needed=self._initial_collect_steps,
            ahead=self.ahead(),
            least=self._batch_size - self.error_buffer,
            most=self.error_buffer,
        )


def _pack_ids(numbers: Sequence[int]) -> str:
    return base64.b64encode(np.array(numbers, np.int64).tobytes()).decode()


def _unpack_ids(text: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), np.int64).tolist()
