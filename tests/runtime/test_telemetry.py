"""Rates, log lines and TensorBoard's points."""

from __future__ import annotations

import logging

import tensorflow as tf

from actorlearner.runtime import lifecycle
from actorlearner.runtime.telemetry import Events, Rate, RoleFormatter
from tests.memory import bytes_in_use


def test_a_rate_is_that_of_the_last_window_only():
    """An average since the start hides that a run has stalled."""
    rate = Rate(window_secs=10)
    assert rate.update(0, now=0.0) == 0
    assert rate.update(100, now=1.0) == 100
    for second in range(2, 60):
        last = rate.update(100 + 5 * (second - 1), now=float(second))
    assert last == 5
    for second in range(60, 80):
        last = rate.update(390, now=float(second))
    assert last == 0


def test_a_rate_of_two_looks_at_the_same_moment_is_zero():
    """Division by zero would end the thread that keeps the record."""
    rate = Rate()
    rate.update(1, now=5.0)
    assert rate.update(2, now=5.0) == 0


def test_our_log_lines_are_told_from_those_of_libraries():
    """The launcher shows capital letters on the terminal; TensorFlow's chatter belongs in the log file."""

    def line(path, level):
        record = logging.LogRecord("x", level, path, 1, "it is %s", ("so",), None)
        return RoleFormatter().format(record)

    assert line(lifecycle.__file__, logging.INFO)[0] == "I"
    assert line(lifecycle.__file__, logging.ERROR)[0] == "E"
    assert line(tf.__file__, logging.WARNING)[0] == "w"
    assert line(tf.__file__, logging.WARNING).endswith(" it is so")


def test_points_reach_tensorboard_at_once_under_their_train_step(tmp_path):
    """A writer that is never flushed loses its last minutes when the role is killed."""
    folder = tmp_path / "train"
    events = Events(folder)
    assert not folder.exists()
    events.write(5, {"loss": 0.5, "staleness": 3.0})
    events.write_text("operative_config", "a = 1\nb = 2")
    (file,) = folder.iterdir()
    points = [
        (value.tag, event.step, tf.make_ndarray(value.tensor).item())
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    ]
    assert points == [
        ("loss", 5, 0.5),
        ("staleness", 5, 3.0),
        ("operative_config", 0, b"    a = 1\n    b = 2"),
    ]


def test_points_leave_nothing_behind(tmp_path):
    """TensorFlow keeps a tensor of each of Python's numbers that it converts; a run of weeks writes millions."""
    events = Events(tmp_path)

    def write(first, end):
        for step in range(first, end):
            events.write(step, {name: step + offset / 10 for offset, name in enumerate("abcdefgh")})

    write(0, 100)
    before = bytes_in_use()
    write(100, 500)
    assert bytes_in_use() - before < 500_000  # with Python's numbers it was 2 MB
