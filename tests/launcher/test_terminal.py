"""What the launcher shows of training."""

from __future__ import annotations

import json

import pytest

from actorlearner.launcher.terminal import describe_status
from actorlearner.run.status import parse_status

FULL_STATUS = {
    "phase": "training",
    "train_step": 41_000,
    "num_iterations": 100_000,
    "train_steps_per_sec": 193.2,
    "environment_steps": 51_000,
    "environment_steps_per_sec": 4.25,
    "last_evaluation": {"train_step": 40_000, "average_return": 1234.56, "average_episode_length": 500.0},
    "seconds_left": 303.4,
    "waiting_for": None,
    "time": 1000.0,
}


def test_status_line_has_every_figure():
    status = parse_status(json.dumps(FULL_STATUS))
    assert describe_status(status) == (
        "training: 41,000 of 100,000 train steps (41%), 193/s; 51,000 environment steps, 4.2/s; "
        "last evaluation 1,234.6 at 40,000; 5 min 03 s left"
    )
    assert describe_status(status, age_secs=12.0).endswith("; no update for 12 s")


def test_status_line_says_what_is_waited_for():
    waiting = {**FULL_STATUS, "phase": "waiting", "waiting_for": "1,000 transitions in replay"}
    line = describe_status(parse_status(json.dumps(waiting)))
    assert line.startswith("waiting for 1,000 transitions in replay: 41,000 of")
    assert describe_status(None) == "starting: waiting for the learner"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"fast"', "true", "[1]"])
def test_unusable_figures_are_left_out(value):
    """A loss that diverged or a rate not yet known must not take the launcher down."""
    fields = ("train_steps_per_sec", "environment_steps_per_sec", "seconds_left", "train_step", "last_evaluation")
    text = '{"phase": "training", ' + ", ".join(f'"{field}": {value}' for field in fields) + "}"
    assert describe_status(parse_status(text)) == "training: 0 train steps; 0 environment steps"
