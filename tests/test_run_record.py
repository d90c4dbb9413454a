"""The run's record: what people and tools read of a run, also while its replay server says nothing."""

from __future__ import annotations

import json
import socket

import pytest

from actorlearner.cluster import Cluster
from actorlearner.evaluations import EvaluationLedger
from actorlearner.experiment import load_experiment
from actorlearner.run_directory import RunDirectory
from actorlearner.run_record import RunRecord
from actorlearner.variable_container import EvaluationRequests


@pytest.fixture
def silent_address():
    """Whoever connects waits for an answer that never comes, as of a host that hangs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def record(silent_address, tmp_path):
    directory = RunDirectory(tmp_path)
    ledger = EvaluationLedger(EvaluationRequests(silent_address), directory.evaluated)
    cluster = Cluster(silent_address, silent_address)
    record = RunRecord(load_experiment("dqn_cartpole", []), cluster, directory, ledger, versions={}, counts={})
    yield record
    record.close()


def read_status(folder):
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_the_status_goes_on_while_the_server_does_not_answer(record, tmp_path, eventually):
    """It says what is waited for, above all then; four questions without an answer take twenty seconds."""
    times = set()

    def was_written_thrice():
        times.add(read_status(tmp_path).get("time"))
        return len(times - {None}) >= 3

    eventually(was_written_thrice, secs=15)


def test_the_time_of_the_last_train_step_is_that_of_one_made_here(record, tmp_path, eventually):
    """A learner that came back and waits would else seem to have trained just now."""
    record.note_restored(5_000)
    eventually(lambda: read_status(tmp_path).get("train_step") == 5_000)
    assert read_status(tmp_path)["train_step_time"] is None
    record.note_train_step(5_050)
    eventually(lambda: read_status(tmp_path).get("train_step") == 5_050)
    status = read_status(tmp_path)
    assert 0.0 <= status["time"] - status["train_step_time"] < 60.0
