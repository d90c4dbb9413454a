"""The account of samples per insert that resident replay keeps, exact over restarts of either side.

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
"""How many chunks are remembered, so that none is counted twice."""


class Account:
    """Counts windows inserted and sampled, and the chunks that brought them. Whoever changes it holds a lock."""

    def __init__(self, *, batch_size: int, initial_collect_steps: int, samples_per_insert: float, error_buffer: float):
        """Args:
        batch_size: Windows in one update, over all replicas together.
        initial_collect_steps: Windows inserted before training begins.
        samples_per_insert: The ratio to keep.
        error_buffer: How many samples it may be off.
        """
        self._batch_size = batch_size
        self._initial_collect_steps = initial_collect_steps
        self._samples_per_insert = samples_per_insert
        self.error_buffer = error_buffer
        self._inserts = self._samples = 0
        self.num_staged = 0
        """Windows taken in that cannot be drawn yet."""
        self._known_chunks: dict[int, bool] = {}  # counted as inserts, oldest first: whether they were taken in too
        self._counted_before = 0  # what servers bring back with lower numbers is counted as inserts, known or not

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's counts; without any, all chunks are new."""
        # The checkpoint counts the chunks it knew; those that came to a server later are inserts as well. Without a
        # checkpoint all are: what a learner before this one was sent still counts for the warm-up.
        self._known_chunks = dict.fromkeys(reversed(_unpack_ids(counts.get("chunks", ""))), False)
        self._counted_before = counts.get("counted_before", 0)
        self._inserts = counts.get("inserts", 0)
        self._samples = counts.get("samples", 0)

    def counts(self, max_chunks: int) -> dict[str, Any]:
        """Returns what a checkpoint keeps; of the chunks the newest `max_chunks`, as many as servers can bring back."""
        # From the newest on, which is quick.
        known = heapq.nlargest(max_chunks, reversed(self._known_chunks))
        # Numbers grow with time. What is older than those that are listed is counted: a server that died brings back
        # chunks from before the many that it lost.
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
        """Returns whether a chunk adds inserts: no checkpoint has counted it.

        Args:
          number: The chunk's.
          from_actor: Whether an actor sent it just now; otherwise a server brings it back.
        """
        # The bound is for what servers bring back; an actor whose clock is behind goes on sending low numbers.
        return number not in self._known_chunks and (from_actor or number >= self._counted_before)

    def take_in(self, number: int, num_windows: int, is_new: bool, max_chunks: int) -> None:
        """Counts a chunk that was taken in and cannot be drawn yet.

        Args:
          number: The chunk's.
          num_windows: In it.
          is_new: What `is_new` said of it.
          max_chunks: So many are remembered at least.
        """
        self._known_chunks[number] = True
        if len(self._known_chunks) > max(MAX_KNOWN_CHUNKS, max_chunks):
            forgotten = next(iter(self._known_chunks))
            del self._known_chunks[forgotten]
            self._counted_before = max(self._counted_before, forgotten + 1)
        self.num_staged += num_windows
        if not is_new:  # the checkpoint counts it: together these two stay what they were
            self._inserts -= num_windows

    def reveal(self, num_windows: int) -> None:
        """Counts windows that can be drawn from now on."""
        self._inserts += num_windows
        self.num_staged -= num_windows

    def note_updates(self, num_updates: int) -> None:
        """Counts the samples of updates that were made."""
        self._samples += num_updates * self._batch_size

    def is_warm(self) -> bool:
        """Returns whether training may begin, or has begun."""
        return self._samples > 0 or self._inserts >= self._initial_collect_steps

    def num_updates_allowed(self) -> int:
        """Returns how many updates may be made now."""
        # Only what may be drawn counts: how far the reading thread is depends on the clock, and taking turns must not.
        spare = self.ahead(self._inserts) + self.error_buffer
        return max(0, int(spare // self._batch_size))

    def ahead(self, inserts: Optional[int] = None) -> float:
        """Returns the samples that `inserts` allow less those made; all that were taken in count by default."""
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
