"""The learner's side of the resident replay: chunks from every replay server in, batches out.

collect actors --chunks--> [stream, a queue] --> [mirror --windows--> agent.train]
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import reverb
import tensorflow as tf
import tree

from actorlearner.replay.account import MAX_KNOWN_CHUNKS, Account
from actorlearner.replay.base import Batch, BatchSource
from actorlearner.replay.chunk_checks import ChunkCheck
from actorlearner.replay.chunks import STREAM_TABLE
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.giving_back import SAVING_SECS, GivingBack
from actorlearner.replay.mirror import Block, Mirror, Place
from actorlearner.replay.moments import Moments, moments_of
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.lifecycle import find_reason
from actorlearner.runtime.messages import Unreachable, without_tuning
from actorlearner.runtime.row_checks import say_left_out
from actorlearner.runtime.tls.tunnel import reach

RESTORE_SILENT_SECS = 10.0
"""If the server sends nothing for this many seconds while the mirror is filled, filling restarts."""


LOOK_SECS = 0.02
"""How often a waiting reader checks for room, and whether the learner has caught up, in seconds."""


def _moments_at_starts(chunk: Mapping[str, Any], block: Block) -> Moments:
    """Returns the moments of the observations at which a window starts; each lies in exactly one chunk."""
    (observations,) = tree.flatten(chunk["step"].observation)
    rows = observations[:, : int(chunk["length"])]
    return moments_of(rows.reshape(-1, *rows.shape[2:])[block.starts])


class ResidentSource(BatchSource):
    """Feeds the mirrors from the queues and keeps samples per insert, in both directions. See `BatchSource`.

    The account stays within its error buffer: above it, queues are not read, so they fill up and block the actors;
    below it, no update is allowed.

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
        servers: The servers to read.
        mirrors: One for each replica, which draws its part of a batch from it; chunks are distributed in turn.
        batch_size: Windows in one update, over all replicas together.
        initial_collect_steps: Windows inserted before training begins.
        samples_per_insert: The ratio to keep.
        error_buffer: How many samples it may be off.
        check: Recognises foreign items, in the queues and in the durable tables.
        num_durable_chunks: Chunks that a server holds at most.
        """
        self.handle = tf.constant(0)  # unused: the function captures the mirrors
        self._servers = servers
        self._mirrors = mirrors
        self._batch_size = batch_size
        self._account = Account(
            batch_size=batch_size,
            initial_collect_steps=initial_collect_steps,
            samples_per_insert=samples_per_insert,
            error_buffer=error_buffer,
        )
        self._check = check
        self._num_durable_chunks = num_durable_chunks
        self.num_chunks = 0  # number of chunks written to the mirrors so far
        self._turns = itertools.count()  # distributes chunks over the mirrors
        self._moments: list[Moments] = []  # of new chunks, since the last `take_moments`
        self._counts_observations = False
        self._misfit: Optional[ValueError] = None  # error for a chunk that no mirror can hold
        # By address, chunks read from a server that went away during the read: its next incarnation may lack them.
        self._half_read: dict[str, dict[int, Any]] = {}
        self._changed = threading.Condition()  # guards the account and the places of chunks
        # One writer at a time, whose inserts count for the next. Hold it only briefly, because others wait.
        self._writing = threading.Lock()
        self._closing = False
        self._giving_back = GivingBack(
            changed=self._changed,
            writing=self._writing,
            is_closing=lambda: self._closing,
            find_misfit=check.find_misfit,
            num_durable_chunks=num_durable_chunks,
        )

    @property
    def num_given_back(self) -> int:
        return self._giving_back.num_given_back

    def restore(self, counts: Mapping[str, Any], on_progress: Callable[[], object] = lambda: None) -> None:
        """Restores the counts of a checkpoint and fills the mirror from the durable tables. See `BatchSource.restore`.

        What the servers hold but the checkpoint did not count is counted now, so the samples-per-insert account is
        exact whichever of them was saved later. A server that is away is read when it is back. May be called again
        after it raised.

        Raises:
          Unreachable: All servers are away; nothing was changed.
        """
        chunks, were_read = self._read_all_experience(on_progress)
        self._account.restore(counts)
        num_new, have_come = 0, bool(chunks)
        for number in sorted(chunks):  # in the order of sending, so that the oldest leave first
            address, chunk = chunks.pop(number)  # pop, to avoid holding the replay twice
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
        """Returns what a checkpoint stores."""
        with self._changed:
            return self._account.counts(self._max_durable_chunks())

    def unpack(self, *parts: Any) -> Batch:
        """Returns one replica's batch, drawn from its own mirror. See `BatchSource.unpack`."""
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return Batch(*self._own_mirror().draw(self._batch_size // num_replicas))

    def _own_mirror(self) -> Mirror:
        if len(self._mirrors) == 1:
            return self._mirrors[0]
        replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        if replica is None:  # defaulting to the first would silently leave the other shares undrawn
            raise AssertionError(f"the replica has no number to choose one of the {len(self._mirrors)} mirrors by")
        return self._mirrors[int(replica)]

    def allow(self, num_updates: int) -> int:
        """Returns how many updates may be made now, at most `num_updates`; reveals arrived chunks first."""
        if not self.is_ready():
            return 0
        return min(num_updates, self._account.num_updates_allowed())

    def note_updates(self, num_updates: int) -> None:
        """Counts the samples of updates that were made."""
        # Do not wake the readers: they would take the interpreter lock when the loop wants to start the next call. They
        # check again within `LOOK_SECS`, most likely during that call.
        with self._changed:
            self._account.note_updates(num_updates)

    def await_data(self, secs: float) -> None:
        """Blocks until data arrives, for at most `secs` seconds."""
        with self._changed:
            self._changed.notify_all()  # the loop is idle now, so wake the readers
            self._changed.wait_for(lambda: self._account.num_staged > 0, timeout=secs)

    def is_ready(self) -> bool:
        """Returns whether training may start or resume; reveals arrived chunks first."""
        self._ingest()
        if not all(mirror.num_windows for mirror in self._mirrors):
            return False
        return self._account.is_warm()

    def account(self) -> dict[str, Any]:
        """Returns the replay's account, in figures. See `BatchSource.account`."""
        servers, away = self._servers.all(), self._servers.away()
        several = {"servers": {address: address not in away for address in servers}} if len(servers) > 1 else {}
        with self._changed:  # otherwise chunks that are being revealed would count twice
            return {"held": self._num_windows(), **self._account.figures(), **several}

    def describe(self) -> str:
        """Returns the replay's account, in words; never blocks."""
        return self._account.describe(self._num_windows()) + self._servers.describe()

    def close(self) -> None:
        """Stops the readers; never blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _num_windows(self) -> int:
        return sum(mirror.num_windows for mirror in self._mirrors)

    def _ingest(self) -> None:
        """Reveals arrived chunks to the next call. Raises `ValueError` if a chunk fits into no mirror."""
        if self._misfit is not None:
            raise self._misfit
        for mirror in self._mirrors:
            num_chunks, num_windows = mirror.reveal()
            with self._changed:
                self.num_chunks += num_chunks
                self._account.reveal(num_windows)

    def _read(self, address: str, was_read: bool) -> None:
        """Reads what the server at `address` holds, unless that `was_read`, and then its queue."""
        is_looked_after = False
        while not self._closing:
            try:
                if not was_read:
                    self._take_in_late(address)
                    was_read = True
                if not is_looked_after:  # only now: a refill needs the chunks in the mirror
                    name, look_after = f"ingest losses {address}", self._giving_back.look_after
                    threading.Thread(target=look_after, args=(address,), name=name, daemon=True).start()
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
        self._giving_back.losses_at(address).has_losses()
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

    def _stage(
        self, chunk: Mapping[str, Any], address: str, make_room: Callable[[], None], is_held_back: bool = False
    ) -> int:
        """Writes a chunk to its mirror and returns the inserts it adds; 0 if it was counted before, or when closing.

        A restored server may send a chunk twice, and a chunk that a server did not confirm before it went away was also
        sent to another one.

        Args:
          chunk: As it was sent.
          address: The server it came from.
          make_room: Called repeatedly while the mirror has no room.
          is_held_back: Whether it comes from an actor's queue, and waits while the actors are too far ahead.
        """
        number = int(chunk["chunk"])
        if self._account.has_taken_in(number):
            return 0
        mirror = self._mirrors[next(self._turns) % len(self._mirrors)]
        block = mirror.make_block(chunk)
        while not self._closing:
            if is_held_back:
                self._await_account()
            with self._writing:
                if self._account.has_taken_in(number):
                    return 0
                # false if another server's chunk came first
                is_its_turn = not (is_held_back and self._account.are_actors_ahead())
                if is_its_turn and mirror.has_room(block, more_follow=is_held_back):
                    return self._write(mirror, block, chunk, address, is_held_back)
            if is_its_turn:
                make_room()
        return 0

    def _write(self, mirror: Mirror, block: Block, chunk: Mapping[str, Any], address: str, is_held_back: bool) -> int:
        number, num_windows = int(chunk["chunk"]), len(block.starts)
        is_new = self._account.is_new(number, from_actor=is_held_back)
        moments = [_moments_at_starts(chunk, block)] if is_new and self._counts_observations else []
        first_row = mirror.write(block)
        with self._changed:
            self._moments += moments
            place = Place(mirror, first_row, int(chunk["length"]), chunk["ends_run"], address)
            self._giving_back.note_place(number, place)
            self._account.take_in(number, num_windows, is_new, self._max_durable_chunks())
            self._changed.notify_all()
        return num_windows if is_new else 0

    def count_observations(self) -> None:
        self._counts_observations = True

    def take_moments(self) -> list[Moments]:
        """Returns the moments of observations revealed since the last call. See `BatchSource.take_moments`."""
        with self._changed:
            moments, self._moments = self._moments, []
        return moments

    def standing_still(self) -> contextlib.AbstractContextManager[Any]:
        """Stops ingestion meanwhile, so that `counts` and `take_moments` are of one moment."""
        return self._writing

    def _max_durable_chunks(self) -> int:
        return self._num_durable_chunks * len(self._servers.all())

    def _await_account(self) -> None:
        """Blocks until the actors are no longer too far ahead, or until closing."""
        with self._changed:
            while self._account.are_actors_ahead() and not self._closing:
                self._changed.wait(timeout=LOOK_SECS)

    def _await_reveal(self) -> None:
        with self._changed:
            self._changed.wait(timeout=LOOK_SECS)

    def _read_all_experience(
        self, on_progress: Callable[[], object]
    ) -> tuple[dict[int, tuple[str, Any]], Sequence[str]]:
        """Returns every durable table's chunks and their servers by number, and the servers that were read.

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
                self._giving_back.losses_at(address).has_losses()
                read = self._read_whole(address, silent_secs=RESTORE_SILENT_SECS, on_chunk=on_progress)
                chunks.update((number, (address, chunk)) for number, chunk in read.items())
                were_read.append(address)
            except Unreachable as error:
                if address == addresses[-1] and not were_read:
                    raise
                logging.warning("%s; its chunks are read when it is back", error)
        return chunks, were_read

    def _read_queue(self, address: str) -> tf.data.Dataset:
        """Returns the queue's chunks, one by one; ends when none came for a second."""
        dataset = reverb.TrajectoryDataset.from_table_signature(
            reach(address),
            STREAM_TABLE,
            max_in_flight_samples_per_worker=2,
            num_workers_per_iterator=1,
            rate_limiter_timeout_ms=1_000,
            get_signature_timeout_secs=5,
        )
        return without_tuning(dataset)
