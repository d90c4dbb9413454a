"""Which replay servers a run has, as one role sees them, and which of them answer.

replay server that joins --its address--> [replay_servers, beside the variables] --> learner, collect actors

Those that --replay_address names are known from the start. One that joins later writes itself on a board; if the board
is lost with its server, it does so again.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.replay.base import Replay, check_tables
from actorlearner.runtime import messages
from actorlearner.runtime.dead_peers import notice_dead_peers
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, wait_until
from actorlearner.runtime.messages import BoardReader, Unreachable, await_server, read_server_info

JOINED_TABLE = "replay_servers"

LOOK_EVERY_SECS = 1.5
"""Time between two looks at the board, and at who answers."""

AWAY_SECS = 5.0
"""A server that has not answered for this time is away: others are written to. Saving a large table takes a while."""

SOME_ARE_ENOUGH_SECS = 15.0
"""At its start a role waits this long for all of several servers; then those that answer are enough."""

_ADDRESS = re.compile(r"[\w.:\[\]-]+:\d{1,5}", re.ASCII)  # whoever reaches the board can write there
_MAX_BYTES = 4_096
_SIGNATURE = {"addresses": tf.TensorSpec((_MAX_BYTES,), tf.uint8)}


def make_tables() -> list[reverb.Table]:
    """Returns the board on which replay servers say that they have joined."""
    return [messages.make_board(JOINED_TABLE, _SIGNATURE)]


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
        self._reader = BoardReader(variables_address, JOINED_TABLE, _SIGNATURE)

    def renew(self) -> None:
        """Writes the address on the board unless it is there; blocks some seconds at most. Raises `Unreachable`.

        Of two that do so at the same moment one wins, and the other is there with its next call.
        """
        joined = _read(self._reader)
        if self._address in joined:
            return
        text = ",".join([*joined, self._address]).encode()
        if len(text) > _MAX_BYTES:
            raise RoleError(
                f"--advertise = '{self._address}': so many replay servers have joined that there is no room for it: "
                f"{', '.join(joined)}.",
                ExitCode.USAGE,
            )
        row = {"addresses": np.frombuffer(text.ljust(_MAX_BYTES, b"\0"), np.uint8)}
        messages.Sender(self._variables_address).put(JOINED_TABLE, row, timeout_secs=2.0)
        logging.info("joined the run at %s as %s", self._variables_address, self._address)


def _read(reader: BoardReader) -> list[str]:
    row = reader.read(timeout_secs=1.0)
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
            joined = _read(self._board)
        except Unreachable as error:
            logging.debug("%s", error)
            return
        for address in joined:
            if address in self._addresses or not _ADDRESS.fullmatch(address):
                continue
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
