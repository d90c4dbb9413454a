"""What the learner says of training in status.json and summary.json, for whoever reads it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Optional

PHASES_AFTER_EVALUATION = ("reporting", "over")
PHASES_AFTER_TRAINING = ("final evaluation", *PHASES_AFTER_EVALUATION)


@dataclasses.dataclass(frozen=True)
class Status:
    """The learner's own account of training, from `status.json`. None where it said nothing usable."""

    phase: str
    train_step: int = 0
    num_iterations: int = 0
    train_steps_per_sec: Optional[float] = None
    environment_steps: int = 0
    environment_steps_per_sec: Optional[float] = None
    evaluated_train_step: Optional[int] = None
    average_return: Optional[float] = None
    seconds_left: Optional[float] = None
    waiting_for: Optional[str] = None
    time: float = 0.0

    @property
    def is_after_training(self) -> bool:
        return self.phase in PHASES_AFTER_TRAINING


def parse_status(text: str) -> Optional[Status]:
    """Returns the status in `text`, or None if it is not one. Missing and non-finite numbers are not errors."""
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("phase"), str):
        return None
    evaluation = fields.get("last_evaluation")
    evaluation = evaluation if isinstance(evaluation, dict) else {}
    evaluated = _number(evaluation.get("train_step"))
    waiting_for = fields.get("waiting_for")
    return Status(
        phase=fields["phase"],
        train_step=int(_number(fields.get("train_step")) or 0),
        num_iterations=int(_number(fields.get("num_iterations")) or 0),
        train_steps_per_sec=_number(fields.get("train_steps_per_sec")),
        environment_steps=int(_number(fields.get("environment_steps")) or 0),
        environment_steps_per_sec=_number(fields.get("environment_steps_per_sec")),
        evaluated_train_step=None if evaluated is None else int(evaluated),
        average_return=_number(evaluation.get("average_return")),
        seconds_left=_number(fields.get("seconds_left")),
        waiting_for=waiting_for if isinstance(waiting_for, str) else None,
        time=_number(fields.get("time")) or 0.0,
    )


def read_status(path: Path, written_after: float) -> Optional[Status]:
    """Returns the status in the file `path`, or None if there is none yet that this run wrote.

    A continued run finds the file of the run before it; only what is newer than `written_after` (unix seconds) counts.
    """
    try:
        status = parse_status(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if status is not None and status.time >= written_after else None


def has_ended(path: Path) -> bool:
    """Returns whether the `summary.json` at `path` is of a run that has nothing left to do but its videos."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("has_ended") is True
    except (OSError, ValueError, AttributeError):
        return False


def describe_delivered(path: Path) -> Optional[str]:
    """Returns one line on the policy the run hands over, from its `summary.json`, or None if that says nothing."""
    try:
        delivered = json.loads(path.read_text(encoding="utf-8"))["delivered"]
        return (
            f"delivered policy of train step {delivered['train_step']:,}: "
            f"average return {delivered['average_return']:,.1f}, "
            f"average episode length {delivered['average_episode_length']:,.1f}, "
            f"shortest {delivered['min_episode_length']:,} "
            f"({delivered['num_episodes']:,} fresh episodes)"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _number(value: Any) -> Optional[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None
