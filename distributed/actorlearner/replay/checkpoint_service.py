"""A replay server's checkpoints, written when the learner asks for one and at the end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Optional

import reverb

from actorlearner import variable_container
from actorlearner.replay.checkpoint_requests import DUE_TABLE, Answers, Due, read_due
from actorlearner.replay.checkpoints import TableCheckpoints
from actorlearner.runtime.health import beat_meanwhile
from actorlearner.runtime.lifecycle import RoleError
from actorlearner.runtime.messages import Unreachable, read_server_info
from actorlearner.runtime.tls.tunnel import reach

CHECKPOINT_SECS = 3600.0
"""Longest time to write or read a checkpoint, in seconds; then the server counts as hung."""


class CheckpointService:
    """Saves the tables when the learner asks, and at the end."""

    def __init__(
        self, address: str, variables_address: str, checkpoints: Optional[TableCheckpoints], tables: Sequence[str]
    ):
        self._address = address
        self._variables_address = variables_address
        self._checkpoints = checkpoints
        self._tables = tables
        self._client = reverb.Client(reach(address))
        self._answers = Answers(address)
        self._served: Optional[Due] = None
        self._num_asked = 0
        self._train_step = 0
        self._saved_inserts = self._count_inserts()

    def serve_request(self) -> None:
        """Saves if the learner has asked since the last call; blocks until it is written. Raises `Unreachable`."""
        num_asked = read_server_info(self._address, timeout_secs=5)[DUE_TABLE].rate_limiter_info.insert_stats.completed
        if num_asked == self._num_asked:
            return
        due = read_due(self._address)
        self._num_asked = num_asked
        if due is None or due == self._served:
            return
        is_saved = self._save(due.train_step)
        self._served = due
        self._answers.send(due, is_saved)

    def save_what_is_new(self) -> None:
        """Saves if anything was inserted since the last checkpoint, under the train step of the last request."""
        version = None
        with contextlib.suppress(Unreachable):
            version = variable_container.read_version(self._variables_address, timeout_secs=1)
        try:
            due = read_due(self._address, timeout_secs=1)
            if self._count_inserts() != self._saved_inserts or (due and due != self._served):
                train_step = max(self._train_step, due.train_step if due else 0, version.train_step if version else 0)
                self._save(train_step)
        except Unreachable as error:
            logging.warning("the replay was not saved at the end: %s", error)

    def _save(self, train_step: int) -> bool:
        if not self._checkpoints:
            return False
        self._train_step = train_step
        inserts = self._count_inserts()
        try:
            with beat_meanwhile(CHECKPOINT_SECS):
                self._checkpoints.save(self._client, train_step)
        except RoleError as error:
            logging.warning("%s", error.message)
            return False
        self._saved_inserts = inserts
        return True

    def _count_inserts(self) -> int:
        info = read_server_info(self._address, timeout_secs=5)
        return sum(info[table].rate_limiter_info.insert_stats.completed for table in self._tables)
