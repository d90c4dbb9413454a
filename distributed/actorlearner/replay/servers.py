"""Which replay servers a run has, as one role sees them, and which of them answer.

replay server that joins --its address--> [replay_servers, beside the variables] --> learner, collect actors

Those that --replay_address names are known from the start. One that joins later writes itself on a board; if the board
is lost with its server, it does so again. Whoever reaches the port can write there too, and a Reverb client uses what a
server answers as pointers into its own memory. So the board only says who is there. Who may be there is the first
server's own word, its --may_join: the table's signature says it, and no client can write that.
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
"""Time between two looks at the board, and at who answers."""

AWAY_SECS = 5.0
"""A server that has not answered for this time is away: others are written to. Saving a large table takes a while."""

SOME_ARE_ENOUGH_SECS = 15.0
"""At its start a role waits this long for all of several servers; then those that answer are enough."""

MAX_SERVERS = 16
"""More than so many a run does not take: over TLS each role has a process for each of them."""

_MAX_BYTES = 4_096
_SIGNATURE = {"addresses": tf.TensorSpec((_MAX_BYTES,), tf.uint8)}


def make_tables(may_join: Sequence[str] = ()) -> list[reverb.Table]:
    """Returns the board on which those replay servers that `may_join` say that they have joined; none where none may.

    Args:
      may_join: Their addresses, "host:port", as the others reach them.

    Raises:
      RoleError: They are more than a run takes (USAGE).
    """
    if not may_join:
        return []
    if len(may_join) >= MAX_SERVERS:
        raise RoleError(
            f"--may_join = '{','.join(may_join)}' lists {len(may_join)} replay servers: expected fewer than "
            f"{MAX_SERVERS}, with the first one as many as a run takes. List those that will join.",
            ExitCode.USAGE,
        )
    spec = tf.TensorSpec((_MAX_BYTES,), tf.uint8, name=" ".join(may_join))
    return [messages.make_board(JOINED_TABLE, {"addresses": spec})]


def read_may_join(address: str, timeout_secs: float) -> tuple[str, ...]:
    """Returns which addresses may join, by the word of the first server, at `address`. Raises `Unreachable`."""
    table = read_table(address, JOINED_TABLE, timeout_secs)
    return tuple(table.signature["addresses"].name.split()) if table else ()


def refuse_several(replay: Replay, addresses: Sequence[str]) -> None:
    """Returns when the replay can be spread over so many servers.

    Raises:
      RoleError: It cannot (USAGE).
    """
    if len(addresses) > 1 and not replay.can_spread:
        raise RoleError(
            f"--replay_address = '{','.join(addresses)}': this experiment's replay is sampled by its server, whose "
            "rate limiter keeps samples per insert and knows of no other server. Give one address, or let the learner "
            "hold the replay: experiment.replay = @resident_replay().",
            ExitCode.USAGE,
        )


class Announcement:
    """A joined server's side: keeps its address on the board."""

    def __init__(self, variables_address: str, address: str):
        self._variables_address = variables_address
        self._address = address
        self._has_joined = False
        self._reader = BoardReader(variables_address, JOINED_TABLE, _SIGNATURE)

    def renew(self) -> None:
        """Writes the address on the board unless it is there; blocks some seconds at most.

        Of two that do so at the same moment one wins, and the other is there with its next call.

        Raises:
          RoleError: The first server does not let this address join (USAGE).
          Unreachable: The first server does not answer.
        """
        may_join = read_may_join(self._variables_address, timeout_secs=2)
        if self._address not in may_join:
            if self._has_joined:  # the others know it; the first server was started again without the flag
                raise Unreachable(f"the replay server at {self._variables_address} lists no --may_join any more")
            raise RoleError(
                f"--advertise = '{self._address}': the replay server at {self._variables_address} lets "
                f"{', '.join(may_join) or 'nobody'} join. Start it again with --may_join={self._address}, or give the "
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
    """Returns what the board says, true or not. Raises `Unreachable`."""
    try:
        row = reader.read(timeout_secs=1.0)
    except Misfit:
        return []
    text = row["addresses"].tobytes().rstrip(b"\0").decode(errors="replace") if row else ""
    return [address for address in text.split(",") if address]


class ReplayServers:
    """The replay servers of a run: those that `--replay_address` names, then those that have joined.

    While there is only one, nobody asks whether it answers. Thread-safe.
    """

    def __init__(self, addresses: Sequence[str], task: int = 0):
        """Args:
        addresses: Of those known from the start, each "host:port".
        task: Whose own server `mine` is to be.
        """
        self._task = task
        self._addresses = tuple(addresses)
        self._heard_at = dict.fromkeys(addresses, time.monotonic())
        self._mute: set[str] = set()  # did not answer when they were asked last
        self._away: frozenset[str] = frozenset()
        self._mine = self._choose()
        self._signatures: Mapping[str, Any] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._lock = threading.RLock()  # guards the callbacks, and that each hears of each server once
        self._closing = threading.Event()

    def all(self) -> tuple[str, ...]:
        return self._addresses

    def away(self) -> Mapping[str, float]:
        """Returns, by address, for how many seconds those have been silent that do not answer."""
        now = time.monotonic()
        return {address: now - self._heard_at[address] for address in self._addresses if address in self._away}

    def mine(self) -> str:
        """Returns the address to write to: one in turn by task number, or the next that answers. Never blocks."""
        return self._mine

    def describe(self) -> str:
        """Returns who is away, in words, to be added to a sentence; empty when nobody is."""
        away = ", ".join(f"{address} for {secs:.0f} s" for address, secs in self.away().items())
        return f"; no answer from {away}" if away else ""

    def for_each(self, callback: Callable[[str], None]) -> None:
        """Calls `callback` with the address of each server: now of those there are, from a thread of those to join."""
        with self._lock:
            self._callbacks.append(callback)
            for address in self._addresses:
                callback(address)

    def await_tables(self, signatures: Mapping[str, Any], *, stop: Stop, deadline_secs: float) -> None:
        """Returns once each server answers, or some have and the others are still missing after 15 s.

        Raises:
          RoleError: Not one answered within `deadline_secs` seconds (UNAVAILABLE), or one has other tables (DATA).
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
        """Starts a thread that looks who joins and, of several, who answers; has looked at the board once."""
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
            except Exception:  # who is away would stay in use, and who joins unknown
                logging.exception("looking after the replay servers failed; trying again")

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
        """Returns whether a client may be made of the server there, and its tables are this experiment's; says if not.

        Its tables are asked for in one call that hands out no pointer.
        """
        why = ""
        if address not in may_join:
            why = "an address is not one that --may_join of the first replay server lists"
        elif len(self._addresses) >= MAX_SERVERS:
            why = f"there are {MAX_SERVERS} replay servers already"
        else:
            try:
                check_tables(address, read_server_info(address, timeout_secs=1), self._signatures)
            except Unreachable as error:
                logging.debug("%s", error)  # asked again with the next look
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
            logging.warning("the replay server at %s does not answer: going on without it until it does", address)
        for address in self._away - away:
            logging.info("the replay server at %s answers again", address)
        self._away = away
        self._mine = self._choose()

    def _choose(self) -> str:
        turn = self._task % len(self._addresses)
        ordered = [*self._addresses[turn:], *self._addresses[:turn]]
        return next((address for address in ordered if address not in self._away), ordered[0])
