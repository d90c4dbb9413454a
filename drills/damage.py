"""Faults in files and settings: a start must end with one clear error, or restore what is undamaged."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Optional

from actorlearner.runtime.lifecycle import ExitCode
from drills.deaths import stop
from drills.disk import replaced_by
from drills.drilled_run import MANY_ITERATIONS, PATIENCE_SECS, Run
from drills.judging import (
    Outcome,
    await_no_process,
    judge_loss,
    note_before,
    resume,
)

READ_ONLY = Path("/sys/kernel")  # not even root can make a file here


def damage_checkpoints(run: Run) -> Outcome:
    """Overwrites bytes in the newest checkpoints of learner and replay: the previous ones must be restored."""
    checkpoints = run.root_dir / "checkpoints"
    newest: list[Path] = []

    def damage(outcome: Outcome) -> None:
        del outcome
        index = max(checkpoints.glob("ckpt-*.index"), key=lambda path: path.stat().st_mtime)
        learner = max(checkpoints.glob(f"{index.stem}.data-*"), key=lambda path: path.stat().st_size)  # the weights
        replay = max(checkpoints.glob("replay/*-*/chunks.tfrecord"), key=lambda path: path.stat().st_mtime)
        newest.extend((learner, replay.parent))
        for path in (learner, replay):
            content = bytearray(path.read_bytes())
            middle = len(content) // 2
            content[middle : middle + 64] = bytes(64)
            path.write_bytes(content)

    outcome = stop(run, "damaged checkpoints", damage=damage, may_lose=True)
    for role, path in zip(("learner-0", "replay-server-0"), newest):
        name = path.name.partition(".data")[0]
        if not re.search(rf"skipping .*{re.escape(name)}", run.log(role)):
            outcome.broken.append(f"{role} did not log that it skipped {name}")
    return outcome


def fill_disk(run: Run) -> Outcome:
    """Makes the learner's next line of metrics fail on a full disk: it must end with one clear error."""
    metrics = run.root_dir / "metrics.jsonl"

    def damage(outcome: Outcome) -> None:
        with replaced_by(metrics, run.folder / "metrics.kept", Path("/dev/full")):
            expect_end(run, outcome, ExitCode.CANNOT_CREATE, "the disk is full")

    return stop(run, "full disk", damage=damage)


def make_read_only(run: Run) -> Outcome:
    """Makes a run's folder read-only while it runs, then at its start: each must end with one clear error."""
    outcome, before, _ = note_before(run, "read-only directory")
    turned_at = time.time()
    evaluated = run.root_dir / "checkpoints" / "evaluated"
    with replaced_by(evaluated, run.folder / "evaluated.kept", READ_ONLY):
        expect_end(run, outcome, ExitCode.CANNOT_CREATE, "may not be used", starts=False)  # at the next evaluation
    with replaced_by(run.root_dir, run.folder / "run.kept", READ_ONLY):
        expect_end(run, outcome, ExitCode.CANNOT_CREATE, "cannot hold a run")
    resume(run, outcome, before)
    judge_loss(run, outcome, before, turned_at)
    return outcome


def expect_end(
    run: Run,
    outcome: Outcome,
    code: int,
    words: str,
    *bindings: str,
    starts: bool = True,
    experiment: Optional[str] = None,
) -> None:
    """Checks that the run ends with an exit code and an error that matches `words`, and leaves no process."""
    num_said = len(run.output())
    if starts:
        run.start(MANY_ITERATIONS, *bindings, experiment=experiment)
    ended_with = run.wait(PATIENCE_SECS)
    errors = re.findall(r"^error: .*(?:\n[ \t].*)*", run.output()[num_said:], re.MULTILINE)
    if ended_with != code or not any(re.search(words, error) for error in errors):
        outcome.broken.append(f"exit code {ended_with}, expected {code} and an error with '{words}'")
    await_no_process(run, outcome, 1.0)


def change_settings(run: Run) -> Outcome:
    """Starts with another replay capacity than the checkpoint's: it must end with the difference, the run unchanged."""
    setting = f"{'resident' if run.has_mirror() else 'uniform'}_replay.replay_buffer_capacity"
    capacity = run.configured("train.initial_collect_steps") + 7

    def damage(outcome: Outcome) -> None:
        expect_end(run, outcome, ExitCode.DATA, "max_size: the checkpoint has", f"{setting} = {capacity}")

    return stop(run, "other settings than the checkpoint's", damage=damage)


def change_experiment(run: Run) -> Outcome:
    """Starts another experiment in the run's directory: it must end with the difference, the run unchanged."""
    other = "sac_minitaur" if run.factory("agent") == "dqn" else "dqn_cartpole"

    def damage(outcome: Outcome) -> None:
        words = "holds the run of another experiment|the checkpoint has"
        expect_end(run, outcome, ExitCode.DATA, words, experiment=other)

    return stop(run, "another experiment's checkpoint", damage=damage)


def observe_not_finite(run: Run) -> Outcome:
    """Makes every environment return a NaN: the run must end and name it, and must not store it in the replay."""
    fault, factory = "NaN observation", run.factory("environment")
    if factory is None:
        return Outcome(fault, not_done="experiment.environment is not bound to a configurable")
    bindings = (
        "import drills.not_finite_environment",
        f"not_finite_environment.environment = @{factory}()",
        "experiment.environment = @not_finite_environment()",
    )

    def damage(outcome: Outcome) -> None:
        expect_end(run, outcome, ExitCode.DATA, r"environment \d+ gave (observation|reward).* = nan", *bindings)

    return stop(run, fault, damage=damage)


def diverge(run: Run) -> Outcome:
    """Makes the loss overflow: the run must end with the train step, and keep its last good checkpoint."""
    fault, factory = "loss that overflows", run.factory("agent")
    setting = f"{factory}.reward_scale_factor"
    if factory is None or not run.is_configured(setting):
        return Outcome(fault, not_done="the agent has no reward_scale_factor")

    def damage(outcome: Outcome) -> None:
        expect_end(run, outcome, ExitCode.DATA, r"at train step [\d,]+ .*: training has diverged", f"{setting} = 1e38")

    return stop(run, fault, damage=damage)
