"""Resident replay: the learner keeps the replay beside its compute and draws batches inside the compiled loop.

collect actors --chunks--> [stream, a queue] --> learner's mirror --windows--> agent.train
               \\--chunks--> [experience, durable] --> refills the mirror of a restarted learner
                                              <-- the learner gives a restarted server back what it lost

Of several replay servers each has both tables. An actor writes to one, the learner reads all.

A chunk is what one actor's environments did in a row of steps: [num_environments, length, ...]. It needs no other: the
last `num_steps - 1` steps of one open the next, so each window of an episode lies in exactly one chunk, as each is
exactly one item in a stock TF-Agents table.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import heapq
import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Optional

import gin
import numpy as np
import reverb
import tensorflow as tf
import tree
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import StepType

from actorlearner.replay.base import Sampling, describe_account
from actorlearner.replay.chunk_checks import MAX_OF_OWN, ChunkCheck
from actorlearner.replay.durable_table import EXPERIENCE_TABLE, ChunkWriter, Losses, read_chunks
from actorlearner.replay.mirror import Block, Mirror, Place, find_starts
from actorlearner.replay.moments import Moments, moments_of
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.configuration import PositiveFloat, PositiveInt
from actorlearner.runtime.devices import compute_devices, free_host_bytes
from actorlearner.runtime.lifecycle import ExitCode, RoleError, find_reason
from actorlearner.runtime.messages import Unreachable, without_tuning
from actorlearner.runtime.row_checks import say_left_out
from actorlearner.runtime.tls.tunnel import reach

STREAM_TABLE = "stream"

MAX_CHUNK_SECS = 30.0
"""However empty, a chunk is sent after this time: the learner waits for it."""

MAX_KNOWN_CHUNKS = 100_000
"""How many chunks are remembered, so that none is taken in twice."""

RESTORE_SILENT_SECS = 10.0
"""So long the server may hand out nothing while the mirror is filled; then filling begins anew."""

LOOK_FOR_LOSSES_SECS = 2.0
"""Time between two looks whether a replay server has been restarted and lacks what the mirror holds."""

SAVING_SECS = 60.0
"""So long a server may be silent while training goes on: it hands out and takes nothing while it saves a checkpoint."""

GIVE_BACK_CHUNKS = 32
"""So many chunks are given back at a time; while they are read from the mirror nothing is written to it."""

FIRST_RETRY_SECS, MAX_RETRY_SECS = 1.0, 60.0
"""Time until what could not be given back is tried again: twice as long with each failure in a row."""

LOOK_SECS = 0.02
"""After so long a reading thread looks again whether there is room, and whether the learner has caught up."""


@gin.configurable("resident_replay", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class ResidentReplay:
    """Uniform experience replay (Lin, 1992) held by the learner, mirrored by a table on the server.

    Attributes:
      replay_buffer_capacity: Windows the mirror holds at most; with two-step windows a window is a transition.
      samples_per_insert: Overrides the ratio that `collect_steps_per_iteration` and `batch_size` give.
      error_buffer: How many samples the ratio may be off at any moment; None takes those of one compiled call.
      chunk_length: Steps an actor sends in one piece, all its environments together; never less than three windows'
        length for each environment.
      chunk_secs: A chunk with half the windows of a full one is sent after this time, in seconds. The durable table has
        room for so many as the mirror holds. Emptier ones are sent after `MAX_CHUNK_SECS`: where steps take longer than
        half a second, lower `chunk_length`, or a restarted learner gets back a part of what it had.
      stream_length: Chunks that wait in the queue; when it is full, actors wait.
    """

    replay_buffer_capacity: PositiveInt = 100_000
    samples_per_insert: Optional[PositiveFloat] = None
    error_buffer: Optional[PositiveFloat] = None
    chunk_length: PositiveInt = 100
    chunk_secs: PositiveFloat = 1.0
    stream_length: PositiveInt = 4

    can_lock_step: ClassVar[bool] = True
    can_spread: ClassVar[bool] = True

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
        signature = {
            "acted_at": tf.TensorSpec((None,), tf.int64),
            "chunk": tf.TensorSpec((), tf.int64),
            "ends_run": tf.TensorSpec((None, None), tf.bool),
            "length": tf.TensorSpec((), tf.int64),
            "step": tensor_spec.add_outer_dim(tensor_spec.add_outer_dim(step_spec)),
        }
        return {EXPERIENCE_TABLE: signature, STREAM_TABLE: signature}

    def make_tables(self, step_spec: Any, sampling: Sampling) -> list[reverb.Table]:
        """Returns the queue and the durable table. See `Replay.make_tables`."""
        signatures = self.table_signatures(step_spec)
        return [
            reverb.Table.queue(STREAM_TABLE, max_size=self.stream_length, signature=signatures[STREAM_TABLE]),
            reverb.Table(
                EXPERIENCE_TABLE,
                sampler=reverb.selectors.Uniform(),
                remover=reverb.selectors.Fifo(),
                max_size=self._num_durable_chunks(sampling),
                rate_limiter=reverb.rate_limiters.MinSize(1),
                signature=signatures[EXPERIENCE_TABLE],
            ),
        ]

    def _num_rows(self, sampling: Sampling) -> int:
        """Returns how many steps of each environment a full chunk holds."""
        return max(3 * sampling.num_steps, math.ceil(self.chunk_length / sampling.num_environments))

    def _num_durable_chunks(self, sampling: Sampling) -> int:
        """Returns room for twice what the mirror holds: short episodes and slow environments leave chunks half full."""
        windows_per_chunk = sampling.num_environments * (self._num_rows(sampling) - sampling.num_steps + 1)
        return math.ceil(2 * self.replay_buffer_capacity / windows_per_chunk)

    def _make_check(self, step_spec: Any, sampling: Sampling, capacity: int) -> ChunkCheck:
        own = sampling.num_environments * self._num_rows(sampling)
        return ChunkCheck(step_spec, max(own, min(MAX_OF_OWN * own, capacity)))  # larger ones fit into no mirror

    def is_warm(self, servers: ReplayServers, initial_collect_steps: int) -> Optional[bool]:
        """Returns None: only the learner knows how many windows it was sent."""
        del servers, initial_collect_steps
        return None

    def make_sink(self, servers: ReplayServers, sampling: Sampling) -> ChunkSink:
        """Returns a writer of chunks. See `Replay.make_sink`."""
        return ChunkSink(
            servers,
            sampling.num_steps,
            sampling.num_environments,
            self._num_rows(sampling),
            math.inf if sampling.lock_step else self.chunk_secs,
            sampling.windows_may_end_early,
        )

    def make_source(
        self, servers: ReplayServers, step_spec: Any, sampling: Sampling, strategy: tf.distribute.Strategy
    ) -> ResidentSource:
        """Returns the mirror, a share of it on each replica's device, with a thread that reads each server's queue.

        Raises:
          RoleError: It does not fit (USAGE).
        """
        devices = compute_devices(strategy)
        capacity = math.ceil(self.replay_buffer_capacity / len(devices))
        num_bytes = Mirror.num_bytes_for(step_spec, sampling.num_steps, capacity)
        logging.info(
            "the replay holds %s transitions (windows of %d steps) beside the learner: %.1f MB on each of %s",
            f"{self.replay_buffer_capacity:,}",
            sampling.num_steps,
            num_bytes / 1e6,
            ", ".join(devices),
        )
        if "cpu" in devices[0].lower():
            self._check_fits(num_bytes * len(devices), free_host_bytes(), "the host")
        try:
            mirrors = [
                Mirror(
                    step_spec,
                    sampling.num_steps,
                    capacity,
                    device,
                    windows_may_end_early=sampling.windows_may_end_early,
                )
                for device in devices
            ]
        except tf.errors.ResourceExhaustedError as error:
            self._check_fits(num_bytes, 0, devices[0])
            raise AssertionError from error
        ratio = self.samples_per_insert or sampling.samples_per_insert
        return ResidentSource(
            servers,
            mirrors,
            batch_size=sampling.batch_size,
            initial_collect_steps=sampling.initial_collect_steps,
            samples_per_insert=ratio,
            error_buffer=self.error_buffer or max(sampling.num_updates_per_call * sampling.batch_size, ratio),
            num_durable_chunks=self._num_durable_chunks(sampling),
            check=self._make_check(step_spec, sampling, capacity),
        )

    def _check_fits(self, num_bytes: int, free: int, where: str) -> None:
        if num_bytes > free:
            raise RoleError(
                f"resident_replay.replay_buffer_capacity = {self.replay_buffer_capacity:,} takes {num_bytes / 1e9:.1f} "
                f"GB of memory, more than is free on {where}"
                + (f": {free / 1e9:.1f} GB" if free else "")
                + ". Lower it, or let the server hold and sample it: experiment.replay = @uniform_replay().",
                ExitCode.USAGE,
            )


class ChunkSink:
    """Writes what one actor's environments do as chunks. See `TrajectorySink`.

    Each chunk goes to the server that is the actor's own at that moment. If that is another before the chunk is
    confirmed, it goes there as well, under its number: the learner leaves out what it has had.
    """

    def __init__(
        self,
        servers: ReplayServers,
        num_steps: int,
        num_environments: int,
        num_rows: int,
        chunk_secs: float,
        windows_may_end_early: bool = False,
    ):
        self.num_chunks = 0
        self._num_steps = num_steps
        self._num_environments = num_environments
        self._num_rows = num_rows
        self._chunk_secs = chunk_secs
        self._servers = servers
        self._address = servers.mine()
        self._writer = _make_writer(self._address)
        self._columns: Any = None  # leaves of a chunk, [num_rows, num_environments, ...]
        self._acted_at = np.zeros(num_rows, np.int64)
        self._ends_run = np.zeros((num_rows, num_environments), bool)
        # Where windows may end early, which rows are the last of an episode.
        self._is_last = np.zeros((num_rows, num_environments), bool) if windows_may_end_early else None
        self._length = 0  # rows filled; a new chunk begins with the last ones of the chunk before
        self._opened_at = 0.0
        self._sending: Any = None  # the chunk that is not confirmed yet

    def append(self, steps: Any, acted_at: int, crashed: np.ndarray) -> None:
        """Adds one step per environment and hands the chunk to the writer when it is full, or half full and old."""
        assert self._sending is None, "append while blocked: ask is_blocked first"
        now = time.monotonic()
        leaves = tree.flatten(steps)
        if self._columns is None:
            self._structure = steps
            self._columns = [np.zeros((self._num_rows, *leaf.shape), leaf.dtype) for leaf in leaves]
        if not self._length:
            self._opened_at = now
        row = self._length
        for column, leaf in zip(self._columns, leaves):
            column[row] = leaf
        self._acted_at[row] = acted_at
        np.equal(steps.step_type, StepType.LAST, out=self._ends_run[row])
        if self._is_last is not None:
            self._is_last[row] = self._ends_run[row]
        if crashed.any():
            self._ends_run[row] |= crashed  # nothing leads from the row that is none ...
            if row:
                self._ends_run[row - 1] |= crashed  # ... nor into it
        self._length += 1
        if self._length == self._num_rows or self._is_due(now - self._opened_at):
            self._send()
            self._opened_at = now

    def _is_due(self, age_secs: float) -> bool:
        if age_secs <= self._chunk_secs or self._length < self._num_steps:
            return False
        most = self._num_environments * (self._num_rows - self._num_steps + 1)
        is_last = None if self._is_last is None else self._is_last[: self._length].T
        num_windows = np.count_nonzero(find_starts(self._ends_run[: self._length].T, self._num_steps, is_last))
        return 2 * num_windows >= most or age_secs > max(self._chunk_secs, MAX_CHUNK_SECS)

    def _send(self) -> None:
        length, kept = self._length, self._num_steps - 1
        # Always whole arrays, though only `length` rows count: a writer's columns must keep their shapes.
        columns = [np.ascontiguousarray(np.swapaxes(column, 0, 1)) for column in self._columns]
        # Ordered by time, so that a restarted learner knows which are the oldest; the last bits tell actors apart.
        number = (time.time_ns() & ~0xFFFF) | secrets.randbits(16)
        self._sending = {
            "acted_at": self._acted_at.copy(),
            "chunk": np.int64(number),
            "ends_run": np.ascontiguousarray(self._ends_run.T),
            "length": np.int64(length),
            "step": tree.unflatten_as(self._structure, columns),
        }
        self._write()
        is_last = [] if self._is_last is None else [self._is_last]
        for array in (*self._columns, self._acted_at, self._ends_run, *is_last):
            array[:kept] = array[length - kept : length].copy()
        self._length = kept
        self.num_chunks += 1

    def _write(self) -> None:
        address = self._servers.mine()
        if address != self._address:
            logging.info("writing to the replay server at %s from here on", address)
            # With its server away it takes about a second to close, and what it still holds need not arrive.
            threading.Thread(target=self._writer.close, name="closing writer", daemon=True).start()
            self._address, self._writer = address, _make_writer(address)
        self._writer.append(self._sending)
        trajectory = tree.map_structure(lambda column: column[-1], self._writer.history)
        # First the durable table: what reaches the learner must be there to come back from.
        for table in (EXPERIENCE_TABLE, STREAM_TABLE):
            self._writer.create_item(table, priority=1.0, trajectory=trajectory)

    def is_blocked(self) -> bool:
        """Returns whether the queue has not taken the last chunk. See `TrajectorySink.is_blocked`."""
        if self._sending is None:
            return False
        try:
            self._writer.flush(timeout_ms=500)
        except reverb.errors.DeadlineExceededError:
            if self._servers.mine() != self._address:
                self._write()
            return True
        self._sending = None
        return False

    def close(self, timeout_secs: float) -> None:
        """Sends the chunk under way if the one before was taken; blocks at most `timeout_secs` seconds."""
        if self._sending is None and self._length >= self._num_steps:
            self._send()
        if self._sending is not None:
            try:
                self._writer.flush(timeout_ms=int(timeout_secs * 1000))
                self._sending = None
            except (reverb.errors.ReverbError, RuntimeError):
                logging.debug("the last chunk was not confirmed")


def _make_writer(address: str) -> reverb.TrajectoryWriter:
    return reverb.Client(reach(address)).trajectory_writer(num_keep_alive_refs=1, validate_items=False)


def _pack_ids(numbers: Sequence[int]) -> str:
    return base64.b64encode(np.array(numbers, np.int64).tobytes()).decode()


def _unpack_ids(text: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), np.int64).tolist()


def _moments_at_starts(chunk: Mapping[str, Any], block: Block) -> Moments:
    """Returns the moments of the observations at which a window begins: of those acted on, each lies in one chunk."""
    (observations,) = tree.flatten(chunk["step"].observation)
    rows = observations[:, : int(chunk["length"])]
    return moments_of(rows.reshape(-1, *rows.shape[2:])[block.starts])


class ResidentSource:
    """Feeds the mirrors from the queues and keeps samples per insert, in both directions. See `BatchSource`.

    ahead = (inserts - initial_collect_steps) * samples_per_insert - samples stays within the error buffer: beyond it
    no queue is read, they fill, and hold the actors back; below it no update is allowed.

    A thread for each server reads its queue and writes each chunk into its mirror while the compiled loop runs; between
    two calls it is only revealed. A server that was away when this process began, or that joined since, is first read
    whole, as the others were at the beginning. One that died comes back with its last checkpoint: what the mirror got
    from it since, it is given back.
    """

    can_fuse = True

    def __init__(
        self,
        servers: ReplayServers,
        mirrors: Sequence[Mirror],
        *,
        batch_size: int,
        initial_collect_steps: int,
        samples_per_insert: float,
        error_buffer: float,
        check: ChunkCheck,
        num_durable_chunks: int = MAX_KNOWN_CHUNKS,
    ):
        """Args:
        servers: To read.
        mirrors: One for each replica, which draws its part of a batch from it; chunks go to them in turn.
        batch_size: Windows in one update, over all replicas together.
        initial_collect_steps: Windows inserted before training begins.
        samples_per_insert: The ratio to keep.
        error_buffer: How many samples it may be off.
        check: Tells strangers' items from chunks, both in the queues and in the durable tables.
        num_durable_chunks: Chunks that a server holds at most.
        """
        self.handle = tf.constant(0)  # nothing to pass: the mirrors are captured
        self._servers = servers
        self._mirrors = mirrors
        self._batch_size = batch_size
        self._initial_collect_steps = initial_collect_steps
        self._samples_per_insert = samples_per_insert
        self._error_buffer = error_buffer
        self._check = check
        self._num_durable_chunks = num_durable_chunks
        self._inserts = self._samples = 0
        self.num_chunks = 0  # those the mirrors hold or held
        self.num_given_back = 0
        self._turns = itertools.count()  # of the mirrors
        self._num_staged = 0  # windows written to the mirrors and not revealed yet
        self._moments: list[Moments] = []  # of the new chunks written since they were last taken
        self._counts_observations = False
        self._misfit: Optional[ValueError] = None  # a chunk that no mirror can hold
        self._known_chunks: dict[int, bool] = {}  # counted as inserts, oldest first: whether they were written too
        self._counted_before = 0  # what servers bring back with lower numbers is counted as inserts, known or not
        self._losses: dict[str, Losses] = {}  # by address
        # By address, what was read of a server that went away meanwhile: the next one may not have it any more.
        self._half_read: dict[str, dict[int, Any]] = {}
        self._places: dict[int, Place] = {}  # of the chunks in the mirrors, by number, oldest first
        self._changed = threading.Condition()  # guards the counts, the chunks known, and their places
        # Mirrors have one writer at a time, and what it took counts for the next. Held for moments, as others wait.
        self._writing = threading.Lock()
        self._closing = False

    def restore(self, counts: Mapping[str, Any], on_progress: Callable[[], object] = lambda: None) -> None:
        """Goes on from a checkpoint's counts; the mirror is filled from the durable tables. See `BatchSource.restore`.

        What the servers hold but the checkpoint did not count is counted now, so the samples-per-insert account is
        exact whichever of them was saved later. A server that is away is read when it is back. May be called again
        after it raised.

        Raises:
          Unreachable: All servers are away; nothing was changed.
        """
        chunks, were_read = self._read_all_experience(on_progress)
        # The checkpoint counts the chunks it knew; those that came to a server later are inserts as well. Without a
        # checkpoint all are: what a learner before this one was sent still counts for the warm-up.
        self._known_chunks = dict.fromkeys(reversed(_unpack_ids(counts.get("chunks", ""))), False)
        self._counted_before = counts.get("counted_before", 0)
        self._inserts = counts.get("inserts", 0)
        self._samples = counts.get("samples", 0)
        num_new, have_come = 0, bool(chunks)
        for number in sorted(chunks):  # in the order they were sent: the oldest leave first
            address, chunk = chunks.pop(number)  # not to hold the replay twice
            num_new += self._stage(chunk, address, make_room=self._ingest)
            self._ingest()
            on_progress()
        if have_come:
            logging.info(
                "%d windows came back from the replay server%s, %d of them inserted after the checkpoint",
                self._num_windows(),
                "s" if len(self._servers.all()) > 1 else "",
                num_new,
            )

        def start_reading(address: str) -> None:
            arguments = (address, address in were_read)
            threading.Thread(target=self._read, args=arguments, name=f"ingest {address}", daemon=True).start()

        self._servers.for_each(start_reading)

    def counts(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        with self._changed:
            # From the newest on, which is quick; of one age as many as the servers can bring back.
            most = self._max_durable_chunks()  # asked once: a server may join meanwhile
            known = heapq.nlargest(most, reversed(self._known_chunks))
            inserts = self._inserts + self._num_staged
            # Numbers grow with time. What is older than those that are listed is counted: a server that died brings
            # back chunks from before the many that it lost.
            are_all = len(known) < most
            counted_before = self._counted_before if are_all else max(self._counted_before, known[-1])
        chunks = {"chunks": _pack_ids(known), "counted_before": counted_before}
        return {"inserts": inserts, "samples": self._samples, **chunks}

    def draw(self, handle: Any) -> tuple[Any, ...]:
        """Returns nothing: each replica draws its own part."""
        return ()

    def unpack(self) -> tuple[Any, tf.Tensor]:
        """Returns one replica's batch, drawn from its mirror. See `BatchSource.unpack`."""
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return self._own_mirror().draw(self._batch_size // num_replicas)

    def _own_mirror(self) -> Mirror:
        if len(self._mirrors) == 1:
            return self._mirrors[0]
        replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        if replica is None:  # the first in its place would leave the others' shares undrawn, without a word
            raise AssertionError(f"a replica cannot tell which of the {len(self._mirrors)} shares is its own")
        return self._mirrors[int(replica)]

    def allow(self, num_updates: int) -> int:
        """Returns how many updates may be made now, at most `num_updates`; takes in what has arrived first."""
        if not self.is_ready():
            return 0
        # Only what may be drawn counts: how far the reading thread is depends on the clock, lock-step must not.
        spare = self._ahead(self._inserts) + self._error_buffer
        return max(0, min(num_updates, int(spare // self._batch_size)))

    def note_updates(self, num_updates: int) -> None:
        """Counts the samples of updates that were made."""
        # Wakes nobody: the reading threads would take the interpreter while the loop wants to begin the next call. They
        # look again within `LOOK_SECS`, most likely during that call.
        with self._changed:
            self._samples += num_updates * self._batch_size

    def await_data(self, secs: float) -> None:
        """Returns when something arrived, or after `secs` seconds."""
        with self._changed:
            self._changed.notify_all()  # here the loop has nothing to do: whoever reads may go on at once
            self._changed.wait_for(lambda: self._num_staged > 0, timeout=secs)

    def is_ready(self) -> bool:
        """Returns whether training may begin, or go on after a restart; takes in what has arrived first."""
        self._ingest()
        if not all(mirror.num_windows for mirror in self._mirrors):
            return False
        return self._samples > 0 or self._inserts >= self._initial_collect_steps

    def account(self) -> dict[str, Any]:
        """Returns how the replay stands, in figures. See `BatchSource.account`."""
        servers, away = self._servers.all(), self._servers.away()
        several = {"servers": {address: address not in away for address in servers}} if len(servers) > 1 else {}
        with self._changed:  # what is just being revealed would else count twice
            return {
                "held": self._num_windows(),
                "inserts": self._inserts + self._num_staged,
                "samples": self._samples,
                "ahead": self._ahead(),
                "error_buffer": self._error_buffer,
                **several,
            }

    def describe(self) -> str:
        """Returns how the replay stands, in words; never blocks."""
        account = describe_account(
            self._num_windows(),
            self._inserts,
            self._samples,
            needed=self._initial_collect_steps,
            ahead=self._ahead(),
            least=self._batch_size - self._error_buffer,
            most=self._error_buffer,
        )
        return account + self._servers.describe()

    def renew(self) -> None:
        """Nothing to renew: the readers look after themselves."""

    def close(self) -> None:
        """Stops the readers; never blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _num_windows(self) -> int:
        return sum(mirror.num_windows for mirror in self._mirrors)

    def _ahead(self, inserts: Optional[int] = None) -> float:
        """Returns the samples that `inserts` allow less those made; all that were taken in count by default."""
        inserts = self._inserts + self._num_staged if inserts is None else inserts
        return (inserts - self._initial_collect_steps) * self._samples_per_insert - self._samples

    def _ingest(self) -> None:
        """Lets the next call draw what has arrived. Raises `ValueError` when a chunk fits into no mirror."""
        if self._misfit is not None:
            raise self._misfit
        for mirror in self._mirrors:
            num_chunks, num_windows = mirror.reveal()
            with self._changed:
                self.num_chunks += num_chunks
                self._inserts += num_windows
                self._num_staged -= num_windows

    def _read(self, address: str, was_read: bool) -> None:
        """Takes in what the server at `address` holds, unless that `was_read`, and from then on what it is sent."""
        is_looked_after = False
        while not self._closing:
            try:
                if not was_read:
                    self._take_in_late(address)
                    was_read = True
                if not is_looked_after:  # only now: what is not taken in yet cannot be given back
                    name = f"ingest losses {address}"
                    threading.Thread(target=self._look_after, args=(address,), name=name, daemon=True).start()
                    is_looked_after = True
                for sample in self._read_queue(address):
                    chunk = tree.map_structure(lambda tensor: tensor.numpy(), sample.data)
                    why = self._check.find_misfit(tree.flatten(chunk), sample.data)
                    if why:
                        say_left_out(address, STREAM_TABLE, why)
                    else:
                        self._stage(chunk, address, make_room=self._await_reveal, is_held_back=True)
                    if self._closing:
                        return
            except ValueError as error:
                self._misfit = error
                return
            except tf.errors.InvalidArgumentError as error:
                say_left_out(address, STREAM_TABLE, find_reason(error))
            except (tf.errors.OpError, reverb.errors.ReverbError, Unreachable, RuntimeError) as error:
                logging.debug("reading from the replay server at %s: %s", address, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=0.5)

    def _take_in_late(self, address: str) -> None:
        self._losses_at(address).may_be()
        chunks = self._read_whole(address, silent_secs=SAVING_SECS)
        num_new = sum(self._stage(chunks[number], address, make_room=self._await_reveal) for number in sorted(chunks))
        if chunks and not self._closing:
            logging.info(
                "%d chunks came back from the replay server at %s, with %d windows inserted after the checkpoint",
                len(chunks),
                address,
                num_new,
            )

    def _read_whole(self, address: str, **settings: Any) -> dict[int, Any]:
        """Returns a server's chunks, with those of readings that failed. Settings and errors are `read_chunks`'s."""
        half_read = self._half_read.setdefault(address, {})
        chunks = read_chunks(address, find_misfit=self._check.find_misfit, into=half_read, **settings)
        del self._half_read[address]
        return chunks

    def _losses_at(self, address: str) -> Losses:
        return self._losses.setdefault(address, Losses(address))

    def _look_after(self, address: str) -> None:
        """Gives the server at `address` back what it lost, whenever it began anew."""
        losses, wait_secs, retry_secs = self._losses_at(address), LOOK_FOR_LOSSES_SECS, FIRST_RETRY_SECS
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, timeout=wait_secs):
                    return
            try:
                may_be_lost = losses.may_be()
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
        find_misfit = self._check.find_misfit
        there = read_chunks(address, silent_secs=SAVING_SECS, has_data=False, find_misfit=find_misfit).keys()
        newest = heapq.nlargest(self._num_durable_chunks, places.keys() | there)  # others it would have dropped
        lost = sorted(set(newest) - there)
        num_given = 0
        try:
            with contextlib.closing(ChunkWriter(address)) as writer:
                while lost and not self._closing:
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

    def _stage(
        self, chunk: Mapping[str, Any], address: str, make_room: Callable[[], None], is_held_back: bool = False
    ) -> int:
        """Writes a chunk to its mirror and returns how many inserts it adds; 0 if it was counted before, or closing.

        A restored server hands some out twice, and what a server did not confirm before it went away was sent to
        another too.

        Args:
          chunk: As it was sent.
          address: The server it came from.
          make_room: Called, again and again, while the mirror has no room.
          is_held_back: Whether it comes from an actor just now, and waits while the actors are too far ahead.
        """
        number = int(chunk["chunk"])
        if self._known_chunks.get(number):
            return 0
        mirror = self._mirrors[next(self._turns) % len(self._mirrors)]
        block = mirror.make_block(chunk)
        while not self._closing:
            if is_held_back:
                self._await_account()
            with self._writing:
                if self._known_chunks.get(number):
                    return 0
                is_its_turn = not is_held_back or self._ahead() <= self._error_buffer  # or another server's was quicker
                if is_its_turn and mirror.has_room(block, more_follow=is_held_back):
                    return self._write(mirror, block, chunk, address, is_held_back)
            if is_its_turn:
                make_room()
        return 0

    def _write(self, mirror: Mirror, block: Block, chunk: Mapping[str, Any], address: str, is_held_back: bool) -> int:
        number, num_windows = int(chunk["chunk"]), len(block.starts)
        # The bound is for what servers bring back; an actor whose clock is behind goes on sending low numbers.
        is_new = number not in self._known_chunks and (is_held_back or number >= self._counted_before)
        moments = [_moments_at_starts(chunk, block)] if is_new and self._counts_observations else []
        first_row = mirror.write(block)
        with self._changed:
            self._moments += moments
            self._places[number] = Place(mirror, first_row, int(chunk["length"]), chunk["ends_run"], address)
            while not next(iter(self._places.values())).is_held():
                del self._places[next(iter(self._places))]
            self._known_chunks[number] = True
            if len(self._known_chunks) > max(MAX_KNOWN_CHUNKS, self._max_durable_chunks()):
                forgotten = next(iter(self._known_chunks))
                del self._known_chunks[forgotten]
                self._counted_before = max(self._counted_before, forgotten + 1)
            self._num_staged += num_windows
            if not is_new:  # the checkpoint counts it: together these two stay what they were
                self._inserts -= num_windows
            self._changed.notify_all()
        return num_windows if is_new else 0

    def count_observations(self) -> None:
        self._counts_observations = True

    def take_moments(self) -> list[Moments]:
        """Returns those of the observations that may be drawn since the last call. See `BatchSource.take_moments`."""
        with self._changed:
            moments, self._moments = self._moments, []
        return moments

    def look_first(self) -> None:
        """Nothing to do: what was collected is counted as it comes."""

    def standing_still(self) -> contextlib.AbstractContextManager[Any]:
        """Lets nothing be taken in meanwhile: what `counts` and `take_moments` say is of one moment."""
        return self._writing

    def _max_durable_chunks(self) -> int:
        return self._num_durable_chunks * len(self._servers.all())

    def _await_account(self) -> None:
        """Returns when the actors are not too far ahead, or closing."""
        with self._changed:
            while not (self._closing or self._ahead() <= self._error_buffer):
                self._changed.wait(timeout=LOOK_SECS)

    def _await_reveal(self) -> None:
        with self._changed:
            self._changed.wait(timeout=LOOK_SECS)

    def _read_all_experience(
        self, on_progress: Callable[[], object]
    ) -> tuple[dict[int, tuple[str, Any]], Sequence[str]]:
        """Returns all durable tables' chunks and their servers by number, and the servers read; others are away.

        Raises:
          Unreachable: All are away.
        """
        chunks: dict[int, tuple[str, Any]] = {}
        addresses, away = self._servers.all(), self._servers.away()
        were_read: list[str] = []
        for address in addresses:
            try:
                if address in away:
                    raise Unreachable(f"no Reverb server answers at {address}")
                self._losses_at(address).may_be()
                read = self._read_whole(address, silent_secs=RESTORE_SILENT_SECS, on_chunk=on_progress)
                chunks.update((number, (address, chunk)) for number, chunk in read.items())
                were_read.append(address)
            except Unreachable as error:
                if address == addresses[-1] and not were_read:
                    raise
                logging.warning("%s; what it holds is read when it is back", error)
        return chunks, were_read

    def _read_queue(self, address: str) -> tf.data.Dataset:
        """Returns what the queue hands out, one chunk after another; ends when nothing came for a second."""
        dataset = reverb.TrajectoryDataset.from_table_signature(
            reach(address),
            STREAM_TABLE,
            max_in_flight_samples_per_worker=2,
            num_workers_per_iterator=1,
            rate_limiter_timeout_ms=1_000,
            get_signature_timeout_secs=5,
        )
        return without_tuning(dataset)
