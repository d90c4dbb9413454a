"""Runs a sweep: starts its trials, several at once, watches and stops them.

variants x seeds --> [trials, several at once] --> run directories
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Optional

from actorlearner.launcher.command import train_command
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.lifecycle import SECOND_SIGNAL_SECS, ExitCode
from actorlearner.tools.sweeping.grid import Grid
from actorlearner.tools.sweeping.trials import STOP_SECS, RunningTrial, Trial, take_lock

SAY_EVERY_SECS = 60.0
RACE_SECS = 5.0
POLL_SECS = 0.5


class Sweep:
    """One start of a sweep."""

    def __init__(
        self,
        root: Path,
        grid: Grid,
        settings: dict[str, str],
        held: dict[str, Any],
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
        self._held = held  # content of sweep.json
        self._failures: dict[str, dict[str, Any]] = {}  # by trial
        self._beaten: dict[str, str] = dict(self._held.get("beaten", {})) if race else {}  # reason by variant
        self._signals: list[int] = []
        self._signal_time = 0.0
        self._environment = dict(os.environ)
        if jobs > 1:  # a learner takes all cores but one, so several must share
            self._environment.setdefault("TF_NUM_INTRAOP_THREADS", str(max(1, count_cores() // jobs - 1)))
        # Seed by seed, so that all variants can be compared after the first round.
        self._trials = [
            Trial(variant.name, seed, root / variant.folder / f"seed-{seed}")
            for seed in grid.seeds
            for variant in grid.variants
        ]

    def command(self, trial: Trial) -> list[str]:
        (variant,) = (variant for variant in self._grid.variants if variant.name == trial.variant)
        return train_command(
            self._grid.experiment,
            root_dir=trial.root_dir,
            seed=trial.seed,
            gin_bindings=(*self._grid.gin_bindings, *variant.bindings),
            flags=("--num_video_episodes=0", *self._grid.train_flags),
        )

    def print_plan(self) -> None:
        num_ended = 0
        for trial in self._trials:
            num_ended += trial.has_ended()
            print(f"{trial.name}{' (has ended)' if trial.has_ended() else ''}:\n  {shlex.join(self.command(trial))}")
        num_left = len(self._trials) - num_ended
        print(
            f"{len(self._trials)} trials, {num_ended} of them ended; {min(self._jobs, num_left)} would run at once on "
            f"{count_cores()} cores"
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
        finally:
            self._stop(running)
            for number, action in previous.items():
                signal.signal(number, action)
        self._write()
        from actorlearner.tools.sweeping.report import report_sweep

        code = report_sweep(self._root, self._clock, self._steps)
        if self._signals:
            self._say(f"stopped by {signal.Signals(self._signals[0]).name}; the same command continues")
            return 128 + self._signals[0]
        return ExitCode.CRASH if self._failures else code

    def _run(self, running: list[RunningTrial]) -> None:
        """Runs unfinished trials; returns when all are done, or after a signal."""
        waiting = [t for t in self._trials if not t.has_ended() and t.variant not in self._beaten]
        self._say(f"{len(self._trials)} trials, {len(waiting)} to run, {self._jobs} at once, in {self._root}")
        said, looked = time.monotonic(), 0.0
        while (waiting or running) and not self._signals:
            if self._race and time.monotonic() - looked >= RACE_SECS:
                self._stop_beaten(waiting, running)
                looked = time.monotonic()
            while waiting and len(running) < self._jobs and not self._signals:
                trial = waiting.pop(0)
                try:
                    started = self._start(trial)
                except OSError as error:
                    self._note_failure(trial, ExitCode.CANNOT_CREATE, str(error))
                    continue
                if started:
                    running.append(started)
            for ended in [started for started in running if started.poll() is not None]:
                running.remove(ended)
                self._note_end(ended)
            for started in running:
                self._say_news(started)
            if time.monotonic() - said >= SAY_EVERY_SECS:
                said = time.monotonic()
                self._say("; ".join(_describe_progress(trial.trial) for trial in running) or "nothing is running")
            time.sleep(POLL_SECS)

    def _stop_beaten(self, waiting: list[Trial], running: list[RunningTrial]) -> None:
        """Removes beaten variants from the race: drops their waiting trials and stops their running ones."""
        from actorlearner.tools.sweeping.race import find_beaten

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
                self._note_failure(trial, ExitCode.OCCUPIED, f"another training runs in {trial.root_dir}")
            return None
        if trial.has_ended():  # the training that held the lock has finished it
            lock.close()
            return None
        for failures in (self._failures, self._held.get("failures", {})):
            failures.pop(trial.name, None)
        started = RunningTrial(trial, self.command(trial), self._environment, self._nice, lock)
        self._say(f"{trial.name}: {'resumes' if started.goes_on else 'starts'} (output: {trial.output})")
        return started

    def _say_news(self, running: RunningTrial) -> None:
        status = running.trial.read_status()
        evaluation = status and status.last_evaluation
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
            self._say(f"{trial.name}: stopped because its variant is beaten")
        else:
            self._note_failure(trial, code or 0, trial.read_last_error())
        self._write()

    def _note_failure(self, trial: Trial, code: int, error: str) -> None:
        self._failures[trial.name] = {"exit_code": code, "error": error}
        self._say(f"{trial.name}: failed with exit code {code}: {error}")

    def _stop(self, running: list[RunningTrial]) -> None:
        """Stops running trials, within `STOP_SECS`; a second signal is passed on and stops them immediately."""
        if not running:
            return
        self._say(f"stopping {len(running)} trials, which save")
        num_passed, deadline = 0, time.monotonic() + STOP_SECS
        while running and time.monotonic() < deadline:
            if num_passed < max(1, len(self._signals)):
                num_passed += 1
                for started in running:
                    started.stop()
            running[:] = [started for started in running if started.poll() is None]
            time.sleep(0.1)
        for started in running:
            started.kill()

    def _on_signal(self, number: int, frame: Optional[types.FrameType]) -> None:
        now = time.monotonic()
        if now - self._signal_time >= SECOND_SIGNAL_SECS:
            self._signals.append(number)
            self._signal_time = now

    def _write(self) -> None:
        """Writes the grid and the failures to sweep.json; the results are in the run directories."""
        failures = {**self._held.get("failures", {}), **self._failures}
        names = {trial.name for trial in self._trials if not trial.has_ended()}
        self._held = {
            **self._held,
            "asked": self._grid.as_json(),
            "settings": self._settings,
            "clock": self._clock,
            "at": self._steps,
            "beaten": self._beaten,
            "failures": {name: failure for name, failure in failures.items() if name in names},
        }
        self._directory.write_json(self.file, self._held)

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError):
            print(f"sweep | {time.strftime('%H:%M:%S')} {message}", flush=True)


def count_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _describe_progress(trial: Trial) -> str:
    status = trial.read_status()
    if not status:
        return f"{trial.name}: starting"
    words = f"{trial.name}: {status.train_step:,} of {status.num_iterations:,} train steps"
    evaluation = status.last_evaluation
    return words + (f", {evaluation['average_return']:,.2f} at {evaluation['train_step']:,}" if evaluation else "")
