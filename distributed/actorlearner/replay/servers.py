"""The replay servers of a run, as one role sees them, and which of them answer.

joining replay server --its address--> [replay_servers, beside the variables] --> learner, collect actors

The servers that --replay_address names are known from the start. A server that joins later writes itself on a board;
if the board is lost with its server, it does so again. Any client that reaches the port can write there too, and a
Reverb client uses a server's answers as pointers into its own memory. So the board only says which servers are there.
The first server decides which may be there, by its --may_join: that is the board's signature, which no client can
write.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.replay.base import Replay
from actorlearner.replay.tables import check_tables
from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, wait_until
from actorlearner.runtime.messages import BoardReader, Misfit, Unreachable, await_server, read_server_info, read_table
from actorlearner.runtime.row_checks import say_left_out
from actorlearner.runtime.sockets import notice_dead_peers

JOINED_TABLE = "replay_servers"

LOOK_EVERY_SECS = 1.5
"""Time between two checks of the board and of which servers answer, in seconds."""

AWAY_SECS = 5.0
"""A server without an answer for this time, in seconds, is away, and its actors switch. Saving a table takes long."""

SOME_ARE_ENOUGH_SECS = 15.0
"""How long a starting role waits for all of several servers, in seconds; then those that answer are enough."""

MAX_SERVERS = 16
"""Largest number of replay servers: over TLS each role has a process for each of them."""

_MAX_BYTES = 4_096
_SIGNATURE = {"addresses": tf.TensorSpec((_MAX_BYTES,), tf.uint8)}


def make_tables(may_join: Sequence[str] = ()) -> list[reverb.Table]:
    """Returns the board on which the servers listed in `may_join` announce that they have joined; no board if none may.

    Args:
      may_join: Their addresses, "host:port", as the other roles reach them.

    Raises:
      RoleError: There are too many (USAGE).
    """
    if not may_join:
        return []
    if len(may_join) >= MAX_SERVERS:
        raise RoleError(
            f"--may_join = '{','.join(may_join)}' lists {len(may_join)} replay servers: expected fewer than "
            f"{MAX_SERVERS}, because a run takes {MAX_SERVERS} with the first. List only those that will join.",
            ExitCode.USAGE,
        )
    spec = tf.TensorSpec((_MAX_BYTES,), tf.uint8, name=" ".join(may_join))
    return [messages.make_board(JOINED_TABLE, {"addresses": spec})]


def read_may_join(address: str, timeout_secs: float) -> tuple[str, ...]:
    """Returns the addresses that may join, as listed by the first server, at `address`. Raises `Unreachable`."""
    table = read_table(address, JOINED_TABLE, timeout_secs)
    return tuple(table.signature["addresses"].name.split()) if table else ()


def refuse_several(replay: Replay, addresses: Sequence[str]) -> None:
    """Checks that the replay can be shared by so many servers.

    Raises:
      RoleError: It cannot (USAGE).
    """
    if len(addresses) > 1 and not replay.can_spread:
        raise RoleError(
            f"--replay_address = '{','.join(addresses)}': this experiment's replay is sampled by its server, whose "
            "rate limiter counts only one server. Give one address, or let the learner hold the replay: "
            "experiment.replay = @resident_replay().",
            ExitCode.USAGE,
        )


class Announcement:
    """A joining server's side: keeps its address on the board."""

    def __init__(self, variables_address: str, address: str):
        self._variables_address = variables_address
        self._address = address
        self._has_joined = False
        self._reader = BoardReader(variables_address, JOINED_TABLE, _SIGNATURE)

    def renew(self) -> None:
        """Writes the address on the board unless it is there; blocks some seconds at most.

        If two servers do so at the same moment one wins, and the other succeeds in its next call.

        Raises:
          RoleError: The first server does not admit this address (USAGE).
          Unreachable: The first server does not answer.
        """
        may_join = read_may_join(self._variables_address, timeout_secs=2)
        if self._address not in may_join:
            if self._has_joined:  # the others know it; the first server restarted without the flag
                raise Unreachable(f"the replay server at {self._variables_address} has no --may_join any more")
            raise RoleError(
                f"--advertise = '{self._address}': the replay server at {self._variables_address} admits "
                f"{', '.join(may_join) or 'no server'}. Restart it with --may_join={self._address}, or give an "
                "address that it lists.",
                ExitCode.USAGE,
            )
        self._has_joined = True
        joined = [address for address in _read(self._reader) if address in may_join]
        if self._address in joined:
            return
        text = ",".join([*joined, self._address]).encode()
        row = {"addresses": np.frombuffer(text.ljust(_MAX_BYTES, b"\0"), np.uint8)}
        messages.Sender(self._variables_address).put(JOINED_TABLE, row, timeout_secs=2.0)
        logging.info("joined the run at %s as %s", self._variables_address, self._address)


def _read(reader: BoardReader) -> list[str]:
    """Returns the addresses on the board, admitted or not. Raises `Unreachable`."""
    try:
        row = reader.read(timeout_secs=1.0)
    except Misfit:
        return []
    text = row["addresses"].tobytes().rstrip(b"\0").decode(errors="replace") if row else ""
    return [address for address in text.split(",") if address]


class ReplayServers:
    """The replay servers of a run: those in `--replay_address`, then those that have joined.

    A single server is not pinged. Thread-safe.
    """

    def __init__(self, addresses: Sequence[str], task: int = 0):
        """Args:
        addresses: Addresses, "host:port", of the servers known from the start.
        task: Task number for which `mine` chooses a server.
        """
        self._task = task
        self._addresses = tuple(addresses)
        self._heard_at = dict.fromkeys(addresses, time.monotonic())
        self._mute: set[str] = set()  # did not answer the last ping
        self._away: frozenset[str] = frozenset()
        self._mine = self._choose()
        self._signatures: Mapping[str, Any] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._lock = threading.RLock()  # so that each callback gets each server once
        self._closing = threading.Event()

    def all(self) -> tuple[str, ...]:
        return self._addresses

    def away(self) -> Mapping[str, float]:
        """Returns for how many seconds each server that does not answer has been silent, by address."""
        now = time.monotonic()
        return {address: now - self._heard_at[address] for address in self._addresses if address in self._away}

    def mine(self) -> str:
        """Returns the address to write to: that of the task number, or the next one that answers. Never blocks."""
        return self._mine

    def describe(self) -> str:
        """Returns which servers are away, as the end of a sentence; empty if none is."""
        away = ", ".join(f"{address} for {secs:.0f} s" for address, secs in self.away().items())
        return f"; no answer from {away}" if away else ""

    def for_each(self, callback: Callable[[str], None]) -> None:
        """Calls `callback` with each server's address: now for known servers, later from a thread for joining ones."""
        with self._lock:
            self._callbacks.append(callback)
            for address in self._addresses:
                callback(address)

    def await_tables(self, signatures: Mapping[str, Any], *, stop: Stop, deadline_secs: float) -> None:
        """Blocks until every server answers, or until only some do after 15 s; checks their tables.

        Raises:
          RoleError: None answered within `deadline_secs` seconds (UNAVAILABLE), or one has other tables (DATA).
          Stopped: `stop` was set.
        """
        self._signatures = signatures
        if len(self._addresses) == 1:
            (address,) = self._addresses
            tables = await_server("the replay server", address, stop=stop, deadline_secs=deadline_secs)
            check_tables(address, tables, signatures)
            return
        missing = dict.fromkeys(self._addresses)
        some_are_enough_at = time.monotonic() + min(SOME_ARE_ENOUGH_SECS, deadline_secs)

        def poll() -> bool:
            for address in tuple(missing):
                try:
                    check_tables(address, read_server_info(address, timeout_secs=1), signatures)
                    del missing[address]
                except Unreachable:
                    pass
            return not missing or (len(missing) < len(self._addresses) and time.monotonic() > some_are_enough_at)

        wait_until(
            poll,
            lambda: f"the replay servers at {', '.join(missing)}",
            stop=stop,
            deadline_secs=deadline_secs,
            setting="--peer_patience_secs",
        )
        now = time.monotonic()
        self._heard_at = {address: now - AWAY_SECS if address in missing else now for address in self._addresses}
        self._mute.update(missing)
        self._note_away()

    def watch(self, variables_address: str) -> None:
        """Starts a thread that finds joining servers and, of several, which answer; reads the board once before."""
        self._board = BoardReader(variables_address, JOINED_TABLE, _SIGNATURE)
        self._take_in_joined()
        threading.Thread(target=self._look, name="replay servers", daemon=True).start()

    def close(self) -> None:
        """Ends the thread; never blocks."""
        self._closing.set()

    def _look(self) -> None:
        while not self._closing.wait(LOOK_EVERY_SECS):
            try:
                self._take_in_joined()
                if len(self._addresses) > 1:
                    for address in self._addresses:
                        self._ask(address)
                    self._note_away()
            except Exception:  # otherwise a dead server would stay in use, and a joining one unknown
                logging.exception("checking the replay servers failed; will retry")

    def _take_in_joined(self) -> None:
        try:
            may_join = read_may_join(self._board.address, timeout_secs=1)
            joined = _read(self._board) if may_join else []
        except Unreachable as error:
            logging.debug("%s", error)
            return
        for address in joined:
            if address not in self._addresses and self._may_be_asked(address, may_join):
                self._take_in(address)

    def _may_be_asked(self, address: str, may_join: Sequence[str]) -> bool:
        """Returns whether the server at `address` may be used and has this experiment's tables; logs if not.

        It reads the tables with one call whose answer has no pointer.
        """
        why = ""
        if address not in may_join:
            why = "an address is not in the first replay server's --may_join"
        elif len(self._addresses) >= MAX_SERVERS:
            why = f"there are {MAX_SERVERS} replay servers already"
        else:
            try:
                check_tables(address, read_server_info(address, timeout_secs=1), self._signatures)
            except Unreachable as error:
                logging.debug("%s", error)  # tried again at the next check
                return False
            except RoleError as error:
                why = error.message
        if why:
            say_left_out(self._board.address, JOINED_TABLE, why)
        return not why

    def _take_in(self, address: str) -> None:
        logging.info("the replay server at %s has joined", address)
        notice_dead_peers({int(address.rpartition(":")[2])})
        with self._lock:
            self._heard_at[address] = time.monotonic()
            self._addresses = (*self._addresses, address)
            self._mine = self._choose()
            for callback in self._callbacks:
                callback(address)

    def _ask(self, address: str) -> None:
        try:
            messages.ask_for_life(address, timeout_secs=1)
        except Unreachable:
            self._mute.add(address)
        else:
            self._mute.discard(address)
            self._heard_at[address] = time.monotonic()

    def _note_away(self) -> None:
        now = time.monotonic()
        away = frozenset(address for address in self._mute if now - self._heard_at[address] >= AWAY_SECS)
        for address in away - self._away:
            logging.warning("the replay server at %s does not answer: continuing without it until it does", address)
        for address in self._away - away:
            logging.info("the replay server at %s answers again", address)
        self._away = away
        self._mine = self._choose()

    def _choose(self) -> str:
        turn = self._task % len(self._addresses)
        ordered = [*self._addresses[turn:], *self._addresses[:turn]]
        return next((address for address in ordered if address not in self._away), ordered[0])
