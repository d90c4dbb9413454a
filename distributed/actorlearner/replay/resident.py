"""Resident replay: the learner keeps the replay beside its compute and draws batches inside the compiled loop.

collect actors --chunks--> [stream, a queue] --> learner's mirror --windows--> agent.train
               \\--chunks--> [experience, durable] --> refills the mirror of a restarted learner

A chunk is a run of steps of one episode that needs no other chunk: the last `num_steps - 1` steps of one open the next,
so each window of an episode lies in exactly one chunk, as each is exactly one item in a stock TF-Agents table.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import gin
import numpy as np
import reverb
import tensorflow as tf
import tree
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import StepType

from actorlearner.replay.base import describe_account
from actorlearner.runtime.configuration import PositiveFloat, PositiveInt
from actorlearner.runtime.messages import read_server_info

EXPERIENCE_TABLE = "experience"
STREAM_TABLE = "stream"

MAX_KNOWN_CHUNKS = 100_000
"""How many chunks are remembered, so that none is taken in twice."""

_INT64 = tf.TensorSpec((), tf.int64)


@gin.configurable("resident_replay", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class ResidentReplay:
    """Uniform experience replay (Lin, 1992) held by the learner, mirrored by a table on the server.

    Attributes:
      replay_buffer_capacity: Windows the mirror holds at most; with two-step windows a window is a transition.
      samples_per_insert: Overrides the ratio that `collect_steps_per_iteration` and `batch_size` give.
      error_buffer: How many samples the ratio may be off at any moment; None takes a thousand windows' worth.
      chunk_length: Steps an actor sends in one piece.
      chunk_secs: A chunk that is not full is sent after this time, in seconds.
      stream_length: Chunks that wait in the queue; when it is full, actors wait.
    """

    replay_buffer_capacity: PositiveInt = 100_000
    samples_per_insert: Optional[PositiveFloat] = None
    error_buffer: Optional[PositiveFloat] = None
    chunk_length: PositiveInt = 50
    chunk_secs: PositiveFloat = 1.0
    stream_length: PositiveInt = 32

    def check(self, *, initial_collect_steps: int) -> None:
        """Raises `ValueError` when the mirror could never hold what training waits for."""
        if self.replay_buffer_capacity < initial_collect_steps:
            raise ValueError(
                f"resident_replay.replay_buffer_capacity = {self.replay_buffer_capacity:,} is smaller than "
                f"train.initial_collect_steps = {initial_collect_steps:,}: training would never begin. "
                "Raise the first or lower the second."
            )

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        """Returns what each table of this replay holds, by table name."""
        signature = tensor_spec.add_outer_dim(_row_spec(step_spec))
        return {EXPERIENCE_TABLE: signature, STREAM_TABLE: signature}

    def make_tables(
        self, step_spec: Any, *, batch_size: int, initial_collect_steps: int, samples_per_insert: float
    ) -> list[reverb.Table]:
        """Returns the queue and the durable table. See `Replay.make_tables`."""
        del batch_size, initial_collect_steps, samples_per_insert  # the learner keeps the ratio
        signatures = self.table_signatures(step_spec)
        return [
            reverb.Table.queue(STREAM_TABLE, max_size=self.stream_length, signature=signatures[STREAM_TABLE]),
            reverb.Table(
                EXPERIENCE_TABLE,
                sampler=reverb.selectors.Uniform(),
                remover=reverb.selectors.Fifo(),
                # Chunks have fewer windows than steps: episodes end, chunks overlap. The mirror drops what is too much.
                max_size=max(1, 2 * self.replay_buffer_capacity // self.chunk_length),
                rate_limiter=reverb.rate_limiters.MinSize(1),
                signature=signatures[EXPERIENCE_TABLE],
            ),
        ]

    def is_warm(self, address: str, initial_collect_steps: int) -> Optional[bool]:
        """Returns None: only the learner knows how many windows it was sent."""
        del address, initial_collect_steps
        return None

    def make_sink(self, address: str, num_steps: int) -> ChunkSink:
        """Returns a writer of chunks for one environment."""
        return ChunkSink(reverb.Client(address), num_steps, max(self.chunk_length, 2 * num_steps), self.chunk_secs)

    def make_source(
        self,
        address: str,
        step_spec: Any,
        *,
        num_steps: int,
        batch_size: int,
        initial_collect_steps: int,
        samples_per_insert: float,
        strategy: tf.distribute.Strategy,
    ) -> ResidentSource:
        """Returns the mirror, with a thread that reads the queue. See `Replay.make_source`."""
        ratio = self.samples_per_insert or samples_per_insert
        mirror = Mirror(step_spec, num_steps, self.replay_buffer_capacity)
        logging.info(
            "the replay holds %s windows of %d steps beside the learner: %.1f MB",
            f"{self.replay_buffer_capacity:,}",
            num_steps,
            mirror.num_bytes / 1e6,
        )
        return ResidentSource(
            address,
            mirror,
            batch_size=batch_size,
            batch_size_per_replica=batch_size // strategy.num_replicas_in_sync,
            initial_collect_steps=initial_collect_steps,
            samples_per_insert=ratio,
            error_buffer=self.error_buffer or max(1_000 * ratio, 2 * batch_size),
        )


def _row_spec(step_spec: Any) -> dict[str, Any]:
    """What one step is in the tables: the trajectory's, when its weights were published, and which chunk it is in."""
    return {"acted_at": _INT64, "chunk": _INT64, "step": step_spec}


class ChunkSink:
    """Writes one environment's episodes as chunks. See `TrajectorySink`."""

    def __init__(self, client: reverb.Client, num_steps: int, chunk_length: int, chunk_secs: float):
        self._client = client
        self._num_steps = num_steps
        self._chunk_length = chunk_length
        self._chunk_secs = chunk_secs
        self._rows: list[dict[str, Any]] = []  # of the chunk under way, its opening overlap included
        self._opened_at = 0.0
        self._is_sending = False
        self._open()

    def _open(self) -> None:
        self._writer = self._client.trajectory_writer(num_keep_alive_refs=self._chunk_length, validate_items=False)
        self._is_configured = False

    def append(self, step: Any, acted_at: int) -> None:
        """Adds one step and hands the chunk to the writer when it is full, old, or its episode is over."""
        assert not self._is_sending, "append while blocked: ask is_blocked first"
        now = time.monotonic()
        if not self._rows:
            self._opened_at = now
        self._rows.append({"acted_at": np.int64(acted_at), "chunk": np.int64(0), "step": step})
        is_over = bool(step.step_type == StepType.LAST)
        is_due = len(self._rows) >= self._chunk_length or now - self._opened_at > self._chunk_secs
        if len(self._rows) >= self._num_steps and (is_over or is_due):
            self._send()
            self._rows = [] if is_over else self._rows[len(self._rows) - self._num_steps + 1 :]
            self._opened_at = now
        elif is_over:
            self._rows = []  # the episode has no window

    def _send(self) -> None:
        chunk = np.int64(secrets.randbits(62))
        if not self._is_configured:
            for path, _ in tree.flatten_with_path(self._rows[0]):
                self._writer.configure(
                    path, num_keep_alive_refs=self._chunk_length, max_chunk_length=self._chunk_length
                )
            self._is_configured = True
        for row in self._rows:
            self._writer.append({**row, "chunk": chunk})
        trajectory = tree.map_structure(lambda column: column[-len(self._rows) :], self._writer.history)
        # First the durable table: what reaches the learner must be there to come back from.
        for table in (EXPERIENCE_TABLE, STREAM_TABLE):
            self._writer.create_item(table, priority=1.0, trajectory=trajectory)
        self._is_sending = True

    def is_blocked(self) -> bool:
        """Returns whether the queue has not taken the last chunk; blocks at most half a second to find out.

        Raises:
          RuntimeError: The server refused a chunk.
        """
        if not self._is_sending:
            return False
        try:
            # Ends what Reverb calls an episode: the next chunk shares no storage with this one; an item is one piece.
            self._writer.end_episode(clear_buffers=True, timeout_ms=500)
        except reverb.errors.DeadlineExceededError:
            return True
        self._is_sending = False
        return False

    def drop_episode(self) -> None:
        """Forgets the steps that no chunk holds yet."""
        self._rows = []

    def close(self, timeout_secs: float) -> None:
        """Waits for the last chunk to be taken, at most `timeout_secs` seconds."""
        if self._is_sending:
            try:
                self._writer.end_episode(clear_buffers=True, timeout_ms=int(timeout_secs * 1000))
            except (reverb.errors.ReverbError, RuntimeError):
                logging.debug("the last chunk was not confirmed")


class Mirror:
    """The steps and the valid windows among them, in variables the compiled loop reads; the oldest leave first.

    One ring holds step rows, another the positions in it at which a window begins. A chunk leaves as a whole.
    """

    def __init__(self, step_spec: Any, num_steps: int, capacity: int):
        """Args:
        step_spec: Of one trajectory step.
        num_steps: Steps in a window.
        capacity: Windows held at most.
        """
        self.num_steps = num_steps
        self._capacity = capacity
        # Chunks overlap, so there are more steps than windows: a quarter more holds chunks from five windows up.
        self._num_rows = capacity + capacity // 4 + 1_000
        self._spec = {"acted_at": _INT64, "step": step_spec}
        with tf.device("/cpu:0"):
            self._rows = [
                tf.Variable(tf.zeros([self._num_rows, *spec.shape], spec.dtype), trainable=False)
                for spec in tf.nest.flatten(self._spec)
            ]
            self._starts = tf.Variable(tf.zeros([capacity], tf.int64), trainable=False)
            self._first = tf.Variable(0, dtype=tf.int64, trainable=False)  # window numbers: first held, ...
            self._end = tf.Variable(0, dtype=tf.int64, trainable=False)  # ... and one past the last
        self._chunks: collections.deque[tuple[int, int]] = collections.deque()  # (first row, windows), oldest first
        self._next_row = 0
        self.num_windows = 0

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    @property
    def num_bytes(self) -> int:
        return sum(int(np.prod(v.shape)) * v.dtype.size for v in [*self._rows, self._starts])

    def add(self, chunks: Sequence[Any]) -> int:
        """Returns how many windows it added; a chunk is a nest of `[length, ...]` arrays with `acted_at` and `step`."""
        lengths = [len(tf.nest.flatten(chunk)[0]) for chunk in chunks]
        starts = []
        for length in lengths:
            num_windows = length - self.num_steps + 1
            starts.append(self._next_row + np.arange(num_windows))
            self._chunks.append((self._next_row, num_windows))
            self._next_row += length
            self.num_windows += num_windows
        num_evicted = 0
        while self.num_windows > self._capacity or self._chunks[0][0] < self._next_row - self._num_rows:
            _, num_windows = self._chunks.popleft()
            self.num_windows -= num_windows
            num_evicted += num_windows
        blocks = [np.concatenate(leaves) for leaves in zip(*(tf.nest.flatten(chunk) for chunk in chunks))]
        begin = self._next_row - sum(lengths)
        self._write(tf.constant(begin, tf.int64), blocks, np.concatenate(starts), tf.constant(num_evicted, tf.int64))
        return sum(length - self.num_steps + 1 for length in lengths)

    @tf.function(reduce_retracing=True)
    def _write(self, begin: tf.Tensor, blocks: list[tf.Tensor], starts: tf.Tensor, num_evicted: tf.Tensor) -> None:
        rows = (begin + tf.range(tf.shape(blocks[0], tf.int64)[0], dtype=tf.int64)) % self._num_rows
        for variable, block in zip(self._rows, blocks):
            variable.scatter_nd_update(rows[:, None], block)
        num_starts = tf.shape(starts, tf.int64)[0]
        windows = (self._end + tf.range(num_starts, dtype=tf.int64)) % self._capacity
        self._starts.scatter_nd_update(windows[:, None], starts % self._num_rows)
        self._end.assign_add(num_starts)
        self._first.assign_add(num_evicted)

    def draw(self, batch_size: int) -> tuple[Any, tf.Tensor]:
        """Returns windows drawn uniformly, with replacement, as `(experience, acted_at)`; for compiled code.

        Shapes: B = batch_size, T = num_steps. `experience` leaves are [B, T, ...]; `acted_at` is [B], of first steps.
        """
        windows = tf.random.uniform([batch_size], self._first, self._end, tf.int64)
        return self.gather(windows)

    def gather(self, windows: tf.Tensor) -> tuple[Any, tf.Tensor]:
        """Returns the windows with these numbers; `draw` chooses the numbers."""
        starts = tf.gather(self._starts, windows % self._capacity)
        rows = (starts[:, None] + tf.range(self.num_steps, dtype=tf.int64)) % self._num_rows
        drawn = tf.nest.pack_sequence_as(self._spec, [tf.gather(variable, rows) for variable in self._rows])
        return drawn["step"], drawn["acted_at"][:, 0]


def _fits(leaves: Sequence[np.ndarray], signature: Any) -> bool:
    """Returns whether an item has the signature's leaves, all of one length."""
    specs = tree.flatten(signature)
    return (
        len(leaves) == len(specs)
        and len({len(leaf) if leaf.ndim else -1 for leaf in leaves}) == 1
        and all(
            spec.dtype == leaf.dtype and spec.shape.is_compatible_with(leaf.shape) for spec, leaf in zip(specs, leaves)
        )
    )


def _num_windows(chunk: Any, num_steps: int) -> int:
    return len(chunk["acted_at"]) - num_steps + 1


def _pack_ids(numbers: Sequence[int]) -> str:
    return base64.b64encode(np.array(numbers, np.int64).tobytes()).decode()


def _unpack_ids(text: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), np.int64).tolist()


class ResidentSource:
    """Feeds the mirror from the queue and keeps samples per insert, in both directions. See `BatchSource`.

    ahead = (inserts - initial_collect_steps) * samples_per_insert - samples stays within the error buffer: beyond it
    the queue is not read, fills, and holds the actors back; below it no update is allowed.
    """

    def __init__(
        self,
        address: str,
        mirror: Mirror,
        *,
        batch_size: int,
        batch_size_per_replica: int,
        initial_collect_steps: int,
        samples_per_insert: float,
        error_buffer: float,
    ):
        self.handle = tf.constant(0)  # nothing to pass: the mirror is captured
        self._address = address
        self._mirror = mirror
        self._batch_size = batch_size
        self._batch_size_per_replica = batch_size_per_replica
        self._initial_collect_steps = initial_collect_steps
        self._samples_per_insert = samples_per_insert
        self._error_buffer = error_buffer
        self._inserts = self._samples = 0
        self._num_staged = 0
        self._staged: list[Any] = []
        self._known_chunks: dict[int, None] = {}  # a set that remembers its order
        self._changed = threading.Condition()  # guards all of the above but the mirror, which one thread touches
        self._closing = False
        self._reader: Optional[threading.Thread] = None

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's counts; the mirror is filled from the durable table.

        What the server holds but the checkpoint did not count is counted now, so the samples-per-insert account is
        exact whichever of the two was saved later. May be called again after it raised.

        Raises:
          Unreachable, tf.errors.OpError: The server is away; nothing was changed.
        """
        chunks = self._read_experience()
        # The checkpoint counts the chunks it knew; those that came to the server later are inserts as well. Without a
        # checkpoint all are: what a learner before this one was sent still counts for the warm-up.
        counted = set(_unpack_ids(counts.get("chunks", "")))
        new = [chunk for number, chunk in chunks.items() if number not in counted]
        self._inserts = counts.get("inserts", 0) + sum(_num_windows(chunk, self._mirror.num_steps) for chunk in new)
        self._samples = counts.get("samples", 0)
        if chunks:
            # In the order of insertion, as far as it can be told: the oldest leave first.
            self._mirror.add(sorted(chunks.values(), key=lambda chunk: int(chunk["acted_at"][0])))
            logging.info(
                "%d windows came back from the replay server, %d of them inserted after the checkpoint",
                self._mirror.num_windows,
                self._inserts - counts.get("inserts", 0),
            )
        self._reader = threading.Thread(target=self._read_stream, name="ingest", daemon=True)
        self._reader.start()

    def counts(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        with self._changed:
            num_chunks = self._mirror.num_chunks + len(self._staged)
            # The newest known are those that the server may still hold.
            known = list(itertools.islice(reversed(self._known_chunks), num_chunks))
            inserts = self._inserts + self._num_staged
        return {"inserts": inserts, "samples": self._samples, "chunks": _pack_ids(known)}

    def draw(self, handle: Any) -> tuple[Any, ...]:
        """Returns nothing: each replica draws its own batch."""
        return ()

    def unpack(self) -> tuple[Any, tf.Tensor]:
        """Returns one replica's batch. See `BatchSource.unpack`."""
        return self._mirror.draw(self._batch_size_per_replica)

    def allow(self, num_updates: int) -> int:
        """Returns how many updates may be made now, at most `num_updates`; takes in what has arrived first."""
        if not self.is_ready():
            return 0
        spare = self._ahead() + self._error_buffer
        return max(0, min(num_updates, int(spare // self._batch_size)))

    def note_updates(self, num_updates: int) -> None:
        """Counts the samples of updates that were made."""
        with self._changed:
            self._samples += num_updates * self._batch_size
            self._changed.notify_all()

    def await_data(self, secs: float) -> None:
        """Returns when something arrived, or after `secs` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._staged), timeout=secs)

    def is_ready(self) -> bool:
        """Returns whether training may begin, or go on after a restart; takes in what has arrived first."""
        self._ingest()
        if not self._mirror.num_windows:
            return False
        return self._samples > 0 or self._inserts >= self._initial_collect_steps

    def account(self) -> dict[str, float]:
        """Returns how the replay stands, in figures. See `BatchSource.account`."""
        return {
            "held": self._mirror.num_windows,
            "inserts": self._inserts + self._num_staged,
            "samples": self._samples,
            "ahead": self._ahead(),
            "error_buffer": self._error_buffer,
        }

    def describe(self) -> str:
        """Returns how the replay stands, in words; never blocks."""
        return describe_account(
            self._mirror.num_windows,
            self._inserts,
            self._samples,
            needed=self._initial_collect_steps,
            ahead=self._ahead(),
            least=self._batch_size - self._error_buffer,
            most=self._error_buffer,
        )

    def renew(self) -> None:
        """Nothing to renew: the reader thread looks after itself."""

    def close(self) -> None:
        """Stops the reader; never blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _ahead(self) -> float:
        return (
            self._inserts + self._num_staged - self._initial_collect_steps
        ) * self._samples_per_insert - self._samples

    def _ingest(self) -> None:
        with self._changed:
            chunks, self._staged = self._staged, []
            self._num_staged = 0
        if chunks:
            num_windows = self._mirror.add(chunks)
            with self._changed:
                self._inserts += num_windows

    def _read_stream(self) -> None:
        while not self._closing:
            try:
                for sample in self._dataset(STREAM_TABLE, rate_limiter_timeout_ms=1_000):
                    self._stage(sample.data)
                    with self._changed:
                        self._changed.wait_for(lambda: self._closing or self._ahead() <= self._error_buffer)
                    if self._closing:
                        return
            except tf.errors.InvalidArgumentError as error:
                logging.warning(
                    "an item in the table '%s' at %s is not this experiment's and is left out: %s. Some other client "
                    "inserts there; keep its port on a network you trust.",
                    STREAM_TABLE,
                    self._address,
                    error.message.splitlines()[0],
                )
            except tf.errors.OpError as error:
                logging.debug("reading '%s' at %s: %s", STREAM_TABLE, self._address, error.message)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=0.5)

    def _stage(self, data: Any) -> None:
        row = tree.map_structure(lambda tensor: tensor.numpy(), data)
        chunk = int(row["chunk"][0])
        with self._changed:
            if chunk in self._known_chunks:  # a restored server hands some out twice
                return
            self._known_chunks[chunk] = None
            if len(self._known_chunks) > MAX_KNOWN_CHUNKS:
                del self._known_chunks[next(iter(self._known_chunks))]
            self._staged.append({"acted_at": row["acted_at"], "step": row["step"]})
            self._num_staged += len(row["chunk"]) - self._mirror.num_steps + 1
            self._changed.notify_all()

    def _read_experience(self) -> dict[int, Any]:
        """Returns every chunk of the durable table by its number, in no order; sampled, as Reverb lists none."""
        client = reverb.Client(self._address)
        chunks: dict[int, Any] = {}
        misfits: set[int] = set()  # of strangers: Reverb's server takes what its client did not check
        num_draws, size = 0, 1
        # Drawing n of n with replacement takes about n ln n draws; the bound leaves room and ends if others write. The
        # client's own sampler is ten times as fast as a dataset here.
        while len(chunks) < size and num_draws < size * (np.log(size) + 8):
            table = read_server_info(self._address, timeout_secs=5)[EXPERIENCE_TABLE]
            size = table.current_size - len(misfits)
            if size <= 0:
                break
            for sample in client.sample(EXPERIENCE_TABLE, num_samples=size, emit_timesteps=False):
                if not _fits(sample.data, table.signature):
                    misfits.add(sample.info.key)
                    continue
                row = tree.unflatten_as(table.signature, sample.data)
                chunks.setdefault(int(row["chunk"][0]), {"acted_at": row["acted_at"], "step": row["step"]})
            num_draws += size
        if misfits:
            logging.warning(
                "%d items in the table '%s' at %s are not this experiment's and are left out: some other client "
                "inserts there. Keep its port on a network you trust.",
                len(misfits),
                EXPERIENCE_TABLE,
                self._address,
            )
        self._known_chunks.update(dict.fromkeys(chunks))
        return chunks

    def _dataset(self, table: str, *, rate_limiter_timeout_ms: int, in_flight: int = 2) -> reverb.TrajectoryDataset:
        return reverb.TrajectoryDataset.from_table_signature(
            self._address,
            table,
            max_in_flight_samples_per_worker=in_flight,
            num_workers_per_iterator=1,
            rate_limiter_timeout_ms=rate_limiter_timeout_ms,
            get_signature_timeout_secs=5,
        )
