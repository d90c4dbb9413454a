"""What actors tell the learner."""

from __future__ import annotations

import dataclasses
import math
import time

import portpicker
import pytest

from actorlearner import reports
from actorlearner.reports import CollectReport, EvaluationResult, NewestReport, Reporter
from actorlearner.runtime.messages import Unreachable
from actorlearner.variable_container import Purpose

RESULT = EvaluationResult(
    train_step=3_000_000_000,
    version=4,
    purpose=int(Purpose.PERIODIC),
    average_return=-0.1,
    average_episode_length=12.5,
    min_episode_length=3,
    num_episodes=20,
    wall_secs=1.25,
    task=1,
)
REPORT = CollectReport(
    actor=2**61 + 1,
    task=0,
    environment_steps=10,
    episodes=1,
    environment_crashes=2,
    average_return=9.5,
    blocked_secs=0.5,
)


@pytest.fixture
def address(serve):
    return f"localhost:{serve(reports.make_tables()).port}"


def test_reports_arrive_as_they_were_sent_and_once(address):
    """A count that went through float32, or a report taken twice, would make the run's record wrong."""
    reporter = Reporter(address)
    assert reporter.send(RESULT, timeout_secs=30)
    assert reporter.send(REPORT, timeout_secs=30)
    assert reporter.send(dataclasses.replace(REPORT, environment_steps=20), timeout_secs=30)
    assert list(reports.take_evaluation_results(address)) == [RESULT]
    assert [report.environment_steps for report in reports.take_collect_reports(address)] == [10, 20]
    assert not reports.take_evaluation_results(address)
    assert not reports.take_collect_reports(address)


def test_an_average_before_the_first_episode_is_not_a_number(address):
    """Zero would be a return, and a good one in some tasks."""
    Reporter(address).send(dataclasses.replace(REPORT, average_return=math.nan), timeout_secs=30)
    (report,) = reports.take_collect_reports(address)
    assert math.isnan(report.average_return)
    assert report.actor == REPORT.actor


def test_only_the_delivered_policys_result_is_delivered():
    """Both kinds come through one queue."""
    assert not RESULT.is_delivered
    assert dataclasses.replace(RESULT, purpose=int(Purpose.DELIVERED)).is_delivered


def test_a_report_to_a_server_that_is_away_is_no_error_of_the_actor(unused_address):
    """Collecting goes on while the server restarts."""
    assert Reporter(unused_address).send(REPORT, timeout_secs=0.2) is False
    with pytest.raises(Unreachable):
        reports.take_collect_reports(unused_address, timeout_secs=1)


def test_reports_of_a_time_without_a_server_become_one_and_nobody_waits_for_it(serve):
    """An actor that waited five seconds for each would collect nothing while the variable container is away."""
    port = portpicker.pick_unused_port()
    newest = NewestReport(f"localhost:{port}")
    started_at = time.monotonic()
    for number in range(1, 4):
        newest.put(dataclasses.replace(REPORT, environment_steps=number))
    assert time.monotonic() - started_at < 1.0
    assert not newest.await_sent(timeout_secs=0.1)
    serve(reports.make_tables(), port)
    assert newest.await_sent(timeout_secs=60)
    assert [report.environment_steps for report in reports.take_collect_reports(f"localhost:{port}")][-1] == 3
