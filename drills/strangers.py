"""A hostile client that writes implausible rows of valid types into every table; for the drill and tests.

`python -m drills.strangers HOST:PORT` writes all of them once and prints how many each table accepted.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import reverb
import tree

from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE
from actorlearner.replay.servers import JOINED_TABLE
from actorlearner.replay.windows import REPLAY_TABLE
from actorlearner.reports import EXIT_REASONS_TABLE
from actorlearner.runtime.messages import read_server_info
from actorlearner.runtime.tls.tunnel import reach
from actorlearner.variable_container import VERSION_TABLE, Phase, read_version

NUMBERS = (2**61, 2**62)
UNKNOWN = dict.fromkeys(("phase", "purpose", "is_saved", "step_type", "next_step_type", "action"), 99)
FLOATS = (np.nan, np.inf, -np.inf)
MAX_CHUNK_STEPS = 200_000
TIMEOUT_SECS = 20.0  # for queues that the learner reads row by row

WORDS = (
    ["collect-actor", 0, 0, "training is over"],
    ["eval-actor", 0, 999, "a code without a meaning"],
    ["nobody", 0, 65, "a role without a meaning"],
    ["collect-actor", 2**62, 65, "a task without a meaning"],
)


def hostile_rows(table: str, signature: Any, num_steps: int = 2) -> Iterator[Any]:
    """Yields rows of a table's types, each with one implausible number.

    Args:
      table: Name of the table.
      signature: Its nest of tensor specs.
      num_steps: Steps in an item, for a table of windows.
    """
    if table == EXIT_REASONS_TABLE:
        yield from (_text(signature, json.dumps(words)) for words in WORDS)
    elif table == JOINED_TABLE:
        yield _text(signature, ",".join(f"127.0.0.1:{port}" for port in range(1, 31)))
    elif table in (EXPERIENCE_TABLE, STREAM_TABLE):
        yield from hostile_chunks(signature)
    else:
        yield from _variations(plausible(signature, num_steps))


def hostile_chunks(signature: Any, num_rows: int = 8) -> Iterator[Any]:
    """Yields chunks, each with one implausible number, and a chunk that is too large."""
    chunk = {**plausible(signature, num_rows), "length": np.int64(num_rows)}
    yield from _variations(chunk)
    step = chunk["step"]
    yield {**chunk, "step": step._replace(reward=np.full_like(step.reward, 1e38))}
    yield {**plausible(signature, MAX_CHUNK_STEPS), "length": np.int64(MAX_CHUNK_STEPS)}


def plausible(signature: Any, num_rows: int) -> Any:
    """Returns a row of zeros; the last unknown dimension becomes `num_rows`, others 1."""

    def zeros(spec: Any) -> np.ndarray:
        unknown = [axis for axis, size in enumerate(spec.shape) if size is None]
        shape = [num_rows if unknown and axis == unknown[-1] else size or 1 for axis, size in enumerate(spec.shape)]
        return np.zeros(shape, spec.dtype.as_numpy_dtype)

    return tree.map_structure(zeros, signature)


def _variations(row: Any) -> Iterator[Any]:
    leaves = tree.flatten(row)
    for index, (path, leaf) in enumerate(tree.flatten_with_path(row)):
        values: Sequence[Any] = ()
        if leaf.dtype.kind == "f":
            values = FLOATS
        elif leaf.dtype.kind == "i":
            least, most = np.iinfo(leaf.dtype).min, np.iinfo(leaf.dtype).max
            others = (*NUMBERS, *(number for name, number in UNKNOWN.items() if name in path))
            values = (least, -7, *(number for number in others if number <= most), most)
        for value in values:
            yield tree.unflatten_as(row, [*leaves[:index], np.full_like(leaf, value), *leaves[index + 1 :]])


def _text(signature: Any, text: str) -> Any:
    ((name, spec),) = signature.items()
    return {name: np.frombuffer(text.encode().ljust(spec.shape[0], b"\0"), np.uint8)}


def insert(address: str, table: str, *rows: Any) -> None:
    """Inserts rows into a table without checks, as any Reverb client can.

    Raises:
      reverb.errors.ReverbError, RuntimeError: The server did not accept one within `TIMEOUT_SECS`.
    """
    is_whole = table in (EXPERIENCE_TABLE, STREAM_TABLE, REPLAY_TABLE)  # leaves of these tables have a time dimension
    # One writer per shape, because its columns cannot change theirs and each writer takes a second to close.
    writers: dict[Any, reverb.TrajectoryWriter] = {}
    with contextlib.ExitStack() as stack:
        for row in rows:
            shapes = tuple(np.shape(leaf) for leaf in tree.flatten(row))
            if shapes not in writers:
                client = reverb.Client(reach(address))
                writer = client.trajectory_writer(num_keep_alive_refs=1, validate_items=False)
                writers[shapes] = stack.enter_context(writer)
            writer = writers[shapes]
            writer.append(row)
            item = tree.map_structure(lambda column: column[-1] if is_whole else column[-1:], writer.history)
            writer.create_item(table, priority=1.0, trajectory=item)
            writer.flush(timeout_ms=int(TIMEOUT_SECS * 1000))


def claim_the_end(address: str) -> None:
    """Announces once, under the learner's own number, that training is over and its version is far ahead."""
    now = read_version(address)
    claimed: Mapping[str, int] = {
        "version": 10**9,
        "train_step": now.train_step if now else 0,
        "phase": int(Phase.OVER),
        "learner": now.learner if now else 0,
        "heartbeat": now.heartbeat + 1 if now else 0,
        "num_chunks": 0,
    }
    insert(address, VERSION_TABLE, {name: np.int64(value) for name, value in claimed.items()})


def insert_everywhere(address: str) -> dict[str, int]:
    """Writes hostile rows into every table, and returns how many each table accepted."""
    taken = {}
    for name, table in read_server_info(address, timeout_secs=TIMEOUT_SECS).items():
        taken[name] = 0
        num_steps = _window_length(address, table) if name == REPLAY_TABLE else 2
        rows = tuple(hostile_rows(name, table.signature, num_steps))
        try:
            insert(address, name, *rows)
        except (reverb.errors.ReverbError, RuntimeError) as error:
            print(f"{name}: {str(error)[:200]}")
        else:
            taken[name] = len(rows)
    claim_the_end(address)
    return taken


def _window_length(address: str, table: Any) -> int:
    if not table.current_size:
        return 2
    (sample,) = reverb.Client(reach(address)).sample(table.name, num_samples=1, emit_timesteps=False)
    return len(sample.data[0])


if __name__ == "__main__":
    for table_name, num_taken in insert_everywhere(sys.argv[1]).items():
        print(f"{table_name} accepted {num_taken}")
