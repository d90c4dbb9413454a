"""Rows that processes leave for one another in Reverb tables: put with a deadline, taken with a deadline.

A table is either a *board* (one row, the newest wins, reading leaves it there) or a *queue* (each row is taken once).
Stock clients (`reverb.Client`, TF-Agents' `ReverbVariableContainer`) can read and write the same tables.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import reverb
import tensorflow as tf
import tree
from reverb.cc import schema_pb2

from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, wait_until

Signature = Any
"""A nest of `tf.TensorSpec`: one row, without a time dimension."""


def make_board(name: str, signature: Signature) -> reverb.Table:
    """Returns a table of one row: what is put last is what everybody reads."""
    return reverb.Table(
        name,
        sampler=reverb.selectors.Fifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature,
    )


def make_queue(name: str, max_size: int, signature: Signature) -> reverb.Table:
    """Returns a table that hands each row to exactly one reader, oldest first; writers wait when it is full."""
    return reverb.Table.queue(name, max_size=max_size, signature=signature)


class Unreachable(Exception):
    """A Reverb server did not answer within the deadline."""


def read_server_info(address: str, timeout_secs: float) -> Mapping[str, Any]:
    """Returns Reverb's `TableInfo` by table name; blocks at most `timeout_secs` seconds.

    Raises:
      Unreachable: No Reverb server answers there within the deadline.
    """
    try:
        return reverb.Client(address).server_info(timeout=max(1, int(timeout_secs)))
    except (reverb.errors.ReverbError, RuntimeError) as error:
        raise Unreachable(f"no Reverb server answers at {address} within {timeout_secs:g} s") from error


def await_server(what: str, address: str, *, stop: Stop, deadline_secs: float) -> Mapping[str, Any]:
    """Returns Reverb's `TableInfo` by table name once the server at `address` answers. Raises as `wait_until`."""

    def poll() -> Optional[Mapping[str, Any]]:
        try:
            return read_server_info(address, timeout_secs=2)
        except Unreachable:
            return None

    return wait_until(
        poll, lambda: f"{what} at {address}", stop=stop, deadline_secs=deadline_secs, setting="--peer_patience_secs"
    )


def check_signature(what: str, address: str, found: Signature, expected: Signature) -> None:
    """Returns when a server's table holds what this experiment writes and reads.

    Args:
      what: The table, as the error names it.
      address: Of the server.
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
            + "\nStart the replay server with this role's experiment and --gin_bindings, or mend the address.",
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
            # Writers made and dropped by the hundred while a server is away have corrupted the heap of Reverb 0.14.
            read_server_info(self.address, timeout_secs)
            client = reverb.Client(self.address)
            # validate_items compares with the time dimension that TF-Agents' container signatures lack.
            writer = self._writers[table] = client.trajectory_writer(num_keep_alive_refs=1, validate_items=False)
        try:
            writer.append(row)
            writer.create_item(
                table, priority=1.0, trajectory=tree.map_structure(lambda column: column[-1:], writer.history)
            )
            writer.flush(timeout_ms=int(timeout_secs * 1000))
        except (reverb.errors.ReverbError, RuntimeError, ValueError) as error:
            # A writer keeps its first error for ever: the next put starts with a new one.
            del self._writers[table]
            raise Unreachable(f"{self.address} did not take a row for table '{table}': {error}") from error


class TableReader:
    """Reads rows of one table; keep one where a table is read again and again. Not thread-safe: one per thread.

    What a look costs is mostly making TensorFlow's pipeline and decoding every table's signature, so the pipeline is
    kept, and of the server's answer only sizes are decoded.
    """

    def __init__(self, address: str, table: str, signature: Signature, *, timeout_secs: float = 5.0):
        """Args:
        address: Of the server; nothing is asked before the first `take`.
        table: Its name.
        signature: Of one row.
        timeout_secs: Deadline of each of a reading's two steps, in seconds.
        """
        self.address = address
        self.table = table
        self._signature = signature
        self._timeout_secs = timeout_secs
        self._client: Optional[reverb.Client] = None
        self._datasets: dict[int, tf.data.Dataset] = {}

    def take(self, max_rows: int = 1) -> Sequence[Any]:
        """Returns up to `max_rows` rows as nests of numpy arrays; fewer, or none, when no more came within the deadline.

        From a queue rows are removed; a board's row stays. Blocks at most about twice the deadline.

        Raises:
          Unreachable: The server does not answer within the deadline.
        """
        available = self._read_size()
        if not available:
            return ()
        rows = []
        try:
            for row in self._make_dataset(min(available, max_rows)):
                rows.append(tree.map_structure(np.asarray, row.data))
        except tf.errors.OpError as error:
            if not rows:
                raise Unreachable(f"reading table '{self.table}' at {self.address} failed: {error.message}") from error
            logging.warning(
                "reading table '%s' at %s broke off after %d rows: %s",
                self.table,
                self.address,
                len(rows),
                error.message,
            )
        return rows

    def read(self) -> Optional[Any]:
        """Returns a board's row, or None while nothing has been put there. Blocks and raises as `take`."""
        rows = self.take()
        return rows[0] if rows else None

    def _read_size(self) -> int:
        try:
            self._client = self._client or reverb.Client(self.address)
            # `Client.server_info` would decode the signatures of all tables as well, for ten times the work.
            answers = self._client._client.ServerInfo(max(1, int(self._timeout_secs)))
        except (reverb.errors.ReverbError, RuntimeError) as error:
            raise Unreachable(
                f"no Reverb server answers at {self.address} within {self._timeout_secs:g} s"
            ) from error
        sizes = {info.name: info.current_size for info in map(schema_pb2.TableInfo.FromString, answers)}
        if self.table not in sizes:
            raise Unreachable(
                f"{self.address} has no table '{self.table}'; it has {', '.join(sorted(sizes)) or 'none'}"
            )
        return sizes[self.table]

    def _make_dataset(self, num_rows: int) -> tf.data.Dataset:
        dataset = self._datasets.get(num_rows)
        if dataset is None:
            dataset = reverb.TimestepDataset(
                self.address,
                self.table,
                dtypes=tree.map_structure(lambda spec: spec.dtype, self._signature),
                shapes=tree.map_structure(lambda spec: spec.shape, self._signature),
                max_in_flight_samples_per_worker=1,
                num_workers_per_iterator=1,
                rate_limiter_timeout_ms=int(self._timeout_secs * 1000),
                max_samples=num_rows,
            )
            self._datasets = {num_rows: dataset}  # boards ask for one row each time
        return dataset


def take(
    address: str, table: str, signature: Signature, *, max_rows: int = 1, timeout_secs: float = 5.0
) -> Sequence[Any]:
    """Returns what a `TableReader` of this table takes at its first reading. Blocks and raises as `TableReader.take`."""
    return TableReader(address, table, signature, timeout_secs=timeout_secs).take(max_rows)


def read(address: str, table: str, signature: Signature, *, timeout_secs: float = 5.0) -> Optional[Any]:
    """Returns a board's row, or None while nothing has been put there. Blocks and raises as `TableReader.take`."""
    return TableReader(address, table, signature, timeout_secs=timeout_secs).read()
