"""Requests for checkpoints of the replay's tables, and their answers.

learner --asks--> [checkpoint_due] --> replay server --writes--> <root_dir>/checkpoints/replay
learner <--done-- [checkpoint_done] <--/

The checkpoint is written under the learner's train step. `checkpoints.py` writes it.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Optional

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime import messages
from actorlearner.runtime.messages import Misfit, Unreachable

DUE_TABLE = "checkpoint_due"
DONE_TABLE = "checkpoint_done"

_INT64 = tf.TensorSpec((), tf.int64)
_SIGNATURE = {"train_step": _INT64, "learner": _INT64, "number": _INT64, "is_saved": _INT64}


def make_tables() -> list[reverb.Table]:
    """Returns the boards on which the learner requests a checkpoint and the server answers."""
    return [messages.make_board(name, _SIGNATURE) for name in (DUE_TABLE, DONE_TABLE)]


@dataclasses.dataclass(frozen=True)
class Due:
    """A checkpoint request: the learner's train step, the learner's number, and the request's number."""

    train_step: int
    learner: int
    number: int


def read_due(address: str, timeout_secs: float = 5.0) -> Optional[Due]:
    """Returns the last request, or None if there is none, or only a foreign row. Blocks as `messages.read`.

    Raises:
      Unreachable: The server does not answer within the deadline.
    """
    try:
        row = messages.read(address, DUE_TABLE, _SIGNATURE, timeout_secs=timeout_secs)
    except Misfit:  # the learner repeats its request; the server must keep running, and save at the end
        return None
    return row and Due(int(row["train_step"]), int(row["learner"]), int(row["number"]))


def _row(due: Due, is_saved: bool = False) -> dict[str, np.int64]:
    row = {**dataclasses.asdict(due), "is_saved": is_saved}
    return {name: np.int64(value) for name, value in row.items()}


class Answers:
    """The server's side of the boards; used from one thread."""

    def __init__(self, address: str):
        self._sender = messages.Sender(address)

    def send(self, due: Due, is_saved: bool) -> None:
        """Answers that a checkpoint is complete, or could not be written. Raises `Unreachable`."""
        self._sender.put(DONE_TABLE, _row(due, is_saved), timeout_secs=2.0)


class CheckpointRequests:
    """The learner's side: requests a checkpoint of every replay server; those that are away keep their last one."""

    def __init__(self, servers: ReplayServers, learner: int, *, patience_secs: float = 120.0):
        """Args:
        servers: The servers to ask.
        learner: This learner's unique number.
        patience_secs: How long to wait for an answer, in seconds, before giving up with a warning.
        """
        self._servers = servers
        self._by_address: dict[str, _ServerRequests] = {}

        def add(address: str) -> None:
            where = f" at {address}" if len(servers.all()) > 1 else ""
            self._by_address[address] = _ServerRequests(address, learner, patience_secs, where)

        servers.for_each(add)

    def ask(self, train_step: int) -> None:
        """Requests a checkpoint to match the learner's own of this train step; never blocks."""
        for requests in tuple(self._by_address.values()):
            requests.ask(train_step)

    def wait(self, secs: float) -> bool:
        """Returns whether every reachable server has answered the last request; blocks at most `secs` seconds."""
        deadline = time.monotonic() + secs
        away = self._servers.away()
        return all(
            requests.wait(deadline - time.monotonic())
            for address, requests in tuple(self._by_address.items())
            if address not in away
        )

    def close(self) -> None:
        """Stops the threads; never blocks."""
        for requests in tuple(self._by_address.values()):
            requests.close()


class _ServerRequests:
    """Requests checkpoints of one server and logs when they are complete, from a thread of its own."""

    def __init__(self, address: str, learner: int, patience_secs: float, where: str):
        self._address = address
        self._where = where
        self._learner = learner
        self._patience_secs = patience_secs
        self._sender = messages.Sender(address)
        self._news = threading.Condition()
        self._wanted: Optional[Due] = None
        self._answered = 0
        self._number = 0
        self._closing = False
        self._has_warned = False
        self._thread = threading.Thread(target=self._work, name="replay checkpoints", daemon=True)
        self._thread.start()

    def ask(self, train_step: int) -> None:
        with self._news:
            self._number += 1
            self._wanted = Due(train_step, self._learner, self._number)
            self._news.notify_all()

    def wait(self, secs: float) -> bool:
        with self._news:
            return self._news.wait_for(lambda: self._answered >= self._number, timeout=secs)

    def close(self) -> None:
        with self._news:
            self._closing = True
            self._news.notify_all()

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closing or self._wanted is not None)
                due, self._wanted = self._wanted, None
                if self._closing and due is None:
                    return
            assert due is not None
            try:
                self._see_to(due)
            except Exception:  # the next one may succeed, and training continues meanwhile
                logging.exception("requesting a checkpoint of the replay failed")

    def _see_to(self, due: Due) -> None:
        deadline = time.monotonic() + self._patience_secs
        is_asked = False
        while time.monotonic() < deadline:
            with self._news:
                if self._wanted is not None:
                    return  # a later request replaces it
            try:
                if not is_asked:
                    self._sender.put(DUE_TABLE, _row(due), timeout_secs=5.0)
                    is_asked = True
                row = messages.read(self._address, DONE_TABLE, _SIGNATURE)
                if row is not None and (int(row["learner"]), int(row["number"])) == (due.learner, due.number):
                    with self._news:
                        self._answered = due.number
                        self._news.notify_all()
                    if int(row["is_saved"]):
                        logging.info("train step %d is saved: learner and replay%s", due.train_step, self._where)
                    else:
                        logging.log(
                            logging.DEBUG if self._has_warned else logging.WARNING,
                            "train step %d is saved without its replay, which the replay server%s could not write: see "
                            "its log. A resumed run uses the replay's last checkpoint, if there is one.",
                            due.train_step,
                            self._where,
                        )
                    self._has_warned = not int(row["is_saved"])
                    return
            except Unreachable as error:
                logging.debug("%s", error)
                is_asked = False  # a restarted server does not know the request
            with self._news:
                self._news.wait_for(lambda: self._closing or self._wanted is not None, timeout=0.25)
                if self._closing:
                    return
        logging.warning(
            "the replay server at %s did not save its tables for train step %d within %.0f s; trying again with the "
            "next checkpoint",
            self._address,
            due.train_step,
            self._patience_secs,
        )
