"""The schema of status.json and summary.json, for everything that reads them.

status.json is replaced every second while a learner lives; summary.json is written when training ends. Readers get a
`Status` or a `Summary`; run/record.py writes exactly the fields of these classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, TypedDict, cast

OVER = "over"
PHASES_AFTER_EVALUATION = ("reporting", OVER)
PHASES_AFTER_TRAINING = ("final evaluation", *PHASES_AFTER_EVALUATION)


@dataclasses.dataclass(frozen=True)
class Status:
    """The learner's status, as in status.json. None where a value is missing or unusable.

    Attributes:
      phase: "waiting", "training", or one of `PHASES_AFTER_TRAINING`.
      train_step: Train steps so far.
      train_step_time: End of the last train step, in unix seconds; None before this learner's first.
      num_iterations: Train steps until training ends.
      environment_steps: Environment steps collected so far.
      train_steps_per_sec, environment_steps_per_sec: Rates over the last half minute.
      environment_crashes: Environments that were replaced after an error.
      last_evaluation: The result of the latest train step that has one; an entry of `Summary.evaluations`.
      seconds_left: Time to the last train step, at this rate.
      waiting_for: What the learner waits for, in words; None if for nothing.
      replay: The account of samples and inserts; its fields depend on the replay.
      pending_evaluations: Train steps whose results have not come back.
      process: The learner's process id.
      time: When this was written, in unix seconds.
    """

    phase: str
    train_step: int = 0
    train_step_time: Optional[float] = None
    num_iterations: int = 0
    environment_steps: int = 0
    train_steps_per_sec: Optional[float] = None
    environment_steps_per_sec: Optional[float] = None
    environment_crashes: int = 0
    last_evaluation: Optional[Mapping[str, Any]] = None
    seconds_left: Optional[float] = None
    waiting_for: Optional[str] = None
    replay: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pending_evaluations: Sequence[int] = ()
    process: int = 0
    time: float = 0.0

    @property
    def is_after_training(self) -> bool:
        return self.phase in PHASES_AFTER_TRAINING

    @property
    def evaluated_train_step(self) -> Optional[int]:
        step = _number((self.last_evaluation or {}).get("train_step"))
        return None if step is None else int(step)

    @property
    def average_return(self) -> Optional[float]:
        return _number((self.last_evaluation or {}).get("average_return"))

    def to_json(self) -> dict[str, Any]:
        """Returns what status.json holds."""
        return dataclasses.asdict(self)


def parse_status(text: str) -> Optional[Status]:
    """Returns the status in `text`, or None if it is none. Missing and non-finite numbers become None."""
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("phase"), str):
        return None

    def number(name: str) -> Optional[float]:
        return _number(fields.get(name))

    def count(name: str) -> int:
        return int(number(name) or 0)

    def of_type(name: str, kind: type) -> Any:
        return fields[name] if isinstance(fields.get(name), kind) else None

    return Status(
        phase=fields["phase"],
        train_step=count("train_step"),
        train_step_time=number("train_step_time"),
        num_iterations=count("num_iterations"),
        environment_steps=count("environment_steps"),
        train_steps_per_sec=number("train_steps_per_sec"),
        environment_steps_per_sec=number("environment_steps_per_sec"),
        environment_crashes=count("environment_crashes"),
        last_evaluation=of_type("last_evaluation", dict),
        seconds_left=number("seconds_left"),
        waiting_for=of_type("waiting_for", str),
        replay=of_type("replay", dict) or {},
        pending_evaluations=of_type("pending_evaluations", list) or [],
        process=count("process"),
        time=number("time") or 0.0,
    )


def read_status(path: Path, written_after: float = -math.inf) -> Optional[Status]:
    """Returns the status in the file `path`, or None if this start has written none yet.

    A resumed run finds the file of the previous start; only one newer than `written_after` (unix seconds) counts.
    """
    try:
        status = parse_status(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if status is not None and status.time >= written_after else None


class Delivered(TypedDict):
    """The delivered policy's result; lengths are in environment steps."""

    train_step: int
    average_return: float
    return_std: float
    average_episode_length: float
    min_episode_length: int
    num_truncated: int
    num_episodes: int


class Summary(TypedDict):
    """The content of summary.json.

    Attributes:
      experiment, seed: The trained experiment and its seed.
      versions: Versions of the packages.
      starts: The run's starts; see run/starts.py.
      wall_seconds: Training time, all starts together.
      train_steps, environment_steps, environment_crashes: Totals.
      has_ended: Whether training reached its end and was not resumed past it.
      evaluations: Results by train step.
      delivered: The delivered policy's result; None without one.
    """

    experiment: str
    seed: Optional[int]
    versions: Mapping[str, str]
    starts: Sequence[Mapping[str, Any]]
    wall_seconds: float
    train_steps: int
    has_ended: bool
    environment_steps: int
    environment_crashes: int
    evaluations: Sequence[Mapping[str, Any]]
    delivered: Optional[Delivered]


_EVALUATION_NUMBERS = (
    "train_step",
    "environment_steps",
    "average_return",
    "average_episode_length",
    "num_episodes",
    "wall_secs",
)
_DELIVERED_NUMBERS = (
    "train_step",
    "average_return",
    "average_episode_length",
    "min_episode_length",
    "num_episodes",
)
_REMEDY = "The run itself writes it: restore it, or run again in a new root_dir"


def read_ended_summary(path: Path) -> Optional[Summary]:
    """Returns the summary at `path` if its run has ended and was not resumed since, else None."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast(Summary, summary) if isinstance(summary, dict) and summary.get("has_ended") is True else None


def has_ended(path: Path) -> bool:
    """Returns whether the `summary.json` at `path` says that training ended; only videos may be missing."""
    return read_ended_summary(path) is not None


def describe_delivered(path: Path) -> Optional[str]:
    """Returns one line on the delivered policy, from the run's `summary.json`, or None if that has none."""
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


def require_summary(root_dir: Path) -> Summary:
    """Returns a run directory's `summary.json`, checked to have every field that the report shows.

    Raises:
      ValueError: The file is missing, is not JSON, or lacks a field; the message names the file, the field and what
        to do.
    """
    path = root_dir / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist. Pass the directory of a run that has finished or was stopped normally."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise ValueError(f"{path} cannot be read as JSON: {error}. {_REMEDY}") from error
    problem = find_problem(summary)
    if problem:
        raise ValueError(f"{path}: {problem}. {_REMEDY}")
    return summary


def find_problem(summary: Any) -> Optional[str]:
    """Returns why `summary` cannot be shown, or None."""
    if not isinstance(summary, Mapping):
        return f"expected an object, found {type(summary).__name__}"
    if not isinstance(summary.get("experiment"), str):
        return f"'experiment' should be a name, found {summary.get('experiment')!r}"
    problem = _not_numbers(summary, ("seed", "train_steps", "environment_steps", "wall_seconds"), "")
    if problem:
        return problem
    if not isinstance(summary.get("evaluations"), list):
        return f"'evaluations' should be a list, found {summary.get('evaluations')!r}"
    for index, evaluation in enumerate(summary["evaluations"]):
        problem = _not_numbers(evaluation, _EVALUATION_NUMBERS, f"evaluations[{index}]")
        if problem:
            return problem
    if summary.get("delivered") is not None:
        return _not_numbers(summary["delivered"], _DELIVERED_NUMBERS, "delivered")
    return None


def _not_numbers(values: Any, names: tuple[str, ...], where: str) -> Optional[str]:
    """Returns which of `values[name]` is not a number, or None."""
    if not isinstance(values, Mapping):
        return f"'{where}' should be an object, found {values!r}"
    for name in names:
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), (int, float)):
            return f"'{where + '.' if where else ''}{name}' should be a number, found {values.get(name)!r}"
    return None


def _number(value: Any) -> Optional[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None
