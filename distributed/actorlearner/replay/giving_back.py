"""A replay server that began anew is given back what it lost of its durable table."""

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
"""Time between two looks whether a replay server has been restarted and lacks what the mirror holds."""

SAVING_SECS = 60.0
"""So long a server may be silent while training goes on: it hands out and takes nothing while it saves a checkpoint."""

GIVE_BACK_CHUNKS = 32
"""So many chunks are given back at a time; while they are read from the mirror nothing is written to it."""

FIRST_RETRY_SECS, MAX_RETRY_SECS = 1.0, 60.0
"""Time until what could not be given back is tried again: twice as long with each failure in a row."""

MAX_PASSES = 3
"""So often a restarted server is looked through for what it lacks."""


class LossDetector:
    """Whether a replay server may lack what it had: it began anew and was not given all back since."""

    def __init__(self, address: str):
        self._address = address
        self._seen: Optional[ServerIncarnation] = None
        self._made_up_for: Optional[ServerIncarnation] = None
        self._num_passes = 0  # in the life that was seen last

    def has_losses(self) -> bool:
        """Returns whether something may be lost, until it is made up for; never at the first look.

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
        """Counts a look through the table: nothing is lost any more when it lacked none, or with the last look.

        Blocks at most twice `ANSWER_SECS`.

        Args:
          num_given: The chunks that the table lacked and was given.

        Raises:
          Unreachable: It does not answer, or was restarted since `has_losses`: what was given to it is lost again.
        """
        assert self._seen is not None, "note_pass before has_losses"
        now, _ = ServerIncarnation.read(self._address)
        if self._seen.has_ended(now):
            raise Unreachable(f"the server at {self._address} was restarted while it was given back what it lacked")
        self._num_passes += 1
        # What came from the server's last life may be taken in meanwhile, so once more; others write there as well, so
        # not for ever.
        if not num_given or self._num_passes == MAX_PASSES:
            self._forget()

    def _forget(self) -> None:
        """Nothing that was lost until the last look is missing any more."""
        self._made_up_for, self._num_passes = self._seen, 0


class ChunkWriter:
    """Writes chunks into one server's durable table alone, past the queue. Close it; that takes up to a second."""

    def __init__(self, address: str):
        self._address = address
        self._writers: dict[tuple[int, ...], reverb.TrajectoryWriter] = {}  # by shape: a writer's columns keep theirs

    def write(self, chunks: Iterable[Mapping[str, Any]], timeout_secs: float) -> None:
        """Returns when the server has confirmed them all.

        Raises:
          reverb.errors.ReverbError, RuntimeError: It did not within `timeout_secs`; some may be there.
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
    """Knows where in the mirrors the chunks are, and gives each server back those that it lost."""

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
        writing: Whoever holds it is the one that writes to the mirrors.
        is_closing: Returns whether the source closes.
        find_misfit: See `read_chunks`.
        num_durable_chunks: Chunks that a server holds at most.
        """
        self.num_given_back = 0
        self._changed = changed
        self._writing = writing
        self._is_closing = is_closing
        self._find_misfit = find_misfit
        self._num_durable_chunks = num_durable_chunks
        self._losses: dict[str, LossDetector] = {}  # by address
        self._places: dict[int, Place] = {}  # of the chunks in the mirrors, by number, oldest first

    def note_place(self, number: int, place: Place) -> None:
        """Notes where a chunk is, and forgets those that have left. Whoever calls holds the lock."""
        self._places[number] = place
        while not next(iter(self._places.values())).is_held():
            del self._places[next(iter(self._places))]

    def losses_at(self, address: str) -> LossDetector:
        """Returns what tells whether the server at `address` may lack something."""
        return self._losses.setdefault(address, LossDetector(address))

    def look_after(self, address: str) -> None:
        """Gives the server at `address` back what it lost, whenever it began anew; returns when the source closes."""
        losses, wait_secs, retry_secs = self.losses_at(address), LOOK_FOR_LOSSES_SECS, FIRST_RETRY_SECS
        while True:
            with self._changed:
                if self._changed.wait_for(self._is_closing, timeout=wait_secs):
                    return
            try:
                may_be_lost = losses.has_losses()
            except (Unreachable, reverb.errors.ReverbError, RuntimeError) as error:
                logging.debug("looking after the replay server at %s: %s", address, error)
                may_be_lost = False  # as far as one knows; asked again when it is back
            if not may_be_lost:
                wait_secs, retry_secs = LOOK_FOR_LOSSES_SECS, FIRST_RETRY_SECS
                continue
            try:
                num_given = self._give_back(address)
                losses.note_pass(num_given)
            except Exception as error:  # it has what its last checkpoint held; no reason to end training
                wait_secs, retry_secs = retry_secs, min(MAX_RETRY_SECS, 2 * retry_secs)
                is_expected = isinstance(error, (Unreachable, reverb.errors.ReverbError, RuntimeError))
                logging.warning(
                    "the replay server at %s began anew and is not given back yet what it had lost: %s. Trying again "
                    "in %.0f s",
                    address,
                    error,
                    wait_secs,
                    exc_info=not is_expected,
                )
                continue
            logging.info(
                "the replay server at %s began anew; %d chunks that it had lost were given back", address, num_given
            )
            wait_secs, retry_secs = LOOK_FOR_LOSSES_SECS, FIRST_RETRY_SECS

    def _give_back(self, address: str) -> int:
        """Returns how many chunks were written into the durable table that it lacked.

        Blocks for seconds; a table of 20,000 chunks takes a minute. Raises `Unreachable` and Reverb's errors.
        """
        with self._changed:  # before the table is read: what comes later is there
            places = {number: place for number, place in self._places.items() if place.address == address}
        there = read_chunks(address, silent_secs=SAVING_SECS, has_data=False, find_misfit=self._find_misfit).keys()
        newest = heapq.nlargest(self._num_durable_chunks, places.keys() | there)  # others it would have dropped
        lost = sorted(set(newest) - there)
        num_given = 0
        try:
            with contextlib.closing(ChunkWriter(address)) as writer:
                while lost and not self._is_closing():
                    numbers, lost = lost[:GIVE_BACK_CHUNKS], lost[GIVE_BACK_CHUNKS:]
                    with self._writing:
                        rows = {number: places[number].read() for number in numbers if places[number].is_held()}
                    num_given += len(rows)
                    # Only here are they awaited: a GPU's come after the compiled call that is under way.
                    writer.write((places[number].unfold(number, held) for number, held in rows.items()), SAVING_SECS)
        finally:  # what was not confirmed may be there too
            with self._changed:
                self.num_given_back += num_given
        return num_given
