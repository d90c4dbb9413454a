"""The run's record: what people and tools read of a run, also while its replay server says nothing."""

from __future__ import annotations

import json
import socket

import pytest
import tensorflow as tf

from actorlearner import reports, variable_container
from actorlearner.cluster import Cluster
from actorlearner.evaluations import queue
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.evaluations.queue import EvaluationRequests
from actorlearner.experiment import load_experiment
from actorlearner.reports import CollectReport
from actorlearner.run.directory import RunDirectory
from actorlearner.run.record import RunRecord
from actorlearner.runtime.rows import Reporter


@pytest.fixture
def silent_address():
    """A client that connects never gets an answer, as from a hung host."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def make_record(tmp_path):
    """`make_record(address)` begins the record of a run whose server listens there; it is closed after the test."""
    records = []

    def make(address, counts=None, account=dict):
        directory = RunDirectory(tmp_path)
        ledger = EvaluationLedger(EvaluationRequests(address), directory.evaluated)
        cluster = Cluster(address, address)
        experiment = load_experiment("dqn_cartpole", [])
        records.append(RunRecord(experiment, cluster, directory, ledger, {}, counts or {}, account))
        return records[-1]

    yield make
    for record in records:
        record.close()


@pytest.fixture
def record(make_record, silent_address):
    return make_record(silent_address)


@pytest.fixture
def address(serve):
    """Of a server that actors and record can reach."""
    variables = [tf.Variable(0.0)]
    tables = [*reports.make_tables(), *variable_container.make_tables(variables), *queue.make_tables(variables)]
    return f"localhost:{serve(tables).port}"


@pytest.fixture
def report(address):
    """`report(actor, environment_steps)` sends what an actor says of itself."""
    reporter = Reporter(address)

    def report(actor, environment_steps, blocked_secs=0.0, wall_secs=1.0):
        totals = {"episodes": 0, "environment_crashes": 0, "average_return": 0.0, "blocked_secs": blocked_secs}
        row = CollectReport(actor, 0, environment_steps, wall_secs=wall_secs, **totals)
        assert reporter.send(row, timeout_secs=30)

    return report


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
    """Otherwise a restarted, waiting learner would seem to have trained just now."""
    record.note_restored(5_000)
    eventually(lambda: read_status(tmp_path).get("train_step") == 5_000)
    assert read_status(tmp_path)["train_step_time"] is None
    record.note_train_step(5_050)
    eventually(lambda: read_status(tmp_path).get("train_step") == 5_050)
    status = read_status(tmp_path)
    assert 0.0 <= status["time"] - status["train_step_time"] < 60.0


def test_a_point_of_training_says_which_part_of_their_time_the_actors_waited_since_the_one_before(
    address, report, make_record, tmp_path, eventually
):
    """A learner that is never starved may be the slow one: without this the actors' cores idle unnoticed."""
    record = make_record(address)

    def point(environment_steps):
        eventually(lambda: record.environment_steps == environment_steps)
        record.log_training(1, {"loss": 0.0, "waiting_share": 0.0, "staleness": 0.0})
        line = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
        return json.loads(line).get("collect_blocked_share")

    assert point(0) is None
    report(actor=7, environment_steps=100, blocked_secs=50.0, wall_secs=90.0)  # to a learner before this one
    assert point(100) is None
    report(actor=7, environment_steps=110, blocked_secs=53.0, wall_secs=94.0)
    report(actor=8, environment_steps=1, blocked_secs=0.0, wall_secs=2.0)
    report(actor=8, environment_steps=10, blocked_secs=1.0, wall_secs=6.0)
    assert point(120) == 0.5
    assert point(120) == 0.5  # nobody reported since
    report(actor=7, environment_steps=200, blocked_secs=53.0, wall_secs=98.0)
    assert point(210) == 0.0


def test_steps_whose_report_died_with_an_actor_are_counted_by_what_the_replay_got(
    address, report, make_record, eventually
):
    """An actor reports once a second: each death of all would take thousands of steps off, for good."""
    replay = {"inserts": 9_100}
    record = make_record(address, {"collected": {"7": 5_000, "8": 1_000}, "inserts": 9_000}, lambda: replay)
    assert record.environment_steps == 9_000
    eventually(lambda: record.environment_steps == 9_100)
    report(actor=7, environment_steps=8_500)  # it lives on: what had arrived was its own
    eventually(lambda: record.environment_steps == 9_500)
    report(actor=9, environment_steps=400)
    eventually(lambda: record.environment_steps == 9_900)
    replay["inserts"] = 12_000
    eventually(lambda: record.environment_steps == 12_000)
    replay["inserts"] = 11_000  # a replay server came back with its last checkpoint
    report(actor=9, environment_steps=3_400)
    eventually(lambda: record.environment_steps == 12_900)
    record.close()
    assert make_record(address, {**record.counts(), "inserts": 11_000}).environment_steps == 12_900


def test_a_point_of_training_says_what_the_replay_holds(record, make_record, silent_address, tmp_path, eventually):
    """A curve that falls after a restart may be that of a learner whose replay is gone."""
    scalars = {"loss": 0.0, "waiting_share": 0.0, "staleness": 0.0}

    def point(record):
        record.log_training(1, scalars)
        return json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]).get("replay_held")

    assert point(record) is None  # nobody knows
    record = make_record(silent_address, account=lambda: {"held": 1_234, "inserts": 0})
    eventually(lambda: point(record) == 1_234)
