"""Where the learner's time goes, and when it publishes."""

from __future__ import annotations

import pytest

from actorlearner.training.timing import PublishInterval, TimeShares


def test_shares_of_time_say_where_it_went():
    """A learner that waits and one that computes look the same from outside; only one of them needs more actors."""
    seconds = iter([0.0, 1.0, 6.0, 6.0, 8.0, 8.0, 9.0, 10.0, 20.0])
    shares = TimeShares(clock=lambda: next(seconds))
    with shares.waiting():  # from 1 to 6
        pass
    with shares.computing():  # from 6 to 8
        pass
    with shares.ingesting():  # from 8 to 9
        pass
    expected = {"waiting_share": 0.5, "computing_share": 0.2, "ingesting_share": 0.1, "between_share": 0.2}
    assert shares.take() == pytest.approx(expected)
    assert shares.take() == {**dict.fromkeys(expected, 0.0), "between_share": 1.0}


def test_weights_are_published_after_the_train_steps_and_the_seconds_asked_for():
    """By the clock alone a machine three times as fast collects with weights three times as many train steps old."""
    now = 0.0
    interval = PublishInterval(train_steps=100, secs=1.0, clock=lambda: now)
    interval.begin(36)
    now = 5.0
    assert not interval.is_over(108)
    assert interval.is_over(144)
    interval.begin(144)
    now = 5.9
    assert not interval.is_over(1_000)
    now = 6.0
    assert interval.is_over(1_000)
