"""Faults that end processes: kills, stops and power cuts; then the run must continue, or be resumed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from typing import Optional

from drills.disk import CannotMount, Disk, replaced_by
from drills.drilled_run import MANY_ITERATIONS, PATIENCE_SECS, ROLES, Run, await_, is_alive
from drills.judging import (
    SAVE_SECS,
    STOP_SECS,
    Outcome,
    await_new_server,
    await_no_process,
    await_results,
    await_return,
    compare,
    count_came_back,
    judge_held,
    judge_loss,
    judge_recovery,
    judge_training_on,
    note_before,
    restored_step,
    resume,
)

POWER_CUT_SECS = 30.0  # promised: a power cut loses at most the checkpoint interval plus this


def kill_role(
    run: Run, role: str, number: int = signal.SIGKILL, *, while_saving: bool = False, again_at: str = ""
) -> Outcome:
    """Kills one role and waits until it does again what it is there for.

    Args:
      run: Its.
      role: Its name.
      number: Of the signal.
      while_saving: Waits until it is writing a checkpoint.
      again_at: Its restarted process is killed too, as soon as it logs this.
    """
    is_dead_server = role == "replay-server-0" and number == signal.SIGKILL
    pid, saved = run.pid(role), run.saved_items()
    if while_saving:
        await_(lambda: _stop_while_saving(run, role, pid), f"checkpoint written by {role}", every_secs=0.001)
    elif is_dead_server:
        run.await_status(time.time())  # later train steps are made without a server
    how = " while it saves" if while_saving else " twice" if again_at else ""
    outcome, before, since = note_before(run, f"{signal.Signals(number).name} {role}{how}")
    pending = set(before.get("pending_evaluations", []))
    log_before, killed_at = run.log("learner-0"), time.time()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    if again_at:
        await_(lambda: run.pid(role) not in (0, pid) and again_at in run.log(role), f"'{again_at}' of {role}")
        pid, killed_at, since = run.pid(role), time.time(), time.monotonic()
        os.kill(pid, number)
    if number == signal.SIGTERM:
        await_(lambda: not is_alive(pid), f"end of {role}")
        if time.monotonic() - since > STOP_SECS:
            outcome.broken.append(f"stopped after {time.monotonic() - since:.0f} s, promised {STOP_SECS:.0f} s")
    if is_dead_server:
        said = await_new_server(run, pid)
        judge_held(run, outcome, saved, since)
        if run.has_mirror() and not (while_saving or again_at):  # otherwise `before` is older than the server's death
            judge_training_on(outcome, [before, *said], killed_at, run.configured("train.batch_size"))
    await_(lambda: run.pid(role) not in (0, pid), f"restart of {role}")
    if role == "learner-0":
        after = run.await_training(killed_at)
        judge_recovery(outcome, since)
        compare(run, outcome, before, after)
        outcome.train_step_after = restored_step(run)
        if number == signal.SIGTERM and outcome.train_step_after < (outcome.train_step_before or 0):
            outcome.broken.append("stopped without saving")
        if run.has_mirror() and before.get("replay"):
            came_back = count_came_back(run) or 0
            outcome.transitions_lost = max(0, before["replay"]["held"] - came_back)
            if outcome.transitions_lost > 0.01 * before["replay"]["held"]:
                outcome.broken.append(f"only {came_back} of {before['replay']['held']} transitions came back")
    elif role == "eval-actor-0":
        await_(lambda: "ready to evaluate" in run.log(role), "eval actor that is ready")
        # If train steps are faster than episodes, snapshots queue up; the first result already shows progress.
        due = pending & set(run.status().get("pending_evaluations", []))  # less what its last process had sent
        done = await_results(run, due, min(1, len(due)))
        judge_recovery(outcome, since)
        if due - done:  # the evaluation that died with its actor goes to the end of the queue
            await_results(run, due, len(due))
        compare(run, outcome, before, run.status())
    else:
        word = "serving replay" if role == "replay-server-0" else "acting with the collect policy"
        await_(lambda: word in run.log(role), f"first words of {role}")
        steps = run.status().get("environment_steps", 0)
        await_(lambda: run.status().get("environment_steps", 0) > steps, "new environment steps")
        judge_recovery(outcome, since)
        compare(run, outcome, before, run.status())
        if role == "replay-server-0" and run.has_mirror():
            await_return(run, outcome, log_before)
    return outcome


def _stop_while_saving(run: Run, role: str, pid: int) -> bool:
    """Returns whether a process is writing its checkpoint; then it is stopped (SIGSTOP) there, ready to be killed."""
    if not run.is_saving(role):
        return False
    os.kill(pid, signal.SIGSTOP)
    if run.is_saving(role):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def kill_everything(run: Run, fault: str = "SIGKILL everything", *, roles: bool = True) -> Outcome:
    """Kills the launcher and every role at once, and starts again."""
    outcome, before, _ = note_before(run, fault)
    killed_at = time.time()
    assert run.launcher is not None
    for pid in [run.launcher.pid, *([run.pid(role) for role in ROLES] if roles else [])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.launcher.wait(PATIENCE_SECS)
    await_no_process(run, outcome, 5.0)
    resume(run, outcome, before)
    judge_loss(run, outcome, before, killed_at)
    return outcome


def kill_launcher(run: Run) -> Outcome:
    """Kills only the launcher: no role may outlive it."""
    return kill_everything(run, "SIGKILL launcher", roles=False)


def stop(
    run: Run,
    fault: str = "SIGTERM launcher",
    *,
    number: int = signal.SIGTERM,
    damage: Optional[Callable[[Outcome], None]] = None,
    may_lose: bool = False,
) -> Outcome:
    """Stops the run, which saves; applies `damage` to its files, after which it `may_lose` data; starts it again."""
    outcome, before, since = note_before(run, fault)
    code = run.stop(number)
    if time.monotonic() - since > STOP_SECS:
        outcome.broken.append(f"stopped after {time.monotonic() - since:.0f} s, promised {STOP_SECS:.0f} s")
    if code != 128 + number:
        outcome.broken.append(f"exit code {code}")
    await_no_process(run, outcome, 1.0)
    if damage:
        damage(outcome)
    resume(run, outcome, before)
    if not may_lose and (outcome.transitions_lost or 0) > 0.01 * before.get("replay", {}).get("held", 0):
        outcome.broken.append(f"{outcome.transitions_lost:,} transitions were lost")
    if not may_lose and (outcome.train_step_after or 0) < (outcome.train_step_before or 0):
        outcome.broken.append("train steps were lost")
    return outcome


def stop_twice(run: Run) -> Outcome:
    """Sends a second signal, which must stop the run immediately."""
    outcome, before, since = note_before(run, "SIGTERM launcher twice")
    killed_at = time.time()
    assert run.launcher is not None
    run.launcher.send_signal(signal.SIGTERM)
    time.sleep(0.7)  # signals closer together count as one
    run.launcher.send_signal(signal.SIGTERM)
    run.wait(PATIENCE_SECS)
    if time.monotonic() - since > 5.0:
        outcome.broken.append(f"ended after {time.monotonic() - since:.0f} s")
    await_no_process(run, outcome, 1.0)
    resume(run, outcome, before)
    judge_loss(run, outcome, before, killed_at)
    return outcome


def cut_power(run: Run) -> Outcome:
    """Cuts the power of the run's disk during training, and resumes from what remains.

    The run is moved to a disk of the drill's own for it, and back.
    """
    fault = "power cut"
    try:
        disk = Disk(run.folder / "disk.img", run.folder / "disk")
    except CannotMount as error:
        return Outcome(fault, not_done=str(error))
    with disk:
        try:
            run.stop()
            moved = disk.folder / "run"
            shutil.copytree(run.root_dir, moved)
            with replaced_by(run.root_dir, run.folder / "run.kept", moved):
                outcome = _lose_power(run, fault, disk)
                run.stop()
                shutil.copytree(moved, run.folder / "run.back", symlinks=True)
            shutil.rmtree(run.root_dir)
            (run.folder / "run.back").rename(run.root_dir)
        except BaseException:
            run.kill_processes()  # otherwise the disk is in use
            raise
    shutil.rmtree(disk.folder)
    started_at = time.time()
    run.start(MANY_ITERATIONS)
    run.await_training(started_at)
    return outcome


def _lose_power(run: Run, fault: str, disk: Disk) -> Outcome:
    """Starts the run on the disk, cuts its power at a random time, and resumes from what remains."""
    interval_secs = run.configured("learner.checkpoint_interval_secs")
    started_at, first_save = time.time(), run.saved_replay().get("time")
    run.start(MANY_ITERATIONS)
    run.await_training(started_at)
    await_(lambda: run.saved_replay().get("time") != first_save, "checkpoint of the replay")
    time.sleep(random.uniform(1.0, interval_secs + SAVE_SECS))
    outcome, before, _ = note_before(run, fault)
    points = run.metrics("train")
    cut_at = time.time()
    disk.cut_power()
    assert run.launcher is not None
    run.launcher.kill()
    run.kill_processes()
    run.launcher.wait(PATIENCE_SECS)
    await_(lambda: not run.processes(), "end of all processes")
    for path in run.temporary.iterdir():  # a machine clears them at its start
        shutil.rmtree(path, ignore_errors=True)
    disk.come_back()
    since = time.time()
    resume(run, outcome, before)
    restored = outcome.train_step_after or 0
    old_enough = [p["train_step"] for p in points if p["time"] <= cut_at - interval_secs - POWER_CUT_SECS]
    promised = max(old_enough[-1] if old_enough else 0, before.get("restored", 0))
    if restored < promised:
        outcome.broken.append(f"resumed at train step {restored:,}, promised {promised:,}")
    times = [p["time"] for p in points if p["train_step"] <= restored]
    outcome.lost_secs = cut_at - max(times, default=since)
    return outcome
