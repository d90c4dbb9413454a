"""The durable table of chunks: read whole, watched for losses, and given back what it lost.

What a chunk is says `resident.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import reverb
import tree

from actorlearner.runtime.messages import Unreachable, each_within, read_server_info
from actorlearner.runtime.tls_tunnel import reach

EXPERIENCE_TABLE = "experience"


def read_chunks(
    address: str,
    *,
    silent_secs: float,
    on_chunk: Callable[[], object] = lambda: None,
    has_data: bool = True,
) -> dict[int, Any]:
    """Returns every chunk of a server's table by its number, or None unless `has_data`; in no order.

    Sampled, as Reverb lists none: about ten times the table comes over the network. Blocks for that long.

    Args:
      address: The server's.
      silent_secs: So long it may hand out nothing; it hands out nothing while it saves a checkpoint.
      on_chunk: Called for each sample; what it raises ends the reading.
      has_data: Whether the chunks are kept, or their numbers alone.

    Raises:
      Unreachable: The server does not answer, went away, was silent for too long, or has no such table.
    """
    client = reverb.Client(reach(address))
    chunks: dict[int, Any] = {}
    keys: set[int] = set()
    misfits: set[int] = set()  # of strangers: Reverb's server takes what its client did not check
    num_draws, size = 0, 1
    # Drawing n of n with replacement takes about n ln n draws; the bound leaves room and ends if others write. The
    # client's own sampler is ten times as fast as a dataset here.
    while len(keys) < size and num_draws < size * (np.log(size) + 8):
        table = _read_table_info(address)
        size = table.current_size
        if not size:
            break
        samples = client.sample(EXPERIENCE_TABLE, num_samples=size, emit_timesteps=False)
        for sample in _each_sample(samples, address, silent_secs):
            on_chunk()
            if sample.info.key in keys:
                continue
            keys.add(sample.info.key)
            if not is_chunk(sample.data, table.signature):
                misfits.add(sample.info.key)
                continue
            chunk = tree.unflatten_as(table.signature, sample.data)
            chunks.setdefault(int(chunk["chunk"]), chunk if has_data else None)
        num_draws += size
    if misfits:
        logging.warning(
            "%d items in the table '%s' at %s are not this experiment's and are left out: some other client "
            "inserts there. Keep its port on a network you trust.",
            len(misfits),
            EXPERIENCE_TABLE,
            address,
        )
    return chunks


def _read_table_info(address: str) -> Any:
    table = read_server_info(address, timeout_secs=5).get(EXPERIENCE_TABLE)
    if table is None:
        raise Unreachable(f"the server at {address} has no table '{EXPERIENCE_TABLE}'")
    return table


def _each_sample(samples: Iterable[Any], address: str, silent_secs: float) -> Iterable[Any]:
    where = f"table '{EXPERIENCE_TABLE}' at {address}"
    try:
        yield from each_within(silent_secs, samples, where)
    except (reverb.errors.ReverbError, RuntimeError) as error:  # its server was stopped meanwhile
        raise Unreachable(f"reading {where} failed: {error}") from error


def is_chunk(leaves: Sequence[np.ndarray], signature: Any) -> bool:
    """Returns whether an item is a chunk: the signature's leaves, all of the same environments and rows."""
    specs = tree.flatten(signature)
    if len(leaves) != len(specs) or not all(
        spec.dtype == leaf.dtype and spec.shape.is_compatible_with(leaf.shape) for spec, leaf in zip(specs, leaves)
    ):
        return False
    chunk = tree.unflatten_as(signature, leaves)
    shape = chunk["ends_run"].shape
    return (
        chunk["acted_at"].shape == shape[1:]
        and 0 < chunk["length"] <= shape[1]
        and all(leaf.shape[:2] == shape for leaf in tree.flatten(chunk["step"]))
    )


class Losses:
    """Whether a replay server may lack what it had: it is younger than it was, or counts fewer inserts."""

    def __init__(self, address: str):
        self._address = address
        self._seen = self._made_up_for = (math.inf, 0)  # when it was started at the latest, and inserts

    def may_be(self) -> bool:
        """Returns whether something may be lost, until `forget`; never at the first look. Raises `Unreachable`."""
        asked_at = time.monotonic()
        table = _read_table_info(self._address)
        # A worker's time in each of its states, the present one too: together its age.
        age_secs = sum(millis for _, millis in table.table_worker_time.ListFields()) / 1000
        num_inserted = table.rate_limiter_info.insert_stats.completed
        self._seen = (time.monotonic() - age_secs, num_inserted)
        was_started_by, least_inserted = self._made_up_for
        # Its age is by its machine's clock, which may be set.
        if asked_at - age_secs > was_started_by + 2.0 or num_inserted < least_inserted:
            return True
        self.forget()
        return False

    def forget(self) -> None:
        """Nothing that was lost until the last look is missing any more."""
        self._made_up_for = self._seen


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
