"""Edge 2: weights on their way from the learner to the actors.

learner --publish--> [variables, variables_version] --refresh--> collect actors

`variables` is the table of TF-Agents' `ReverbVariableContainer`, so its `pull` and `update` work on it unchanged.
`variables_version` is a few bytes beside it, from which readers tell whether newer weights exist.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import reverb
import tensorflow as tf
from tf_agents.experimental.distributed import reverb_variable_container as stock

from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.runtime.messages import BoardReader, Misfit, Unreachable
from actorlearner.runtime.row_checks import say_left_out

VARIABLES_TABLE = stock.DEFAULT_TABLE
VERSION_TABLE = "variables_version"

UNCONTRADICTED_SECS = 3.0
"""A row that no other row contradicts for this long, in seconds, is believed; heartbeats are a second apart."""

_INT64 = tf.TensorSpec((), tf.int64)
VERSION_SIGNATURE = dict.fromkeys(("version", "train_step", "phase", "learner", "heartbeat", "num_chunks"), _INT64)


class Phase(enum.IntEnum):
    """The phase of training, as every role sees it."""

    WARMING_UP = -1  # the replay does not hold enough yet
    TRAINING = 0
    EVALUATING = 1  # the last train step is done: only evaluations are still needed
    OVER = 2


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The acting variables at one train step.

    Attributes:
      version, train_step: Identify the snapshot.
      variables: In the order of `agent.collect_policy.variables()`.
      num_chunks: Number of chunks whose train steps have all been made; counted only in lock-step.
    """

    version: int
    train_step: int
    variables: Sequence[np.ndarray]
    num_chunks: int = 0

    def assign_to(self, variables: Sequence[tf.Variable]) -> None:
        """Copies the values into `variables`, one by one."""
        for variable, value in zip(variables, self.variables):
            variable.assign(value)


@dataclasses.dataclass(frozen=True)
class Version:
    """The row of the version board."""

    version: int
    train_step: int
    phase: Phase
    learner: int
    heartbeat: int
    num_chunks: int = 0


def variables_signature(variables: Sequence[tf.Variable]) -> dict[str, Any]:
    """Returns the signature that the stock distributed examples give their variable container."""
    return {
        stock.POLICY_KEY: [tf.TensorSpec(v.shape, v.dtype, v.name.split(":")[0]) for v in variables],
        stock.TRAIN_STEP_KEY: tf.TensorSpec((), tf.int64, stock.TRAIN_STEP_KEY),
    }


def make_tables(variables: Sequence[tf.Variable]) -> list[reverb.Table]:
    """Returns the container's tables for acting variables of these shapes."""
    return [
        messages.make_board(VARIABLES_TABLE, variables_signature(variables)),
        messages.make_board(VERSION_TABLE, VERSION_SIGNATURE),
    ]


def await_container(address: str, variables: Sequence[tf.Variable], *, stop: Stop, deadline_secs: float) -> None:
    """Blocks until the container answers, and checks that it holds variables of these shapes.

    Raises:
      RoleError: It did not answer within `deadline_secs` seconds (UNAVAILABLE), or holds other shapes (DATA).
      Stopped: `stop` was set.
    """
    tables = messages.await_server("the variable container", address, stop=stop, deadline_secs=deadline_secs)
    if VARIABLES_TABLE not in tables:
        raise RoleError(
            f"the Reverb server at {address} has no table '{VARIABLES_TABLE}': it is not a variable container. "
            "Correct --variables_address.",
            ExitCode.DATA,
        )
    messages.check_signature(
        "the variable container", address, tables[VARIABLES_TABLE].signature, variables_signature(variables)
    )


def read_version(address: str, timeout_secs: float = 5.0) -> Optional[Version]:
    """Returns the version board's row, or None before the first publish, or while it holds a foreign row.

    Blocks at most about twice `timeout_secs`. The row may still be forged: see `Belief`.

    Raises:
      Unreachable: The server does not answer within the deadline.
    """
    try:
        return _to_version(_make_version_reader(address).read(timeout_secs))
    except Misfit:
        return None


def _make_version_reader(address: str) -> BoardReader:
    return BoardReader(address, VERSION_TABLE, VERSION_SIGNATURE)


def _to_version(row: Optional[Any]) -> Optional[Version]:
    if row is None:
        return None
    return Version(
        version=int(row["version"]),
        train_step=int(row["train_step"]),
        phase=Phase(int(row["phase"])),
        learner=int(row["learner"]),
        heartbeat=int(row["heartbeat"]),
        num_chunks=int(row["num_chunks"]),
    )


class Belief:
    """Decides whether the version board's row comes from the learner, because any client can write rows there.

    A learner's heartbeat replaces a forged row within a second. So a row of the learner that was believed before is
    believed at once during training. Another learner's row, or the end of training, is believed when the next heartbeat
    repeats it, or when no other row appeared for `UNCONTRADICTED_SECS` (a learner that has ended sends no heartbeats).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Args:
        clock: Returns seconds.
        """
        self._clock = clock
        self._believed: Optional[Version] = None
        self._claim: Optional[Version] = None
        self._claimed_at = 0.0

    def holds(self, version: Version) -> bool:
        """Returns whether to act on `version`, just read from the board. Call it with every row that is read."""
        believed, claim = self._believed, self._claim
        is_known = believed is not None and version.learner == believed.learner
        if not (is_known and version.phase <= max(Phase.TRAINING, believed.phase if believed else Phase.TRAINING)):
            is_claimed_again = claim is not None and (claim.learner, claim.phase) == (version.learner, version.phase)
            if not is_claimed_again:
                self._claim, self._claimed_at = version, self._clock()
                return False
            assert claim is not None
            is_old = self._clock() - self._claimed_at >= UNCONTRADICTED_SECS
            if not (version.heartbeat > claim.heartbeat or is_old):
                return False
        self._believed, self._claim = version, None
        return True


class Publisher:
    """The learner's side: publishes snapshots and sends heartbeats, from a thread.

    If the container is empty after a restart of its server, the last snapshot is published again.
    """

    def __init__(
        self,
        address: str,
        learner: int,
        *,
        first_version: int = 0,
        published: Optional[Version] = None,
        heartbeat_secs: float = 1.0,
    ):
        """Args:
        address: Address of the container.
        learner: This learner's unique number.
        first_version: Version of the first published snapshot.
        published: What the previous learner published last. Those weights stay in the container until training passes
          their train step, because they are newer than the restored ones.
        heartbeat_secs: Time between two heartbeats, in seconds.
        """
        self.address = address
        self._learner = learner
        self._next_version = max(first_version, published.version + 1 if published else 0)
        self._newer = published
        self._heartbeat_secs = heartbeat_secs
        self._heartbeat = 0
        self._phase = Phase.WARMING_UP
        self._snapshot: Optional[Snapshot] = None
        self._unpublished = False
        self._num_puts = -1  # inserts into the container's table after the last publish; -1: not read yet
        self._lock = threading.Lock()  # guards the fields above; never held during a request to the server
        self._talking = threading.Lock()  # held during requests: one at a time
        self._sender = messages.Sender(address)
        self._closing = False
        self._has_news = threading.Event()  # there is a snapshot to publish, or the end
        self._read: Any = None  # reads all variables in one call, in a third of the time that single reads take
        self._thread = threading.Thread(target=self._beat, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, train_step: int, variables: Sequence[tf.Variable], *, timeout_secs: float = 5.0) -> Snapshot:
        """Publishes the variables and returns the snapshot, which is sent later if the server is away.

        Blocks at most about `timeout_secs` seconds.
        """
        snapshot = self.take_snapshot(train_step, variables)
        self._send(timeout_secs)
        return snapshot

    def take_snapshot(self, train_step: int, variables: Sequence[tf.Variable], num_chunks: int = 0) -> Snapshot:
        """Returns a snapshot, which the publisher's thread sends at once; never blocks on the network.

        `variables` must be the same ones in every call.
        """
        if self._read is None:
            self._read = tf.function(lambda: [tf.identity(variable) for variable in variables], autograph=False)
        values = [value.numpy() for value in self._read()]
        with self._lock:
            self._snapshot = Snapshot(self._next_version, train_step, values, num_chunks)
            self._next_version += 1
            self._unpublished = True
            snapshot = self._snapshot
        self._has_news.set()
        return snapshot

    @property
    def next_version(self) -> int:
        """The version of the next snapshot."""
        with self._lock:
            return self._next_version

    def announce(self, phase: Phase, *, timeout_secs: float = 5.0) -> bool:
        """Announces the phase to every role; returns whether the container has it.

        Blocks at most about `timeout_secs` seconds.
        """
        with self._lock:
            self._phase = phase
        return self._send(timeout_secs)

    def close(self) -> None:
        """Stops the heartbeat; blocks at most a few seconds."""
        self._closing = True
        self._has_news.set()
        self._thread.join(timeout=10)

    def _beat(self) -> None:
        while True:
            self._has_news.wait(self._heartbeat_secs)
            self._has_news.clear()
            if self._closing:
                return
            try:
                self._republish_if_lost()
                self._send(timeout_secs=5.0)
            except Unreachable as error:
                logging.debug("%s", error)
            except Exception:  # keep the heartbeat: without it every actor takes the learner for dead
                logging.exception("publishing failed; will retry")

    def _republish_if_lost(self) -> None:
        """Sends the last snapshot again if the container is empty or another client overwrote it."""
        with self._talking:  # otherwise this publisher's own write would look like another client's
            table = messages.read_server_info(self.address, timeout_secs=5)[VARIABLES_TABLE]
            num_puts = table.rate_limiter_info.insert_stats.completed
            with self._lock:
                is_lost = not table.current_size
                is_replaced = not is_lost and self._newer is None and num_puts > self._num_puts >= 0
                if is_lost:
                    self._newer = None  # lost with its server
                    self._unpublished = self._snapshot is not None
                elif is_replaced and self._snapshot is not None:  # with a new version, so that actors pull it again
                    self._snapshot = dataclasses.replace(self._snapshot, version=self._next_version)
                    self._next_version += 1
                    self._unpublished = True
                self._num_puts = -1 if self._unpublished else num_puts
        if is_replaced:
            say_left_out(self.address, VARIABLES_TABLE, "another client wrote weights; republishing the learner's")

    def _send(self, timeout_secs: float) -> bool:
        with self._talking:
            with self._lock:
                snapshot, phase, unpublished = self._snapshot, self._phase, self._unpublished
                if snapshot is None:
                    return False
                if self._newer is not None and snapshot.train_step > self._newer.train_step:
                    self._newer = None
                newer = self._newer
                self._unpublished = unpublished and newer is not None
                if unpublished:
                    self._num_puts = -1
                self._heartbeat += 1
                heartbeat = self._heartbeat
            version, train_step = snapshot.version, np.int64(snapshot.train_step)
            if newer is not None:
                version, train_step, unpublished = newer.version, np.int64(newer.train_step), False
            try:
                if unpublished:  # first the weights, then the version that refers to them
                    row = {stock.POLICY_KEY: list(snapshot.variables), stock.TRAIN_STEP_KEY: train_step}
                    self._sender.put(VARIABLES_TABLE, row, timeout_secs)
                board = {
                    "version": np.int64(version),
                    "train_step": train_step,
                    "phase": np.int64(phase),
                    "learner": np.int64(self._learner),
                    "heartbeat": np.int64(heartbeat),
                    "num_chunks": np.int64(snapshot.num_chunks),
                }
                self._sender.put(VERSION_TABLE, board, timeout_secs)
            except Unreachable as error:
                logging.warning("weights of train step %d not published yet: %s", snapshot.train_step, error)
                with self._lock:
                    self._unpublished = True
                return False
            return True


def announce_end(address: str, train_step: int, learner: int, *, timeout_secs: float = 2.0) -> None:
    """Announces to every role that training is over, without publishing weights. Raises `Unreachable`."""
    messages.read_server_info(address, timeout_secs)  # fails fast if no server listens
    row = {"version": 0, "train_step": train_step, "phase": Phase.OVER, "learner": learner}
    row = {**dict.fromkeys(VERSION_SIGNATURE, 0), **row}
    messages.Sender(address).put(VERSION_TABLE, {name: np.int64(value) for name, value in row.items()}, timeout_secs)


class Subscriber:
    """An actor's side: a thread reads the version board and pulls weights only if they are newer.

    `latest` and `phase` never block, so the environment never waits for the network.
    """

    def __init__(self, address: str, variables: Sequence[tf.Variable], *, refresh_interval_secs: float):
        self.address = address
        self._versions = _make_version_reader(address)
        self._variables = BoardReader(address, VARIABLES_TABLE, variables_signature(variables))
        self._refresh_interval_secs = refresh_interval_secs
        self._snapshot: Optional[Snapshot] = None
        self._version: Optional[Version] = None
        self._heard_at = time.monotonic()
        self._has_looked = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="subscriber", daemon=True)
        self._thread.start()

    def has_looked(self) -> bool:
        """Returns whether the container has answered, so that `phase` and `latest` are meaningful."""
        return self._has_looked.is_set()

    def latest(self) -> Optional[Snapshot]:
        """Returns the newest pulled weights, or None before the first."""
        return self._snapshot

    def phase(self) -> Phase:
        """Returns the phase of training; WARMING_UP before the learner's first heartbeat."""
        return self._version.phase if self._version else Phase.WARMING_UP

    def num_chunks(self) -> int:
        """Returns `num_chunks` of the newest version; see `Snapshot`."""
        return self._version.num_chunks if self._version else 0

    def learner_silent_secs(self) -> float:
        """Returns seconds since the learner's last heartbeat arrived."""
        return time.monotonic() - self._heard_at

    def close(self) -> None:
        """Stops the thread; never blocks."""
        self._closing.set()

    def _refresh(self) -> None:
        belief = Belief()
        unheeded: Optional[Version] = None  # read, but not believed yet, or not pulled yet
        while not self._closing.is_set():
            try:
                version = unheeded = _to_version(self._versions.read_newer()) or unheeded
                is_believed = version is None or belief.holds(version)
                if version is not None and is_believed and version != self._version:
                    self._heard_at = time.monotonic()
                    if self._is_other(version):
                        self._pull(version)
                    self._version = version
                if is_believed:
                    unheeded = None
                    self._has_looked.set()
            except Unreachable as error:
                logging.debug("%s", error)
            except Exception:  # otherwise the actor would keep old weights and miss the end
                logging.exception("refreshing weights failed; will retry")
            self._closing.wait(self._refresh_interval_secs)

    def _is_other(self, version: Version) -> bool:
        if self._snapshot is None or self._version is None:
            return True
        # Lower versions too: a restarted learner may start at one, and a forged high version must not last.
        return (version.version, version.learner) != (self._snapshot.version, self._version.learner)

    def _pull(self, version: Version) -> None:
        row = self._variables.read()
        if row is not None:
            self._snapshot = Snapshot(version.version, int(row[stock.TRAIN_STEP_KEY]), list(row[stock.POLICY_KEY]))
