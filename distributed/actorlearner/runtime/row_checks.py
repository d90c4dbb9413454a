"""Which values the rows of every table may have, because any client that reaches the port can write rows.

A row of the right types may still hold a NaN, an impossible count, or an unknown number. Every reader of a table checks
its rows here, through `runtime/messages.py` or `replay/chunk_checks.py`. Implausible rows are left out, with one
warning for each kind.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import tree

MAX_COUNT = 10**13
"""Largest plausible number of steps, episodes, versions or chunks: a million per second for a hundred days."""

MAX_SECS = 3e9
"""A duration of a hundred years, in seconds."""

MAX_MAGNITUDE = 1e15
"""Largest plausible reward or observation: the square of larger ones overflows in a loss."""

MAX_STEPS_PER_SEC = 1e7
"""Largest plausible rate of one actor, in environment steps per second."""

MAX_TASK = 10**6

_LARGEST = float(np.finfo(np.float64).max)


@dataclasses.dataclass(frozen=True)
class Between:
    """Limits for every number of a leaf, inclusive; NaN only with `or_nan`, infinities never."""

    least: float
    most: float
    or_nan: bool = False

    def find_misfit(self, leaf: Any) -> Optional[str]:
        """Returns what is wrong with a number or an array, in words; None if nothing is, or it holds no numbers."""
        values = np.asarray(leaf)
        if not values.size or values.dtype.kind not in "iuf":
            return None
        lowest, highest = values.min(), values.max()  # NaN if any value is
        if self.least <= lowest and highest <= self.most:
            return None
        if self.or_nan and np.isnan(lowest):
            return None
        value = highest if self.least <= lowest else lowest
        if self.most == _LARGEST:
            return f"= {value}, expected a finite number"
        return f"= {value}, expected {_say(self.least)} to {_say(self.most)}"


def _say(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


FINITE = Between(-_LARGEST, _LARGEST)
COUNT = Between(0, MAX_COUNT)
_IDENTITY = Between(0, 2**62 - 1)  # a random number
_TASK = Between(0, MAX_TASK)
_SECS = Between(0.0, MAX_SECS)
_PURPOSE = Between(0, 1)  # variable_container.Purpose
_PHASE = Between(-1, 2)  # variable_container.Phase
_VERSION = Between(-1, MAX_COUNT)  # -1: weights that were read from a file

LIMITS: Mapping[str, Mapping[str, Between]] = {
    "variables": {"policy_variables": FINITE, "train_step": COUNT},
    "variables_version": {
        "version": COUNT,
        "train_step": COUNT,
        "phase": _PHASE,
        "learner": _IDENTITY,
        "heartbeat": COUNT,
        "num_chunks": COUNT,
    },
    "evaluations_due": {"policy_variables": FINITE, "purpose": _PURPOSE, "train_step": COUNT, "version": _VERSION},
    "evaluations_done": {
        "train_step": COUNT,
        "version": _VERSION,
        "purpose": _PURPOSE,
        "average_return": FINITE,
        "return_std": Between(0.0, _LARGEST),
        "num_truncated": COUNT,
        "average_episode_length": Between(0.0, MAX_COUNT),
        "min_episode_length": COUNT,
        "num_episodes": Between(1, MAX_COUNT),
        "wall_secs": _SECS,
        "task": _TASK,
    },
    "evaluations_progress": {"train_step": COUNT, "purpose": _PURPOSE, "task": _TASK},
    "collect_reports": {
        "actor": _IDENTITY,
        "task": _TASK,
        "environment_steps": COUNT,
        "episodes": COUNT,
        "environment_crashes": COUNT,
        "average_return": Between(-_LARGEST, _LARGEST, or_nan=True),  # NaN before the first episode ends
        "blocked_secs": _SECS,
        "wall_secs": _SECS,
    },
    "last_words": {"text": Between(0, 255)},  # `reports.take_exit_reasons` reads what it says
    "replay_servers": {"addresses": Between(0, 255)},  # `replay.servers` checks the addresses
    "checkpoint_due": {"train_step": COUNT, "learner": _IDENTITY, "number": COUNT, "is_saved": Between(0, 1)},
    "checkpoint_done": {"train_step": COUNT, "learner": _IDENTITY, "number": COUNT, "is_saved": Between(0, 1)},
}
"""Limits by table and field (each leaf of a list). `replay.chunk_checks` has the replay tables' limits."""


def find_misfit(table: str, row: Any) -> Optional[str]:
    """Returns why a row of a table is implausible, starting with its field; None if it is plausible.

    Args:
      table: Name of the table. In a table without limits every number must be finite.
      row: A nest of numpy arrays with the structure of the table's signature.
    """
    limits = LIMITS.get(table, {})
    for path, leaf in tree.flatten_with_path(row):
        misfit = limits.get(str(path[0]) if path else "", FINITE).find_misfit(leaf)
        if misfit:
            return f"{'/'.join(map(str, path))} {misfit}"
    if table == "collect_reports":
        most = MAX_STEPS_PER_SEC * (float(row["wall_secs"]) + 1.0)
        if row["environment_steps"] > most:
            steps, secs = int(row["environment_steps"]), float(row["wall_secs"])
            return f"environment_steps = {steps:,} in {secs:.0f} s, more than any actor can make"
    return None


def keep_plausible(counts: Mapping[str, int]) -> dict[str, int]:
    """Returns the plausible ones of a checkpoint's counts."""
    return {name: count for name, count in counts.items() if COUNT.find_misfit(count) is None}


_said: set[tuple[str, str, str]] = set()
_said_lock = threading.Lock()


def say_left_out(address: str, table: str, why: str) -> None:
    """Warns that a row was left out, once for each server, table and kind (the field with which `why` starts)."""
    kind = (address, table, re.split("/| = ", why)[0])
    with _said_lock:
        if kind in _said or len(_said) > 1_000:  # another client must not fill the disk with warnings
            return
        _said.add(kind)
    logging.warning(
        "the table '%s' at %s held a row that does not fit: %s. It is not this experiment's; such rows are left out. "
        "Another client writes there: keep the port on a network you trust.",
        table,
        address,
        why,
    )
