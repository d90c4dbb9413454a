"""Rows of numbers that processes exchange through queues; each kind of row is a dataclass.

A kind of row is a dataclass with `int` and `float` fields that names its `TABLE`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.runtime import messages
from actorlearner.runtime.messages import Unreachable

MAX_ROWS = 1_000
"""Largest number of rows taken in one call."""

_INT64 = tf.TensorSpec((), tf.int64)
_FLOAT64 = tf.TensorSpec((), tf.float64)


class Row(Protocol):
    """A frozen dataclass of whole and real numbers.

    Attributes:
      TABLE: Name of the queue that holds rows of this kind.
    """

    TABLE: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Row)


def make_queue(kind: type[Row], max_size: int) -> reverb.Table:
    """Returns the server's queue for rows of a kind."""
    return messages.make_queue(kind.TABLE, max_size, _signature(kind))


def take(address: str, kind: type[R], timeout_secs: float = 5.0) -> Sequence[R]:
    """Returns the rows that arrived since the last call. Blocks and raises as `messages.take`."""
    signature = _signature(kind)
    found = messages.take(address, kind.TABLE, signature, max_rows=MAX_ROWS, timeout_secs=timeout_secs)
    return _from_rows(found, kind)


def take_current(address: str, kind: type[R], timeout_secs: float = 5.0) -> Sequence[R]:
    """Returns the rows that arrived since the last call. Blocks and raises as `messages.take_current`."""
    signature = _signature(kind)
    found = messages.take_current(address, kind.TABLE, signature, max_rows=MAX_ROWS, timeout_secs=timeout_secs)
    return _from_rows(found, kind)


class Reporter:
    """Sends rows; used from one thread."""

    def __init__(self, address: str):
        self._sender = messages.Sender(address)

    def send(self, row: Row, *, timeout_secs: float = 5.0) -> bool:
        """Returns whether the server accepted the row; blocks at most `timeout_secs` seconds."""
        try:
            self._sender.put(row.TABLE, _to_row(row), timeout_secs)
        except Unreachable as error:
            logging.info("report not delivered: %s", error)
            return False
        return True


def _signature(kind: type[Row]) -> dict[str, Any]:
    # Annotations are strings, because of `from __future__ import annotations`.
    return {field.name: _INT64 if field.type == "int" else _FLOAT64 for field in dataclasses.fields(kind)}


def _to_row(row: Row) -> dict[str, Any]:
    convert: dict[Any, type] = {"int": np.int64, "float": np.float64}
    return {field.name: convert[field.type](getattr(row, field.name)) for field in dataclasses.fields(row)}


def _from_rows(found: Sequence[Any], kind: type[R]) -> Sequence[R]:
    return [kind(**{name: value.item() for name, value in row.items()}) for row in found]
