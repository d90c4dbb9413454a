"""The queue of snapshots due for evaluation."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import tensorflow as tf

from actorlearner.evaluations import queue
from actorlearner.evaluations.queue import (
    EVALUATIONS_TABLE,
    EvaluationRequest,
    EvaluationRequests,
    EvaluationResult,
    Purpose,
    take_evaluation,
)
from actorlearner.runtime import messages
from actorlearner.variable_container import Snapshot

VARIABLES = [tf.Variable([0.0, 0.0], name="weights"), tf.Variable(0.0, name="bias")]


@pytest.fixture
def address(serve):
    return f"localhost:{serve(queue.make_tables(VARIABLES)).port}"


def make_arrays(value):
    return [np.full(2, value, np.float32), np.float32(value)]


def test_sixty_strangers_snapshots_do_not_silence_evaluations(address):
    """Of an unknown purpose they ended the eval actor; of other types each cost it a look."""
    due = {
        "policy_variables": make_arrays(1),
        "purpose": np.int64(0),
        "train_step": np.int64(1),
        "version": np.int64(1),
    }
    strays = (
        {**due, "purpose": np.int64(99)},
        {**due, "version": np.int64(2**61)},
        {**due, "policy_variables": make_arrays(np.nan)},
        {**due, "train_step": np.float32(1.0)},
    )
    for stray in strays:
        sender = messages.Sender(address)
        for _ in range(15):
            sender.put(EVALUATIONS_TABLE, stray, 30)
    EvaluationRequests(address).put(EvaluationRequest(Snapshot(4, 400, make_arrays(4)), Purpose.PERIODIC))
    request = take_evaluation(address, VARIABLES)
    assert request is not None and request.snapshot.train_step == 400
    assert take_evaluation(address, VARIABLES) is None


def test_two_takers_get_each_due_snapshot_exactly_once(address):
    """Two eval actors on one snapshot waste half the work; a snapshot that none gets leaves a hole in the curve."""
    requests = EvaluationRequests(address)
    for step in range(8):
        requests.put(
            EvaluationRequest(Snapshot(step, 100 * step, make_arrays(step)), Purpose.PERIODIC), timeout_secs=30
        )
    taken: list[list[EvaluationRequest]] = [[], []]

    def take(mine):
        while (request := take_evaluation(address, VARIABLES)) is not None:
            mine.append(request)

    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(request.snapshot.train_step for mine in taken for request in mine) == list(range(0, 800, 100))
    for request in taken[0] + taken[1]:
        assert request.purpose is Purpose.PERIODIC
        assert float(request.snapshot.variables[1]) == request.snapshot.version


@pytest.mark.parametrize("purpose", Purpose)
def test_only_the_delivered_policys_result_is_delivered(purpose):
    """Both kinds come through one queue."""
    numbers = dict.fromkeys((field.name for field in dataclasses.fields(EvaluationResult)), 0)
    assert EvaluationResult(**{**numbers, "purpose": int(purpose)}).is_delivered == (purpose is Purpose.DELIVERED)
