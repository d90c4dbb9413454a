"""Durations in words."""

from __future__ import annotations

import pytest

from actorlearner.runtime.durations import describe_secs


@pytest.mark.parametrize(
    ("secs", "words"), [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (303, "5 min 03 s"), (11_100, "3 h 05 min")]
)
def test_durations_read_well(secs, words):
    assert describe_secs(secs) == words
