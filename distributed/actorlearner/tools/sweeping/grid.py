"""The grid of a sweep: variants (each a set of gin bindings) times seeds; parsed, checked and compared.

Run as a program, it reads a grid as JSON on stdin and prints each variant's settings, or what is wrong with them: it
needs TensorFlow, which stays out of the sweep's own process.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_CHECK_SECS = 300.0
DEFAULT_VARIANT = "default"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named set of gin bindings, applied after those of all variants."""

    name: str
    bindings: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The folder name, without characters that a shell, TensorFlow or a file system may misread."""
        plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", self.name).strip("_.") or "variant"
        if plain == self.name and len(plain) <= 100:
            return plain
        return f"{plain[:100]}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a sweep runs; the same in every start, except for added variants and seeds.

    Attributes:
      experiment: A shipped experiment's name, or a gin file.
      gin_bindings: Bindings of all variants.
      variants: At least one, with different names and folders.
      seeds: Each variant runs once with each seed.
      train_flags: Further flags of every `actorlearner train`.
    """

    experiment: str
    gin_bindings: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    train_flags: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment,
            "gin_bindings": list(self.gin_bindings),
            "variants": {variant.name: list(variant.bindings) for variant in self.variants},
            "seeds": list(self.seeds),
            "train_flags": list(self.train_flags),
        }


def grid_from_json(held: Mapping[str, Any]) -> Grid:
    """Returns the grid for the output of `as_json`."""
    return Grid(
        experiment=held["experiment"],
        gin_bindings=tuple(held["gin_bindings"]),
        variants=tuple(Variant(name, tuple(bindings)) for name, bindings in held["variants"].items()),
        seeds=tuple(held["seeds"]),
        train_flags=tuple(held["train_flags"]),
    )


class AnotherSweep(ValueError):
    """The folder holds a sweep that this command cannot resume."""


def read_asked(root: Path, held: Any) -> Grid:
    """Returns the grid in the sweep.json of `root`; raises `AnotherSweep` if it has none."""
    try:
        return grid_from_json(held["asked"])
    except (KeyError, TypeError, AttributeError) as error:
        raise AnotherSweep(f"{root} is not a sweep's folder: {root / 'sweep.json'} has no sweep") from error


def parse_seeds(text: str) -> tuple[int, ...]:
    """Returns seeds 0 to N-1 for "N", and the listed ones for "3,7,9" (or "7,": only 7).

    Raises:
      ValueError: It is neither, or a seed is listed twice.
    """
    words = [word.strip() for word in text.split(",")]
    if "," in text and words[-1] == "":
        words.pop()
    if not words or not all(re.fullmatch(r"[0-9]+", word) for word in words):
        raise ValueError(f"--seeds={text}: expected how many (5: seeds 0 to 4), or a list (3,7,9; one alone: 7,)")
    seeds = tuple(map(int, words)) if "," in text else tuple(range(int(words[0])))
    if not seeds:
        raise ValueError(f"--seeds={text}: expected at least 1")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={text}: a seed is listed twice")
    return seeds


def parse_set(text: str) -> list[str]:
    """Returns one binding for each value in "name=v1,v2,v3"; commas in brackets or quotes are part of a value.

    Raises:
      ValueError: The text is not a name with values, or a value is listed twice.
    """
    name, equals, values = (part.strip() for part in text.partition("="))
    expected = "expected NAME=VALUE,VALUE,..., such as 'sac.n_step_update=1,3' or 'dqn.fc_layer_params=(64, 64),(128,)'"
    if not equals or not name:
        raise ValueError(f"--set '{text}': {expected}")
    try:
        parts = _split_at_commas(values)
    except ValueError as error:
        raise ValueError(f"--set '{text}': {error}; {expected}") from error
    if not all(parts):
        raise ValueError(f"--set '{text}': a value is empty; {expected}")
    if len(set(parts)) < len(parts):
        raise ValueError(f"--set '{text}': a value is listed twice")
    return [f"{name} = {part}" for part in parts]


def _split_at_commas(text: str) -> list[str]:
    """Splits `text` at commas outside brackets and quotes."""
    parts, start, open_brackets, quote, is_escaped = [], 0, [], "", False
    for index, letter in enumerate(text):
        if quote:
            if is_escaped:
                is_escaped = False
            elif letter == "\\":
                is_escaped = True
            elif letter == quote:
                quote = ""
        elif letter in "'\"":
            quote = letter
        elif letter in _CLOSING:
            open_brackets.append(_CLOSING[letter])
        elif letter in _CLOSING.values():
            if not open_brackets or open_brackets.pop() != letter:
                raise ValueError(f"'{letter}' has no opening bracket")
        elif letter == "," and not open_brackets:
            parts.append(text[start:index].strip())
            start = index + 1
    if quote or open_brackets:
        raise ValueError(f"{quote or open_brackets[-1]} is missing at the end")
    return [*parts, text[start:].strip()]


def parse_variant(text: str) -> Variant:
    """Returns the variant for "name: binding; binding"; "name:" changes nothing.

    Raises:
      ValueError: The text is not a name with bindings.
    """
    from actorlearner.runtime.configuration import split_bindings

    name, colon, bindings = (part.strip() for part in text.partition(":"))
    if not colon or not name or "=" in name:
        raise ValueError(f"--variant '{text}': expected 'NAME: BINDING; BINDING', or 'NAME:' to change nothing")
    return Variant(name, tuple(split_bindings(bindings)))


def make_variants(sets: Sequence[str], variants: Sequence[str]) -> tuple[Variant, ...]:
    """Returns every combination of the values of `sets` (as `parse_set` takes them), then the named `variants`.

    Without any, it returns one variant that changes nothing.

    Raises:
      ValueError: As `parse_set` and `parse_variant`; or two have the same name.
    """
    made = []
    if sets:
        for bindings in itertools.product(*map(parse_set, sets)):
            made.append(Variant(",".join(binding.replace(" = ", "=", 1) for binding in bindings), bindings))
    made += map(parse_variant, variants)
    made = made or [Variant(DEFAULT_VARIANT, ())]
    for first, second in itertools.combinations(made, 2):
        if first.name == second.name or first.folder.lower() == second.folder.lower():
            raise ValueError(f"the variants '{first.name}' and '{second.name}' have the same name or folder")
    names = [text.partition("=")[0].strip() for text in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"--set: {', '.join(sorted({n for n in names if names.count(n) > 1}))} is given twice")
    return tuple(made)


def describe_differences(held: Grid, asked: Grid) -> list[str]:
    """Returns why `asked` cannot resume `held`; added variants and seeds are allowed."""
    differences = [
        f"{name}: the sweep has {getattr(held, name)!r}, this command {getattr(asked, name)!r}"
        for name in ("experiment", "gin_bindings", "train_flags")
        if getattr(held, name) != getattr(asked, name)
    ]
    bindings = {variant.name: variant.bindings for variant in asked.variants}
    for variant in held.variants:
        if variant.name not in bindings:
            differences.append(f"variant '{variant.name}': the sweep has it, this command does not")
        elif bindings[variant.name] != variant.bindings:
            differences.append(
                f"variant '{variant.name}': the sweep has {variant.bindings!r}, this command {bindings[variant.name]!r}"
            )
    missing = [seed for seed in held.seeds if seed not in asked.seeds]
    if missing:
        differences.append(f"seeds: the sweep has {', '.join(map(str, missing))}, this command does not")
    return differences


def describe_changes(held: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Returns the differing lines of variants' settings: - for the stored ones and + for the present ones."""
    changes = []
    for variant in held:
        lines = difflib.ndiff(held[variant].splitlines(), found.get(variant, "").splitlines())
        changed = [f"  {line}" for line in lines if line[:1] in "+-"]
        if changed:
            changes += [f"variant '{variant}': settings, including those of the experiment's files:", *changed]
    return changes


def find_settings(grid: Grid) -> dict[str, str]:
    """Returns each variant's complete settings, as gin text by variant; blocks while TensorFlow is imported.

    Raises:
      ValueError: `actorlearner train` would refuse an experiment, or it has no evaluations.
    """
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    asked = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(grid.as_json()),
        env=environment,
        capture_output=True,
        text=True,
        timeout=_CHECK_SECS,
    )
    if asked.returncode:
        raise ValueError(f"the experiment could not be read:\n{asked.stderr.strip()}")
    answers = json.loads(asked.stdout.splitlines()[-1])
    wrong = [f"variant '{name}': {answer['error']}" for name, answer in answers.items() if "error" in answer]
    if wrong:
        raise ValueError("\n".join(wrong))
    return {name: answer["settings"] for name, answer in answers.items()}


def _check(experiment: str, gin_bindings: Sequence[str], variants: Iterable[Variant]) -> dict[str, dict[str, str]]:
    from actorlearner.experiment import load_experiment
    from actorlearner.runtime.configuration import operative_config
    from actorlearner.runtime.lifecycle import RoleError

    answers: dict[str, dict[str, str]] = {}
    for variant in variants:
        try:
            loaded = load_experiment(experiment, [*gin_bindings, *variant.bindings])
            loaded.time_step_spec  # noqa: B018  (makes an environment, to check that it exists)
        except RoleError as error:
            answers[variant.name] = {"error": error.message}
            continue
        if not loaded.schedule.eval_interval:
            answers[variant.name] = {
                "error": "train.eval_interval = 0: expected 1 or more, as a sweep compares evaluations"
            }
        else:
            answers[variant.name] = {"settings": _without_imports(operative_config())}
    return answers


def _without_imports(settings: str) -> str:
    """Returns the settings without imports, which depend on the variants read before."""
    lines = [line for line in settings.splitlines() if line.strip() and not re.match(r"#|import |from ", line)]
    return "\n".join(lines)


if __name__ == "__main__":
    _asked = grid_from_json(json.load(sys.stdin))
    print(json.dumps(_check(_asked.experiment, _asked.gin_bindings, _asked.variants)))
