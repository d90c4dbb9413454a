"""What readers of status.json and summary.json make of them."""

from __future__ import annotations

import json

import pytest

from actorlearner.run.status import describe_delivered, parse_status, read_status


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"phase": 3}'])
def test_what_is_no_status_is_none(text):
    assert parse_status(text) is None


def test_status_of_an_earlier_run_in_the_same_directory_is_not_ours(tmp_path):
    """It may say that training is over, and the actors would not be started again."""
    path = tmp_path / "status.json"
    assert read_status(path, written_after=0.0) is None
    path.write_text(json.dumps({"phase": "training", "time": 1000.0}))
    assert read_status(path, written_after=1001.0) is None
    assert read_status(path, written_after=999.0) is not None


def test_summary_without_a_delivered_policy_says_nothing(tmp_path):
    path = tmp_path / "summary.json"
    assert describe_delivered(path) is None
    path.write_text('{"delivered": null}')
    assert describe_delivered(path) is None
