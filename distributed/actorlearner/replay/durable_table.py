"""Reads the durable table of chunks, and the incarnation of the server that holds it.

`chunks.py` defines a chunk.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

import numpy as np
import reverb
import tree

from actorlearner.replay.chunk_checks import is_chunk
from actorlearner.replay.chunks import EXPERIENCE_TABLE
from actorlearner.runtime.messages import Unreachable, each_within, read_server_info
from actorlearner.runtime.row_checks import say_left_out
from actorlearner.runtime.tls.tunnel import reach

ANSWER_SECS = 5.0
"""Deadline for a server's table info, in seconds."""


CLOCK_SLACK_SECS = 2.0
"""Tolerance for a server's start time, in seconds, as clocks are adjusted; a restart takes longer than this."""


@dataclasses.dataclass(frozen=True)
class ServerIncarnation:
    """One incarnation of a replay server: when it started, and how many inserts it counts."""

    began_after: float  # bounds of its start, in seconds of this machine's monotonic clock
    began_before: float
    num_inserted: int  # items, so far

    @classmethod
    def read(cls, address: str) -> tuple[ServerIncarnation, Any]:
        """Returns the incarnation of the server at `address`, and its durable table's info.

        Blocks at most twice `ANSWER_SECS`.

        Raises:
          Unreachable: It does not answer, or has no such table.
        """
        for _ in range(2):  # the first answer may wait for a connection, so its time is inexact
            asked_at = time.monotonic()
            table: Any = read_server_info(address, ANSWER_SECS).get(EXPERIENCE_TABLE)
            if table is None:
                raise Unreachable(f"the server at {address} has no table '{EXPERIENCE_TABLE}'")
            if time.monotonic() - asked_at < CLOCK_SLACK_SECS / 4:
                break
        # The times of a worker in all of its states add up to its age.
        age_secs = sum(millis for _, millis in table.table_worker_time.ListFields()) / 1000
        life = cls(asked_at - age_secs, time.monotonic() - age_secs, table.rate_limiter_info.insert_stats.completed)
        return life, table

    def has_ended(self, now: ServerIncarnation) -> bool:
        """Returns whether `now`, read later, is another incarnation: it started later, or counts fewer inserts."""
        return now.began_after > self.began_before + CLOCK_SLACK_SECS or now.num_inserted < self.num_inserted


def _find_other_parts(leaves: Sequence[np.ndarray], signature: Any) -> Optional[str]:
    return None if is_chunk(leaves, signature) else "its parts do not belong together"


def read_chunks(
    address: str,
    *,
    silent_secs: float,
    on_chunk: Callable[[], object] = lambda: None,
    has_data: bool = True,
    find_misfit: Callable[[Sequence[np.ndarray], Any], Optional[str]] = _find_other_parts,
    into: Optional[dict[int, Any]] = None,
) -> dict[int, Any]:
    """Returns the chunks of a server's table by number, or None for each unless `has_data`; in no order.

    Chunks that arrive meanwhile may be missing. Reverb cannot list items, so they are sampled: about ten times the
    table crosses the network. Blocks for that long.

    Args:
      address: Address of the server.
      silent_secs: How long it may send nothing, in seconds; it sends nothing while it saves a checkpoint.
      on_chunk: Called for each sample; what it raises ends the reading.
      has_data: Whether to keep the chunks, or only their numbers.
      find_misfit: Returns why an item, given its leaves and the table's signature, is not a chunk of this experiment,
        because Reverb's server accepts any item. Such items are left out, with one warning for each kind.
      into: Chunks read before, to which this adds; they are kept after an error too.

    Raises:
      Unreachable: The server does not answer, went away, was silent for too long, restarted meanwhile, or has no such
        table.
    """
    client = reverb.Client(reach(address))
    chunks: dict[int, Any] = {} if into is None else into
    keys: set[int] = set()
    life, table = ServerIncarnation.read(address)
    # Drawing all of n items with replacement takes about n ln n draws; the bound leaves room, and ends the loop if
    # others keep writing. The client's own sampler is ten times as fast as a dataset here.
    num_draws, most_draws = 0, table.current_size * (np.log(max(1, table.current_size)) + 8)
    while size := table.current_size:
        samples = client.sample(EXPERIENCE_TABLE, num_samples=size, emit_timesteps=False)
        for sample in _each_sample(samples, address, silent_secs):
            on_chunk()
            if sample.info.key in keys:
                continue
            keys.add(sample.info.key)
            why = find_misfit(sample.data, table.signature)
            if why:
                say_left_out(address, EXPERIENCE_TABLE, why)
                continue
            chunk = tree.unflatten_as(table.signature, sample.data)
            chunks.setdefault(int(chunk["chunk"]), chunk if has_data else None)
        num_draws += size
        now, table = ServerIncarnation.read(address)
        if life.has_ended(now):  # Reverb's sampler silently continues with the new server
            raise Unreachable(f"the server at {address} was restarted while '{EXPERIENCE_TABLE}' was read")
        if len(keys) >= size or num_draws >= most_draws:
            break
    return chunks


def _each_sample(samples: Iterable[Any], address: str, silent_secs: float) -> Iterable[Any]:
    where = f"table '{EXPERIENCE_TABLE}' at {address}"
    try:
        yield from each_within(silent_secs, samples, where)
    except (reverb.errors.ReverbError, RuntimeError) as error:  # the server stopped meanwhile
        raise Unreachable(f"reading {where} failed: {error}") from error
