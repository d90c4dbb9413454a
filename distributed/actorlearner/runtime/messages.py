"""Rows that processes exchange through Reverb tables: put and taken with deadlines.

A table is either a *board* (one row, the newest; reading leaves it there) or a *queue* (each row is taken once).
Stock clients (`reverb.Client`, TF-Agents' `ReverbVariableContainer`) can read and write the same tables.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional, TypeVar

import numpy as np
import reverb
import tensorflow as tf
import tree
from reverb.cc import schema_pb2

from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, wait_until
from actorlearner.runtime.row_checks import find_misfit, say_left_out
from actorlearner.runtime.tls.tunnel import reach

T = TypeVar("T")

Signature = Any
"""A nest of `tf.TensorSpec`: one row, without a time dimension."""

OLD_SECS = 2.0
"""A board's row is read again after this time, in seconds, even if nothing seems to have been put there since."""

_OTHER_PARTS = "its parts do not match the table's signature"


def make_board(name: str, signature: Signature) -> reverb.Table:
    """Returns a table with one row: every reader gets the newest one."""
    return reverb.Table(
        name,
        sampler=reverb.selectors.Fifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature,
    )


def make_queue(name: str, max_size: int, signature: Signature) -> reverb.Table:
    """Returns a table that gives each row to exactly one reader, oldest first; writers wait while it is full."""
    return reverb.Table.queue(name, max_size=max_size, signature=signature)


class Unreachable(Exception):
    """A Reverb server did not answer within the deadline."""


class Misfit(Unreachable):
    """A board's row is foreign: it does not fit the signature, or is implausible."""


def read_server_info(address: str, timeout_secs: float) -> Mapping[str, Any]:
    """Returns Reverb's `TableInfo` by table name; blocks at most `timeout_secs` seconds.

    Raises:
      Unreachable: No Reverb server answers there within the deadline.
    """
    try:
        return reverb.Client(reach(address)).server_info(timeout=max(1, int(timeout_secs)))
    except (reverb.errors.ReverbError, RuntimeError) as error:
        raise Unreachable(f"no Reverb server answers at {address} within {timeout_secs:g} s") from error


def read_table(address: str, table: str, timeout_secs: float) -> Optional[Any]:
    """Returns Reverb's `TableInfo` of one table, or None if there is none; cheaper than `read_server_info`.

    Blocks and raises as `read_server_info`.
    """
    for answer in _ask_server_info(reverb.Client(reach(address)), address, timeout_secs):
        if schema_pb2.TableInfo.FromString(answer).name == table:
            return reverb.reverb_types.TableInfo.from_serialized_proto(answer)
    return None


def ask_for_life(address: str, timeout_secs: float) -> None:
    """Checks that a Reverb server answers; blocks at most `timeout_secs` (at least 1). Raises `Unreachable`."""
    _ask_server_info(reverb.Client(reach(address)), address, timeout_secs)


def await_server(what: str, address: str, *, stop: Stop, deadline_secs: float) -> Mapping[str, Any]:
    """Waits for the server at `address`, and returns Reverb's `TableInfo` by table name. Raises as `wait_until`."""

    def poll() -> Optional[Mapping[str, Any]]:
        try:
            return read_server_info(address, timeout_secs=2)
        except Unreachable:
            return None

    return wait_until(
        poll, lambda: f"{what} at {address}", stop=stop, deadline_secs=deadline_secs, setting="--peer_patience_secs"
    )


def check_signature(what: str, address: str, found: Signature, expected: Signature) -> None:
    """Checks that a server's table has the signature that this experiment expects.

    Args:
      what: Name of the table, for the error.
      address: Address of the server.
      found, expected: Nests of tensor specs: the table's and the experiment's.

    Raises:
      RoleError: They differ (DATA); the message lists each difference.
    """
    has, wants = describe_leaves(found), describe_leaves(expected)
    differences = [
        f"{path}: the server has {has.get(path, 'nothing')}, this experiment {wants.get(path, 'nothing')}"
        for path in sorted({*has, *wants})
        if has.get(path) != wants.get(path)
    ]
    if differences:
        raise RoleError(
            f"{what} at {address} belongs to another experiment or another setting of this one:\n  "
            + "\n  ".join(differences)
            + "\nStart the replay server with this role's experiment and --gin_bindings, or correct the address.",
            ExitCode.DATA,
        )


def describe_leaves(signature: Signature) -> dict[str, str]:
    """Returns each leaf's type and shape by its path."""
    return {
        "/".join(map(str, path)) or "row": f"{spec.dtype.name}{list(spec.shape)}"
        for path, spec in tree.flatten_with_path(signature)
    }


class Sender:
    """Puts rows into one server's tables. Not thread-safe: one sender per thread."""

    def __init__(self, address: str):
        self.address = address
        self._writers: dict[str, reverb.TrajectoryWriter] = {}

    def put(self, table: str, row: Any, timeout_secs: float) -> None:
        """Puts one row; returns when the server has it. `row` has the structure of the table's signature.

        Raises:
          Unreachable: The server did not confirm within `timeout_secs` seconds (dead, unreachable, or a full queue).
            The row may still arrive.
        """
        writer = self._writers.get(table)
        if writer is None:
            # Creating many writers while the server is down corrupts Reverb 0.14's heap, so ping first.
            read_server_info(self.address, timeout_secs)
            client = reverb.Client(reach(self.address))
            # Without validate_items, which expects a time dimension that TF-Agents' container signatures lack.
            writer = self._writers[table] = client.trajectory_writer(num_keep_alive_refs=1, validate_items=False)
        try:
            writer.append(row)
            writer.create_item(
                table, priority=1.0, trajectory=tree.map_structure(lambda column: column[-1:], writer.history)
            )
            writer.flush(timeout_ms=int(timeout_secs * 1000))
        except (reverb.errors.ReverbError, RuntimeError, ValueError) as error:
            # A writer keeps its first error for ever, so the next put makes a new one.
            del self._writers[table]
            raise Unreachable(f"{self.address} did not accept a row for table '{table}': {error}") from error


def take(
    address: str, table: str, signature: Signature, *, max_rows: int = 1, timeout_secs: float = 5.0
) -> Sequence[Any]:
    """Removes up to `max_rows` rows from a queue and returns them as nests of numpy arrays.

    It returns fewer, or none, if no more come within the deadline. Several readers may take from one queue. Each call
    that finds rows leaks about 1 KB inside TensorFlow: for frequent rows use `take_current`. A foreign row, which does
    not fit the signature or is implausible, is removed and left out, with one warning for each kind. Blocks at most
    about twice `timeout_secs`, and as long again for each row after the first.

    Raises:
      Unreachable: The server does not answer within the deadline.
    """
    client = reverb.Client(reach(address))
    rows: list[Any] = []
    num_left = available = _read_table_info(client, address, table, timeout_secs).current_size
    while available and num_left > 0 and len(rows) < max_rows:
        num_wanted = min(available, num_left, max_rows - len(rows))
        num_left -= num_wanted  # bounded, because foreign rows may arrive as fast as they are skipped
        dataset = reverb.TimestepDataset(
            reach(address),
            table,
            dtypes=tree.map_structure(lambda spec: spec.dtype, signature),
            shapes=tree.map_structure(lambda spec: spec.shape, signature),
            max_in_flight_samples_per_worker=1,
            num_workers_per_iterator=1,
            rate_limiter_timeout_ms=int(timeout_secs * 1000),
            max_samples=num_wanted,
        )
        try:
            # The server keeps the limiter's time-out, so it does not help if the server is silent.
            samples = _each_row(without_tuning(dataset), table, num_wanted)
            for row, why in each_within(timeout_secs + 1.0, samples, f"table '{table}' at {address}"):
                if why:
                    say_left_out(address, table, why)
                else:
                    rows.append(row)
            if len(rows) < max_rows:
                available = _read_table_info(client, address, table, timeout_secs).current_size
        except (tf.errors.OpError, Unreachable) as error:
            if not rows:
                raise Unreachable(f"reading table '{table}' at {address} failed: {error}") from error
            logging.warning("reading table '%s' at %s stopped after %d rows: %s", table, address, len(rows), error)
            break
    return rows


def _each_row(dataset: tf.data.Dataset, table: str, num_rows: int) -> Iterator[tuple[Any, Optional[str]]]:
    """Yields up to `num_rows` rows, each with the reason to leave it out, or None."""
    samples = iter(dataset)
    for _ in range(num_rows):  # bounded, because an error may persist
        try:
            row = tree.map_structure(np.asarray, next(samples).data)
        except StopIteration:
            return
        except tf.errors.InvalidArgumentError:  # the iterator continues with the next row
            yield None, _OTHER_PARTS
        else:
            yield row, find_misfit(table, row)


def take_current(
    address: str, table: str, signature: Signature, *, max_rows: int, timeout_secs: float = 5.0
) -> Sequence[Any]:
    """Removes and returns rows as `take` does, but without its leak and in a fifth of the time.

    For the single reader of a queue whose rows are replaced by later ones: if the server dies just after it reported
    the number of rows, the sampling does not end, and a row that comes later is lost. Blocks and raises as `take`.
    """
    client = reverb.Client(reach(address))
    available = _read_table_info(client, address, table, timeout_secs).current_size
    if not available:
        return ()
    rows = []
    try:
        samples = client.sample(table, num_samples=min(available, max_rows), emit_timesteps=False)
        for sample in each_within(timeout_secs, samples, f"table '{table}' at {address}"):
            row, why = _as_row(sample.data, signature, table)
            if why:
                say_left_out(address, table, why)
            else:
                rows.append(row)
    except (reverb.errors.ReverbError, RuntimeError, ValueError, Unreachable) as error:
        if not rows:
            raise Unreachable(f"reading table '{table}' at {address} failed: {error}") from error
        logging.warning("reading table '%s' at %s stopped after %d rows: %s", table, address, len(rows), error)
    return rows


def _as_row(columns: Sequence[np.ndarray], signature: Signature, table: str) -> tuple[Any, Optional[str]]:
    """Returns the row as a nest of numpy arrays, and why it is foreign and must be left out, or None.

    Args:
      columns: An item's leaves; each has a leading time dimension of length 1.
      signature: Signature of the table.
      table: Name of the table.
    """
    specs = tree.flatten(signature)
    if len(columns) != len(specs) or not all(
        column.dtype == spec.dtype.as_numpy_dtype and tf.TensorShape([1, *spec.shape]).is_compatible_with(column.shape)
        for column, spec in zip(columns, specs)
    ):
        return None, _OTHER_PARTS
    row = tree.unflatten_as(signature, [column[0] for column in columns])
    return row, find_misfit(table, row)


def without_tuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the dataset without autotuning, so that its iterators end at once.

    tf.data tunes each iterator in a thread whose sleeps double up to a minute, and ending the iterator may wait for
    that
    thread: half a minute in which nothing is read.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


class BoardReader:
    """Reads one board repeatedly, at a fraction of the cost of `take`. Not thread-safe: one per thread."""

    def __init__(self, address: str, table: str, signature: Signature):
        self.address = address
        self.table = table
        self._signature = signature
        self._client: Optional[reverb.Client] = None
        self._num_puts_read = 0
        self._read_at = 0.0

    def read(self, timeout_secs: float = 5.0) -> Optional[Any]:
        """Returns the row as a nest of numpy arrays, or None if nothing has been put there.

        Blocks at most about twice `timeout_secs`.

        Raises:
          Misfit: The row is foreign: it does not fit the signature, or is implausible; it was logged.
          Unreachable: The server does not answer within the deadline.
        """
        return self._sample(timeout_secs) if self._look(timeout_secs).current_size else None

    def read_newer(self, timeout_secs: float = 5.0) -> Optional[Any]:
        """Returns the row as `read` does, but None if nothing was put there since the last call, which is cheaper.

        It compares the board's number of inserts. After `OLD_SECS` it returns the row in any case: a restarted server
        may have reached the same number.
        """
        table = self._look(timeout_secs)
        num_puts = table.rate_limiter_info.insert_stats.completed
        is_read = num_puts == self._num_puts_read and time.monotonic() - self._read_at < OLD_SECS
        if not table.current_size or is_read:
            return None
        row = self._sample(timeout_secs)
        self._num_puts_read, self._read_at = num_puts, time.monotonic()
        return row

    def _look(self, timeout_secs: float) -> schema_pb2.TableInfo:
        self._client = self._client or reverb.Client(reach(self.address))
        return _read_table_info(self._client, self.address, self.table, timeout_secs)

    def _sample(self, timeout_secs: float) -> Any:
        assert self._client is not None
        # A sample that comes too late is lost from a queue; a board keeps its row for the next reading.
        samples = self._client.sample(self.table, num_samples=1, emit_timesteps=False)
        try:
            (sample,) = each_within(timeout_secs, samples, f"table '{self.table}' at {self.address}")
        except (reverb.errors.ReverbError, RuntimeError, ValueError) as error:
            raise Unreachable(f"reading table '{self.table}' at {self.address} failed: {error}") from error
        row, why = _as_row(sample.data, self._signature, self.table)
        if why:
            say_left_out(self.address, self.table, why)
            raise Misfit(f"table '{self.table}' at {self.address} holds a row that does not fit: {why}")
        return row


def read(address: str, table: str, signature: Signature, *, timeout_secs: float = 5.0) -> Optional[Any]:
    """Returns a board's row, or None if nothing has been put there. Blocks and raises as `BoardReader.read`."""
    return BoardReader(address, table, signature).read(timeout_secs)


def _read_table_info(client: reverb.Client, address: str, table: str, timeout_secs: float) -> schema_pb2.TableInfo:
    answers = _ask_server_info(client, address, timeout_secs)
    tables = {info.name: info for info in map(schema_pb2.TableInfo.FromString, answers)}
    if table not in tables:
        raise Unreachable(f"{address} has no table '{table}'; it has {', '.join(sorted(tables)) or 'none'}")
    return tables[table]


def _ask_server_info(client: reverb.Client, address: str, timeout_secs: float) -> Sequence[bytes]:
    try:
        # `Client.server_info` would also decode every table's signature, which takes ten times as long.
        return client._client.ServerInfo(max(1, int(timeout_secs)))
    except RuntimeError as error:
        raise Unreachable(f"no Reverb server answers at {address} within {timeout_secs:g} s") from error


def each_within(secs: float, samples: Iterable[T], where: str) -> Iterator[T]:
    """Yields each of `samples`, waiting at most `secs` seconds for each.

    Reverb's samplers retry for ever while their server is away, and cannot be interrupted. So a thread iterates; it is
    abandoned if a sample does not come, and what it still receives is lost.

    Raises:
      Unreachable: A sample did not come in time.
      Exception: What iterating raised.
    """
    arrived: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()  # (whether more may follow, sample or error)
    is_left = threading.Event()

    def iterate() -> None:
        try:
            for sample in samples:
                arrived.put((True, sample))
                if is_left.is_set():
                    return
            arrived.put((False, None))
        except Exception as error:
            arrived.put((False, error))

    threading.Thread(target=iterate, name=f"reader of {where}", daemon=True).start()
    try:
        while True:
            try:
                is_sample, value = arrived.get(timeout=secs)
            except queue.Empty:
                raise Unreachable(f"nothing arrived from {where} for {secs:g} s") from None
            if is_sample:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        is_left.set()
