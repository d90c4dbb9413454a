"""What actors tell the learner."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import portpicker
import pytest

from actorlearner import reports
from actorlearner.evaluations import queue
from actorlearner.evaluations.queue import EvaluationResult, Purpose, take_evaluation_results
from actorlearner.reports import Attendance, CollectReport, ExitReason, NewestReport
from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError
from actorlearner.runtime.messages import Unreachable
from actorlearner.runtime.rows import Reporter

RESULT = EvaluationResult(
    train_step=3_000_000_000,
    version=4,
    purpose=int(Purpose.PERIODIC),
    average_return=-0.1,
    return_std=2.5,
    average_episode_length=12.5,
    min_episode_length=3,
    num_truncated=4,
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
    wall_secs=4.0,
)


@pytest.fixture
def address(serve):
    return f"localhost:{serve([*reports.make_tables(), *queue.make_tables([])]).port}"


def test_reports_arrive_as_they_were_sent_and_once(address):
    """A count that went through float32, or a report taken twice, would make the run's record wrong."""
    reporter = Reporter(address)
    assert reporter.send(RESULT, timeout_secs=30)
    assert reporter.send(REPORT, timeout_secs=30)
    assert reporter.send(dataclasses.replace(REPORT, environment_steps=20), timeout_secs=30)
    assert list(take_evaluation_results(address)) == [RESULT]
    assert [report.environment_steps for report in reports.take_collect_reports(address)] == [10, 20]
    assert not take_evaluation_results(address)
    assert not reports.take_collect_reports(address)


def test_an_average_before_the_first_episode_is_not_a_number(address):
    """Zero would be a return, and a good one in some tasks."""
    Reporter(address).send(dataclasses.replace(REPORT, average_return=math.nan), timeout_secs=30)
    (report,) = reports.take_collect_reports(address)
    assert math.isnan(report.average_return)
    assert report.actor == REPORT.actor


def test_a_report_to_a_server_that_is_away_is_no_error_of_the_actor(unused_address):
    """Collecting continues while the server restarts."""
    assert Reporter(unused_address).send(REPORT, timeout_secs=0.2) is False
    with pytest.raises(Unreachable):
        reports.take_collect_reports(unused_address, timeout_secs=1)


WORDS = ExitReason("collect-actor", 3, 65, "after 1,500 environment steps observation[2] = nan")


def test_last_words_arrive_whole_or_cut_to_the_room_there_is(address):
    """The reason for an end is worth nothing on another host's disk; a long one must not get lost either."""
    long = dataclasses.replace(WORDS, message='\u00e4\n"' * 5_000)
    assert reports.send_exit_reason(address, WORDS, timeout_secs=30)
    assert reports.send_exit_reason(address, long, timeout_secs=30)
    first, second = reports.take_exit_reasons(address)
    assert first == WORDS
    assert len(second.message) > 100 and long.message.startswith(second.message)
    assert not reports.take_exit_reasons(address)


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"7",
        b'["collect-actor", 0, 999, "no such code"]',
        b'["collect-actor", 0, 0, "as if training had ended"]',
        b'["collect-actor", 0, 69, "it would be started again"]',
        b'["collect-actor", 4611686018427387904, 65, "no such task"]',
        b'["nobody", 0, 65, "no such role"]',
        b'["eval-actor", 0, [65], "no code at all"]',
        b"\xff",
    ],
)
def test_a_strangers_last_words_are_left_out(address, text):
    """A client at the port could end the run with one row, or hide an actor's reason."""
    row = np.frombuffer(text.ljust(2_000, b"\0"), np.uint8)
    messages.Sender(address).put(reports.EXIT_REASONS_TABLE, {"text": row}, 30)
    assert reports.send_exit_reason(address, WORDS, timeout_secs=30)
    assert reports.take_exit_reasons(address) == [WORDS]


def test_last_words_cannot_write_to_the_terminal(address):
    """A foreign row could overwrite the log on a reader's terminal."""
    assert reports.send_exit_reason(address, dataclasses.replace(WORDS, message="\x1b[2J\x07gone"), timeout_secs=30)
    (words,) = reports.take_exit_reasons(address)
    assert words.message == "?[2J?gone"


def test_last_words_that_nobody_takes_hold_nobody_up(unused_address):
    assert not reports.send_exit_reason(unused_address, WORDS)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nobody_waits_for_actors_that_have_all_ended_for_good():
    """A learner that starves after a NaN would be restarted for ever, on a machine that others wait for."""
    clock = Clock()
    attendance = Attendance(60.0, clock)
    attendance.raise_if_all_failed("collect-actor")
    clock.now = 100.0
    attendance.note_end(WORDS)
    clock.now = 101.0
    attendance.note_life("collect-actor")  # its own last report
    clock.now = 161.0
    attendance.raise_if_all_failed("collect-actor")
    attendance.raise_if_all_failed("eval-actor")
    clock.now = 162.0
    with pytest.raises(RoleError, match=r"collect-actor 3 failed for good .* observation\[2\] = nan") as raised:
        attendance.raise_if_all_failed("collect-actor")
    assert raised.value.exit_code == ExitCode.DATA


def test_an_actor_that_ended_long_ago_does_not_end_a_run_whose_others_are_out_of_reach():
    """Data that stops later has another cause, such as the network, and may come back."""
    clock = Clock()
    attendance = Attendance(60.0, clock)
    attendance.note_end(WORDS)
    clock.now = 3_600.0
    attendance.note_life("collect-actor")
    clock.now = 7_200.0
    attendance.raise_if_all_failed("collect-actor")


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
