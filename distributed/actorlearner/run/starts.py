"""Every start of a run, in starts.jsonl: its time, train step, settings, and differences from the previous start."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from actorlearner.run.directory import RunDirectory

_MAX_TOLD = 8  # most differences in the log line; starts.jsonl has all


def note_start(
    directory: RunDirectory,
    train_step: int,
    seed: int,
    versions: Mapping[str, str],
    operative_config: str,
    command: Mapping[str, Any],
) -> dict[str, Any]:
    """Records a start and returns its differences from the previous one: [old, new] by name; empty for the first start.

    Appends to starts.jsonl and logs one line. Writes operative_config.gin; if it differs from the previous one, that is
    kept as `operative_config.<number of its last start>.gin`.

    Args:
      directory: The run directory, which this learner holds.
      train_step: The one that this start resumes from.
      seed: The run's seed, or the one given for this start.
      versions: Versions of the packages in use.
      operative_config: The operative configuration, as gin.
      command: Other facts about the start: its bindings and commit.
    """
    starts = directory.read_starts()
    before: Mapping[str, Any] = starts[-1] if starts else {}
    number = 1 + max((start["number"] for start in starts if isinstance(start.get("number"), int)), default=0)
    config_before = _read(directory.operative_config)
    differs: dict[str, list[Any]] = {}
    if config_before is not None:
        differs = find_differences(read_settings(config_before), read_settings(operative_config))
    if before:
        now = {"seed": seed, "commit": command.get("commit"), **versions}
        then = {"seed": before.get("seed"), "commit": before.get("commit"), **before.get("versions", {})}
        differs.update(find_differences(then, now))
    start = {
        "number": number,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "train_step": train_step,
        "seed": seed,
        "versions": dict(versions),
        **command,
        "differs": differs,
    }
    directory.add_start(start)  # first, so that a start that is killed later is in the list and in the curve
    if config_before is not None and config_before != operative_config:
        directory.write_text(directory.earlier_operative_config(number - 1), config_before)
    directory.write_text(directory.operative_config, operative_config)
    if number > 1 or config_before is not None:
        logging.info("start %d of this run, at train step %s: %s", number, f"{train_step:,}", describe(differs))
    return start


def describe(differs: Mapping[str, Any], most: int = _MAX_TOLD) -> str:
    """Returns the differences from the previous start, on one line."""
    if not differs:
        return "nothing differs from the previous start"
    told = [f"{name}: {old} -> {new}" for name, (old, new) in list(differs.items())[:most]]
    rest = len(differs) - len(told)
    return "differences from the previous start: " + "; ".join([*told, *([f"{rest} more"] if rest else [])])


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns [old, new] for each name whose values differ; None stands for a missing value."""
    names = [*now, *(name for name in before if name not in now)]
    return {name: [before.get(name), now.get(name)] for name in names if before.get(name) != now.get(name)}


def read_settings(operative_config: str) -> dict[str, str]:
    """Returns the settings of a gin configuration, as text by name."""
    text = re.sub(r"^#.*\n?", "", operative_config, flags=re.MULTILINE)
    text = re.sub(r"\\?\n[ \t]+", " ", text)  # a long value continues, indented, on the next lines
    settings = {}
    for line in text.splitlines():
        name, equals, value = line.partition(" =")
        if equals:
            settings[name.strip()] = value.strip()
    return settings


def find_commit(checkout: Path) -> Optional[str]:
    """Returns the git commit of a checkout, with "-dirty" if it has changes; None outside a checkout."""
    if not (checkout / ".git").exists():  # an installed package may lie inside another project's checkout
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() or None


def _read(path: Path) -> Optional[str]:
    try:
        return path.read_text() or None
    except (OSError, UnicodeDecodeError):
        return None
