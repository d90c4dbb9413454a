"""The learner asks for a checkpoint of the replay, and hears of it."""

from __future__ import annotations

import numpy as np

from actorlearner.replay import checkpoint_requests
from actorlearner.replay.checkpoint_requests import CheckpointRequests
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime import messages


def test_the_learner_hears_when_the_replay_is_saved(serve):
    """A pair of which one half is missing is no checkpoint; the learner must be able to say so."""
    address = f"localhost:{serve(checkpoint_requests.make_tables()).port}"
    requests = CheckpointRequests(ReplayServers([address]), learner=5)
    requests.ask(100)
    assert not requests.wait(secs=0.1)
    due = None
    while due is None:
        due = checkpoint_requests.read_due(address)
    assert (due.train_step, due.learner) == (100, 5)
    checkpoint_requests.Answers(address).send(due, is_saved=True)
    assert requests.wait(secs=30)
    requests.close()


def test_a_strangers_request_neither_stops_the_server_nor_hides_the_learners(serve):
    """One row made each look raise until the next request: the server noticed no end, and saved nothing at it."""
    address = f"localhost:{serve(checkpoint_requests.make_tables()).port}"
    row = {"train_step": -5, "learner": 1, "number": 1, "is_saved": 0}
    sender = messages.Sender(address)
    sender.put(checkpoint_requests.DUE_TABLE, {name: np.int64(value) for name, value in row.items()}, 30)
    assert checkpoint_requests.read_due(address) is None
    row["train_step"] = 5
    sender.put(checkpoint_requests.DUE_TABLE, {name: np.int64(value) for name, value in row.items()}, 30)
    assert checkpoint_requests.read_due(address) == checkpoint_requests.Due(5, 1, 1)
