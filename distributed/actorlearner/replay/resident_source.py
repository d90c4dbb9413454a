"""The learner's side of resident replay: chunks of every replay server in, batches out.

collect actors --chunks--> [stream, a queue] --> [mirror --windows--> agent.train]
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import reverb
import tensorflow as tf
import tree

from actorlearner.replay.chunk_checks import ChunkCheck
from actorlearner.replay.chunks import STREAM_TABLE
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.giving_back import ChunkWriter, Losses
from actorlearner.replay.mirror import Block, Mirror, Place
from actorlearner.replay.moments import Moments, moments_of
from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.tables import describe_account
from actorlearner.runtime.lifecycle import find_reason
from actorlearner.runtime.messages import Unreachable, without_tuning
from actorlearner.runtime.row_checks import say_left_out
from actorlearner.runtime.tls.tunnel import reach

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
