"""A replay server that began anew is given back what it lost of its durable table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional

import reverb
import tree

from actorlearner.replay.chunks import EXPERIENCE_TABLE
from actorlearner.replay.durable_table import Life
from actorlearner.runtime.messages import Unreachable
from actorlearner.runtime.tls.tunnel import reach

MAX_PASSES = 3
"""So often a restarted server is looked through for what it lacks."""


class Losses:
    """Whether a replay server may lack what it had: it began anew and was not given all back since."""

    def __init__(self, address: str):
        self._address = address
        self._seen: Optional[Life] = None
        self._made_up_for: Optional[Life] = None
        self._num_passes = 0  # in the life that was seen last

    def may_be(self) -> bool:
        """Returns whether something may be lost, until it is made up for; never at the first look.

        Blocks at most twice `ANSWER_SECS`.

        Raises:
          Unreachable: The server does not answer.
        """
        now, _ = Life.read(self._address)
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
          Unreachable: It does not answer, or was restarted since `may_be`: what was given to it is lost again.
        """
        assert self._seen is not None, "note_pass before may_be"
        now, _ = Life.read(self._address)
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
