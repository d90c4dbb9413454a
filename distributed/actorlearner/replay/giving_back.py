"""Refills a restarted replay server with the chunks that its durable table lost."""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import reverb
import tree

from actorlearner.replay.chunks import EXPERIENCE_TABLE
from actorlearner.replay.durable_table import ServerIncarnation, read_chunks
from actorlearner.replay.mirror import Place
from actorlearner.runtime.messages import Unreachable
from actorlearner.runtime.tls.tunnel import reach

LOOK_FOR_LOSSES_SECS = 2.0
"""Time between two checks whether a replay server has restarted and lacks chunks of the mirror, in seconds."""

SAVING_SECS = 60.0
"""How long a server may be silent during training, in seconds: it sends and accepts nothing while it saves."""

GIVE_BACK_CHUNKS = 32
"""Number of chunks refilled at a time; while they are read from the mirror, nothing is written to it."""

FIRST_RETRY_SECS, MAX_RETRY_SECS = 1.0, 60.0
"""Delay before a failed refill is retried, in seconds: doubles with each failure in a row."""

MAX_PASSES = 3
"""Largest number of passes over a restarted server's table, to find what it lacks."""


class LossDetector:
    """Tells whether a replay server has lost chunks: it restarted, and was not completely refilled since."""

    def __init__(self, address: str):
        self._address = address
        self._seen: Optional[ServerIncarnation] = None
        self._made_up_for: Optional[ServerIncarnation] = None
        self._num_passes = 0  # in the incarnation seen last

    def has_losses(self) -> bool:
        """Returns whether chunks may be lost and not refilled yet; False at the first call.

        Blocks at most twice `ANSWER_SECS`.

        Raises:
          Unreachable: The server does not answer.
        """
        now, _ = ServerIncarnation.read(self._address)
        if self._seen is not None and self._seen.has_ended(now):
            self._num_passes = 0
        self._seen = now
        if self._made_up_for is not None and self._made_up_for.has_ended(now):
            return True
        self._forget()
        return False

    def note_pass(self, num_given: int) -> None:
        """Counts a pass over the table: after a pass without missing chunks, or the last pass, nothing is lost.

        Blocks at most twice `ANSWER_SECS`.

        Args:
          num_given: Number of chunks that the table lacked and was refilled with.

        Raises:
          Unreachable: It does not answer, or was restarted since `has_losses`: which lost the refill.
        """
        assert self._seen is not None, "call has_losses before note_pass"
        now, _ = ServerIncarnation.read(self._address)
        if self._seen.has_ended(now):
            raise Unreachable(f"the server at {self._address} restarted while it was refilled")
        self._num_passes += 1
        # The mirror may still receive chunks from the old incarnation, so make another pass; others write to the table
        # too, so not endlessly.
        if not num_given or self._num_passes == MAX_PASSES:
            self._forget()

    def _forget(self) -> None:
        """Marks what was lost until the last check as refilled."""
        self._made_up_for, self._num_passes = self._seen, 0


class ChunkWriter:
    """Writes chunks only into one server's durable table, not into the queue. `close` takes up to a second."""

    def __init__(self, address: str):
        self._address = address
        # by shape, because a writer's columns cannot change theirs
        self._writers: dict[tuple[int, ...], reverb.TrajectoryWriter] = {}

    def write(self, chunks: Iterable[Mapping[str, Any]], timeout_secs: float) -> None:
        """Writes chunks, and blocks until the server has confirmed all of them.

        Raises:
          reverb.errors.ReverbError, RuntimeError: It did not within `timeout_secs`; some chunks may have arrived.
        """
        for chunk in chunks:
            shape = chunk["ends_run"].shape
            if shape not in self._writers:
                client = reverb.Client(reach(self._address))
                self._writers[shape] = client.trajectory_writer(num_keep_alive_refs=1, validate_items=False)
            writer = self._writers[shape]
            writer.append(chunk)
            trajectory = tree.map_structure(lambda column: column[-1], writer.history)
            writer.create_item(EXPERIENCE_TABLE, priority=1.0, trajectory=trajectory)
        for writer in self._writers.values():
            writer.flush(timeout_ms=int(timeout_secs * 1000))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class GivingBack:
    """Knows where the chunks are in the mirrors, and refills each server with those that it lost."""

    def __init__(
        self,
        *,
        changed: threading.Condition,
        writing: threading.Lock,
        is_closing: Callable[[], bool],
        find_misfit: Callable[[Sequence[np.ndarray], Any], Optional[str]],
        num_durable_chunks: int,
    ):
        """Args:
        changed: Guards the places, and is notified when the source closes.
        writing: Held by the one thread that writes to the mirrors.
        is_closing: Returns whether the source is closing.
        find_misfit: See `read_chunks`.
        num_durable_chunks: Largest number of chunks that a server holds.
        """
        self.num_given_back = 0
        self._changed = changed
        self._writing = writing
        self._is_closing = is_closing
        self._find_misfit = find_misfit
        self._num_durable_chunks = num_durable_chunks
        self._losses: dict[str, LossDetector] = {}  # by address
        self._places: dict[int, Place] = {}  # where each chunk of the mirrors is, by number, oldest first

    def note_place(self, number: int, place: Place) -> None:
        """Records where a chunk is, and drops those that have left the mirror. The caller holds the lock."""
        self._places[number] = place
        while not next(iter(self._places.values())).is_held():
            del self._places[next(iter(self._places))]

    def losses_at(self, address: str) -> LossDetector:
        """Returns the loss detector of the server at `address`."""
        return self._losses.setdefault(address, LossDetector(address))

    def look_after(self, address: str) -> None:
        """Refills the server at `address` whenever it has restarted; returns when the source closes."""
        losses, wait_secs, retry_secs = self.losses_at(address), LOOK_FOR_LOSSES_SECS, FIRST_RETRY_SECS
        while True:
            with self._changed:
                if self._changed.wait_for(self._is_closing, timeout=wait_secs):
                    return
            try:
                may_be_lost = losses.has_losses()
            except (Unreachable, reverb.errors.ReverbError, RuntimeError) as error:
                logging.debug("watching the replay server at %s for a restart: %s", address, error)
                may_be_lost = False  # unknown; checked again when it is back
            if not may_be_lost:
                wait_secs, retry_secs = LOOK_FOR_LOSSES_SECS, FIRST_RETRY_SECS
                continue
            try:
                num_given = self._give_back(address)
                losses.note_pass(num_given)
            except Exception as error:  # it has its last checkpoint; no reason to end training
                wait_secs, retry_secs = retry_secs, min(MAX_RETRY_SECS, 2 * retry_secs)
                is_expected = isinstance(error, (Unreachable, reverb.errors.ReverbError, RuntimeError))
                logging.warning(
                    "the replay server at %s has restarted and was not refilled with the chunks it lost: %s. "
                    "Retrying in %.0f s",
                    address,
                    error,
                    wait_secs,
                    exc_info=not is_expected,
                )
                continue
            logging.info(
                "the replay server at %s restarted and was refilled with %d chunks that it had lost", address, num_given
            )
            wait_secs, retry_secs = LOOK_FOR_LOSSES_SECS, FIRST_RETRY_SECS

    def _give_back(self, address: str) -> int:
        """Writes into the durable table the chunks that it lacks, and returns their number.

        Blocks for seconds; a table of 20,000 chunks takes a minute. Raises `Unreachable` and Reverb's errors.
        """
        with self._changed:  # before the table is read: chunks that arrive later are there
            places = {number: place for number, place in self._places.items() if place.address == address}
        there = read_chunks(address, silent_secs=SAVING_SECS, has_data=False, find_misfit=self._find_misfit).keys()
        newest = heapq.nlargest(self._num_durable_chunks, places.keys() | there)  # it would have dropped the others
        lost = sorted(set(newest) - there)
        num_given = 0
        try:
            with contextlib.closing(ChunkWriter(address)) as writer:
                while lost and not self._is_closing():
                    numbers, lost = lost[:GIVE_BACK_CHUNKS], lost[GIVE_BACK_CHUNKS:]
                    with self._writing:
                        rows = {number: places[number].read() for number in numbers if places[number].is_held()}
                    num_given += len(rows)
                    # This waits for the rows: a GPU copies them after its present compiled call.
                    writer.write((places[number].unfold(number, held) for number, held in rows.items()), SAVING_SECS)
        finally:  # unconfirmed chunks may have arrived too
            with self._changed:
                self.num_given_back += num_given
        return num_given
