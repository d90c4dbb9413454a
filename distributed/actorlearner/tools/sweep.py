"""Sweep: trains every variant of an experiment with every seed, and says with which spread they differ.

variants x seeds --> trials, some at once --> run directories --> one table, one picture

Each trial is a real `actorlearner train` in <root_dir>/<variant>/seed-<S>. What has ended is not repeated and what has
not goes on, so the same command, given again, continues whatever was interrupted. Imports nothing heavy but for the
report.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import signal
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Optional

from actorlearner.run_directory import RunDirectory
from actorlearner.tools.sweep_grid import (
    Grid,
    describe_changes,
    describe_differences,
    find_settings,
    grid_from_json,
    make_variants,
    parse_seeds,
)
from actorlearner.tools.sweep_trials import STOP_SECS, RunningTrial, Trial, take_lock

USAGE, DATA, CANNOT_CREATE, OCCUPIED = 64, 65, 73, 75  # as in runtime/lifecycle.py
FAILED = 1
SAY_EVERY_SECS = 60.0
RACE_SECS = 5.0
POLL_SECS = 0.5
_SECOND_SIGNAL_SECS = 0.5  # signals closer together are one: `timeout` and shells deliver theirs twice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sweep's arguments; what stands behind `--` becomes `train_flags`."""
    parser.usage = "actorlearner sweep EXPERIMENT [options] [-- TRAIN_FLAG ...] | actorlearner sweep --report DIR"
    parser.epilog = "Flags of `actorlearner train`, such as --num_collect_actors=2, go behind -- and to every trial."
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help="a shipped experiment or a gin file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=V1,V2,...",
        help="a gin binding's values, e.g. 'sac.n_step_update=1,3,5'; commas inside brackets and quotes are part of a "
        "value; may be repeated: every combination is a variant",
    )  # fmt: skip
    parser.add_argument(
        "--variant", action="append", default=[], metavar="'NAME: BINDING; ...'",
        help="one variant more, beside those of --set, with these bindings; 'NAME:' changes nothing; may be repeated",
    )  # fmt: skip
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="BINDING", help="of all")
    parser.add_argument(
        "--seeds", default="3", metavar="N", help="5: seeds 0 to 4; 3,7,9: those; 7,: that one alone (default: 3)"
    )
    parser.add_argument(
        "--root_dir", type=Path, help="the sweep's folder (default: runs/sweep-<experiment>); given again, it goes on"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="trials at once (default: half the cores, at least 1)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="lower the trials' priority by N (default: 0)")
    parser.add_argument(
        "--at", default="", metavar="STEP,...", help="also compare there, on the clock of --clock (default: at the end)"
    )
    parser.add_argument(
        "--clock", choices=("environment_steps", "train_step"), default="environment_steps",
        help="what --at counts and the picture's x axis (default: environment_steps)",
    )  # fmt: skip
    parser.add_argument(
        "--race", action="store_true",
        help="stop variants that are beaten with confidence, after three seeds (without it a beaten one goes on)",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the trials and their commands; start nothing")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a sweep's table and picture as it is now")

    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        # argparse hands what is behind -- to positional arguments only where no option stands before it.
        words = list(sys.argv[1:] if args is None else args)
        cut = words.index("--") if "--" in words else len(words)
        parsed, rest = parse(words[:cut], namespace)
        parsed.train_flags = words[cut + 1 :]
        return parsed, rest

    setattr(parser, "parse_known_args", parse_known_args)  # noqa: B010  (mypy forbids the assignment)


def run(arguments: argparse.Namespace, train: argparse.Namespace) -> int:
    """Runs the sweep, or reports on one; returns its exit status.

    Args:
      arguments: The sweep's.
      train: What `actorlearner train` makes of the sweep's `train_flags`.
    """
    try:
        steps = [int(word) for word in arguments.at.split(",") if word.strip()]
    except ValueError:
        return _refuse(f"--at={arguments.at}: expected steps with commas between, such as 50000,100000", USAGE)
    if arguments.report:
        if arguments.experiment:
            return _refuse("EXPERIMENT and --report: expected one of them, the other left out", USAGE)
        return report_sweep(arguments.report, arguments.clock, steps)
    try:
        _check_train_flags(train)
        grid = _read_grid(arguments)
        root = arguments.root_dir or Path("runs") / f"sweep-{Path(grid.experiment).stem}"
        held: dict[str, Any] = {}
        if (root / "sweep.json").exists():
            held = RunDirectory(root).read_json(root / "sweep.json")
            _require_same(root, describe_differences(_read_asked(root, held), grid))
        settings = find_settings(grid)
        _require_same(root, describe_changes(held.get("settings", {}), settings))
    except _AnotherSweep as error:
        return _refuse(str(error), DATA)
    except ValueError as error:
        return _refuse(str(error), USAGE)
    jobs = max(1, _count_cores() // 2) if arguments.jobs is None else arguments.jobs
    sweep = _Sweep(
        root, grid, settings, clock=arguments.clock, steps=steps, jobs=jobs, nice=arguments.nice, race=arguments.race
    )
    if arguments.dry_run:
        sweep.print_plan()
        return 0
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".sweep.lock", "w")  # noqa: SIM115  (held until the process ends)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _refuse(f"another sweep is at work in --root_dir={root}. Stop it, or give another directory.", OCCUPIED)
    except OSError as error:
        return _refuse(f"--root_dir={root} cannot be written: {error.strerror} ({error.filename})", CANNOT_CREATE)
    with lock:
        return sweep.run()


def _refuse(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


class _AnotherSweep(ValueError):
    """The folder holds a sweep that this command cannot go on with."""


def _read_asked(root: Path, held: Any) -> Grid:
    """Returns the grid of the sweep in `root`, of its sweep.json; raises `_AnotherSweep` if that holds none."""
    try:
        return grid_from_json(held["asked"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _AnotherSweep(f"{root} is no sweep's folder: {root / 'sweep.json'} says nothing of one") from error


def _require_same(root: Path, differences: Sequence[str]) -> None:
    """Raises `_AnotherSweep` if there are any."""
    if differences:
        raise _AnotherSweep(
            f"--root_dir={root} holds another sweep:\n  "
            + "\n  ".join(differences)
            + "\nGive another directory; nothing in this one was changed."
        )


def _check_train_flags(train: argparse.Namespace) -> None:
    """Raises `ValueError` where a flag behind -- is the sweep's own, or one with which no trial could end well."""
    for name, instead in (
        ("seed", "--seeds"),
        ("root_dir", "the sweep's --root_dir"),
        ("gin_bindings", "--gin_bindings"),
    ):
        if getattr(train, name) not in (None, []):
            raise ValueError(f"--{name} behind --: each trial has its own; expected {instead} before --")
    if train.fresh:
        raise ValueError("--fresh behind --: a sweep goes on with what is there; give it another --root_dir instead")
    for name in ("num_collect_actors", "num_eval_actors", "num_replay_servers"):
        if getattr(train, name) < 1:
            raise ValueError(f"--{name}={getattr(train, name)} behind --: expected 1 or more")


def _read_grid(arguments: argparse.Namespace) -> Grid:
    """Raises `ValueError`."""
    if not arguments.experiment:
        raise ValueError("EXPERIMENT is missing: expected a shipped experiment or a gin file, or --report DIR")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs={arguments.jobs}: expected 1 or more")
    if not 0 <= arguments.nice <= 19:
        raise ValueError(f"--nice={arguments.nice}: expected 0 to 19")
    return Grid(
        experiment=arguments.experiment,
        gin_bindings=tuple(arguments.gin_bindings),
        variants=make_variants(arguments.set, arguments.variant),
        seeds=parse_seeds(arguments.seeds),
        train_flags=tuple(arguments.train_flags),
    )


class _Sweep:
    """One start of a sweep."""

    def __init__(
        self,
        root: Path,
        grid: Grid,
        settings: dict[str, str],
        *,
        clock: str,
        steps: Sequence[int],
        jobs: int,
        nice: int,
        race: bool,
    ):
        self.file = root / "sweep.json"
        self._root, self._grid, self._settings = root, grid, settings
        self._clock, self._steps, self._jobs, self._nice, self._race = clock, steps, jobs, nice, race
        self._directory = RunDirectory(root)
        self._held: dict[str, Any] = self._directory.read_json(self.file) or {}
        self._failures: dict[str, dict[str, Any]] = {}  # by trial
        self._beaten: dict[str, str] = dict(self._held.get("beaten", {})) if race else {}  # why, by variant
        self._signals: list[int] = []
        self._signal_time = 0.0
        self._environment = dict(os.environ)
        if jobs > 1:  # a learner takes all cores but one: several of them share
            self._environment.setdefault("TF_NUM_INTRAOP_THREADS", str(max(1, _count_cores() // jobs - 1)))
        # Seed by seed, so that all variants can be compared after the first round.
        self._trials = [
            Trial(variant.name, seed, root / variant.folder / f"seed-{seed}")
            for seed in grid.seeds
            for variant in grid.variants
        ]

    def command(self, trial: Trial) -> list[str]:
        (variant,) = (variant for variant in self._grid.variants if variant.name == trial.variant)
        return [
            *(sys.executable, "-m", "actorlearner", "train", self._grid.experiment),
            f"--seed={trial.seed}",
            f"--root_dir={trial.root_dir}",
            "--num_video_episodes=0",
            *(f"--gin_bindings={binding}" for binding in (*self._grid.gin_bindings, *variant.bindings)),
            *self._grid.train_flags,
        ]

    def print_plan(self) -> None:
        num_ended = 0
        for trial in self._trials:
            num_ended += trial.has_ended()
            print(f"{trial.name}{' (has ended)' if trial.has_ended() else ''}:\n  {shlex.join(self.command(trial))}")
        num_left = len(self._trials) - num_ended
        print(
            f"{len(self._trials)} trials, {num_ended} of them ended; {min(self._jobs, num_left)} would run at once on "
            f"{_count_cores()} cores"
        )

    def run(self) -> int:
        self._write()
        previous: dict[int, Any] = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        running: list[RunningTrial] = []
        try:
            self._run(running)
            self._stop(running)
        finally:
            for trial in running:
                trial.kill()
            for number, action in previous.items():
                signal.signal(number, action)
        self._write()
        code = report_sweep(self._root, self._clock, self._steps)
        if self._signals:
            self._say(f"stopped by {signal.Signals(self._signals[0]).name}; the same command goes on")
            return 128 + self._signals[0]
        return FAILED if self._failures else code

    def _run(self, running: list[RunningTrial]) -> None:
        """Runs what has not ended; returns when all is done, or when a signal has come."""
        waiting = [t for t in self._trials if not t.has_ended() and t.variant not in self._beaten]
        self._say(f"{len(self._trials)} trials, {len(waiting)} to run, {self._jobs} at once, in {self._root}")
        said, looked = time.monotonic(), 0.0
        while (waiting or running) and not self._signals:
            if self._race and time.monotonic() - looked >= RACE_SECS:
                self._stop_beaten(waiting, running)
                looked = time.monotonic()
            while waiting and len(running) < self._jobs and not self._signals:
                started = self._start(waiting.pop(0))
                if started:
                    running.append(started)
            for trial in [trial for trial in running if trial.poll() is not None]:
                running.remove(trial)
                self._note_end(trial)
            for trial in running:
                self._say_news(trial)
            if time.monotonic() - said >= SAY_EVERY_SECS:
                said = time.monotonic()
                self._say("; ".join(_describe_progress(trial.trial) for trial in running) or "nothing is running")
            time.sleep(POLL_SECS)

    def _stop_beaten(self, waiting: list[Trial], running: list[RunningTrial]) -> None:
        """Takes the variants that are beaten out of the race, and their trials from both lists' work."""
        from actorlearner.tools.sweep_race import find_beaten

        curves: dict[str, dict[int, Any]] = {}
        for trial in self._trials:
            if trial.variant not in self._beaten:
                curves.setdefault(trial.variant, {})[trial.seed] = trial.read_evaluations()
        for variant, defeat in find_beaten(curves, self._clock).items():
            self._beaten[variant] = str(defeat)
            self._say(f"{variant}: {defeat}")
            waiting[:] = [trial for trial in waiting if trial.variant != variant]
            for started in running:
                if started.trial.variant == variant:
                    started.stop()
            self._write()

    def _start(self, trial: Trial) -> Optional[RunningTrial]:
        lock: Optional[IO[str]] = take_lock(trial, self._say, lambda: bool(self._signals))
        if lock is None:
            if not self._signals:
                self._note_failure(trial, OCCUPIED, f"another training goes on in {trial.root_dir}")
            return None
        if trial.has_ended():  # the one that was waited for came to its end
            lock.close()
            return None
        for failures in (self._failures, self._held.get("failures", {})):
            failures.pop(trial.name, None)
        started = RunningTrial(trial, self.command(trial), self._environment, self._nice, lock)
        self._say(f"{trial.name}: {'goes on' if started.goes_on else 'begins'} (output: {trial.output})")
        return started

    def _say_news(self, running: RunningTrial) -> None:
        evaluation = running.trial.read_status().get("last_evaluation")
        if evaluation and evaluation["train_step"] != running.said_step:
            if running.said_step is not None or not running.goes_on:
                self._say(
                    f"{running.trial.name}: {evaluation['average_return']:,.2f} at train step "
                    f"{evaluation['train_step']:,}, environment step {evaluation['environment_steps']:,}"
                )
            running.said_step = evaluation["train_step"]

    def _note_end(self, ended: RunningTrial) -> None:
        trial, code = ended.trial, ended.poll()
        if trial.has_ended():
            evaluations = trial.read_evaluations()
            last = f": {evaluations[-1]['average_return']:,.2f} at the last evaluation" if evaluations else ""
            self._say(f"{trial.name}: ended{last}")
        elif trial.variant in self._beaten:
            self._say(f"{trial.name}: stopped, its variant is beaten")
        else:
            self._note_failure(trial, code or 0, trial.read_last_error())
        self._write()

    def _note_failure(self, trial: Trial, code: int, error: str) -> None:
        self._failures[trial.name] = {"exit_code": code, "error": error}
        self._say(f"{trial.name}: failed with exit code {code}: {error}")

    def _stop(self, running: list[RunningTrial]) -> None:
        """Stops what still runs, after a signal; a second one is passed on: it stops them at once."""
        if not running:
            return
        self._say(f"stopping {len(running)} trials, which save")
        num_passed, deadline = 0, time.monotonic() + STOP_SECS
        while running and time.monotonic() < deadline:
            if num_passed < len(self._signals):
                num_passed = len(self._signals)
                for trial in running:
                    trial.stop()
            running[:] = [trial for trial in running if trial.poll() is None]
            time.sleep(0.1)

    def _on_signal(self, number: int, frame: Optional[types.FrameType]) -> None:
        now = time.monotonic()
        if now - self._signal_time >= _SECOND_SIGNAL_SECS:
            self._signals.append(number)
            self._signal_time = now

    def _write(self) -> None:
        """Writes what was asked and what has failed; the rest is in the run directories."""
        failures = {**self._held.get("failures", {}), **self._failures}
        names = {trial.name for trial in self._trials if not trial.has_ended()}
        self._held = {
            **self._held,
            "asked": self._grid.as_json(),
            "settings": self._settings,
            "beaten": self._beaten,
            "failures": {name: failure for name, failure in failures.items() if name in names},
        }
        self._directory.write_json(self.file, self._held)

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError):
            print(f"sweep | {time.strftime('%H:%M:%S')} {message}", flush=True)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0))


def _describe_progress(trial: Trial) -> str:
    status = trial.read_status()
    if not status:
        return f"{trial.name}: starting"
    words = f"{trial.name}: {status.get('train_step', 0):,} of {status.get('num_iterations', 0):,} train steps"
    evaluation = status.get("last_evaluation")
    return words + (f", {evaluation['average_return']:,.2f} at {evaluation['train_step']:,}" if evaluation else "")


def report_sweep(root: Path, clock: str, steps: Sequence[int]) -> int:
    """Writes sweep.md, sweep.png and the results in sweep.json from what is there now; prints the tables."""
    from actorlearner.tools import sweep_report

    directory, file = RunDirectory(root), root / "sweep.json"
    held = directory.read_json(file)
    try:
        grid = _read_asked(root, held)
    except _AnotherSweep as error:
        return _refuse(str(error), USAGE)
    failures = held.get("failures", {})
    runs: dict[str, dict[int, Any]] = {}
    states: dict[str, dict[int, str]] = {}
    for variant in grid.variants:
        runs[variant.name], states[variant.name] = {}, {}
        for seed in grid.seeds:
            trial = Trial(variant.name, seed, root / variant.folder / f"seed-{seed}")
            runs[variant.name][seed] = {
                "evaluations": trial.read_evaluations(),
                "delivered": trial.read_delivered(),
                "has_ended": trial.has_ended(),
            }
            state = _describe_state(trial, failures.get(trial.name))
            states[variant.name][seed] = state if trial.has_ended() else held.get("beaten", {}).get(variant.name, state)
    title = f"Sweep of {Path(grid.experiment).stem}"
    points = sweep_report.collect_points(runs, clock, steps)
    text = sweep_report.format_tables(title, points, states)
    directory.write_text(root / "sweep.md", text)
    directory.write_json(file, {**held, "results": points, "states": states})
    picture = sweep_report.write_picture(root / "sweep.png", title, runs, states, clock)
    with contextlib.suppress(OSError):  # `| head`
        print(text)
        print("\n".join(str(path) for path in (root / "sweep.md", file, picture) if path), flush=True)
    return 0


def _describe_state(trial: Trial, failure: Optional[dict[str, Any]]) -> str:
    if trial.has_ended():
        return "ended"
    if failure:
        return f"failed: exit code {failure['exit_code']}, {failure['error']}"
    status = trial.read_status()
    return f"not ended: at train step {status['train_step']:,}" if "train_step" in status else "not started"
