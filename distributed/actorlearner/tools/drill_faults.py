"""What a drill does to a run, and which promises it then finds broken.

Every fault is real: processes are killed, files damaged, connections cut, bytes sent to the port.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from actorlearner.tools.drill_disk import CannotMount, Disk
from actorlearner.tools.drill_run import MANY_ITERATIONS, PATIENCE_SECS, ROLES, Hang, Run, await_, has_trained, is_alive

RECOVERY_SECS = 30.0  # promised
STOP_SECS = 20.0  # promised
STANDSTILL_SECS = 1.0  # promised at most, of a learner whose replay server is dead, while it may train
MAX_RATIO_ERROR = 0.01  # promised
END_SECS = 1_200.0
STALL_SECS = 30.0  # longer than it takes to notice a host that has vanished
PARTITION_SECS = 60.0
SAVE_SECS = 2.0  # a small replay is saved within this time
POWER_CUT_SECS = 30.0  # promised: a power cut takes no older train steps than the checkpoint interval and this
READ_ONLY = Path("/sys/kernel")  # nobody makes a file here, root neither
REPORT_SECS = 3.0  # an actor's report is in the learner's account after this time
MAX_KINDS = 60  # of rows that do not fit: some for each table
UNKNOWN_STEPS = 4_000  # a dead learner was so much further than it had said at most: two seconds at 2,000 train steps/s
GIVEN_BACK = re.compile(r"(\d+) chunks that it had lost were given back")  # says a learner of a server that began anew
SAVES_GIVEN_BACK = re.compile(r"asking to save what replay servers were given back, under train step (\d+)")

_STRAY = """
import sys, numpy as np, reverb
client = reverb.Client(sys.argv[1])
for table in ("stream", "experience", "uniform_table"):
    try:
        with client.trajectory_writer(num_keep_alive_refs=1, validate_items=False) as writer:
            for _ in range(100 if table == "uniform_table" else 1):  # of 100,000 items one is seldom drawn
                writer.append({"nothing": np.zeros(3, np.float32)})
                writer.create_item(table, 1.0, {"nothing": writer.history["nothing"][-1:]})
            writer.flush(timeout_ms=3000)
        print(table, "took it")
    except Exception as error:
        print(table, "refused it:", type(error).__name__, str(error)[:200])
"""


@dataclasses.dataclass
class Outcome:
    """What one fault did. None: not applicable."""

    fault: str
    recovery_secs: Optional[float] = None
    transitions_lost: Optional[int] = None
    evaluations_lost: Optional[int] = None
    train_step_before: Optional[int] = None
    train_step_after: Optional[int] = None
    ratio_error: Optional[float] = None
    mirror_steps: Optional[int] = None  # train steps made while the replay server was dead
    mirror_secs: Optional[float] = None  # from its death to the last of them
    held_again_secs: Optional[float] = None  # until it held again what it had saved
    lost_secs: Optional[float] = None  # of training before a power cut, at most
    broken: list[str] = dataclasses.field(default_factory=list)
    not_done: str = ""  # why there was nothing to hold

    @property
    def verdict(self) -> str:
        return "; ".join(self.broken) or (f"not done: {self.not_done}" if self.not_done else "held")

    @property
    def remarks(self) -> str:
        """What the columns have no room for; may be empty."""
        found = []
        if self.mirror_steps is not None:
            found.append(f"{self.mirror_steps:,} train steps from the mirror in {self.mirror_secs or 0.0:.1f} s")
        if self.held_again_secs is not None:
            found.append(f"checkpoint held again after {self.held_again_secs:.1f} s")
        if self.lost_secs is not None:
            found.append(f"the last {self.lost_secs:.1f} s of training lost")
        return ", ".join(found)


def _before(run: Run, fault: str) -> tuple[Outcome, dict[str, Any], float]:
    keepers = ("learner-0",) if run.has_mirror() else ("learner-0", "replay-server-0")
    began_at = max(run.began_at(role) for role in keepers)
    found = {"began_at": began_at, "came_back": _came_back(run), "restored": _restored_step(run)}
    status = {**run.status(), **found}
    return Outcome(fault, train_step_before=status.get("train_step")), status, time.monotonic()


def _came_back(run: Run) -> Optional[int]:
    """Returns what the replay's keeper, the learner or a server, began with in its newest life; None if it says not."""
    if not run.has_mirror():
        return run.held_items().get("uniform_table")
    found = re.search(r"(\d+) windows came back", run.log("learner-0"))
    return int(found[1]) if found else 0


def _compare(run: Run, outcome: Outcome, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Notes what is different between the last account before a fault and one after it."""
    outcome.train_step_after = after.get("train_step")
    held = [status.get("replay", {}).get("held") for status in (before, after)]
    if None not in held:
        outcome.transitions_lost = max(0, held[0] - held[1])
    outcome.broken += _find_doubled(run, before, after)
    # What was collected for train steps that were lost counts already: the account fits once they are made again. How
    # many they were nobody knows: the killed learner was further than its last account says.
    run.await_step(before.get("train_step", 0))
    status = run.status()

    def fits() -> bool:
        nonlocal status
        status = run.status()
        error = _ratio_error(status)
        return error is not None and error <= MAX_RATIO_ERROR

    with contextlib.suppress(Hang):
        await_(fits, "samples per insert that fit", RECOVERY_SECS)
    outcome.ratio_error = _ratio_error(status)
    if outcome.ratio_error is None:
        outcome.broken.append("no account of samples per insert")
    elif outcome.ratio_error > MAX_RATIO_ERROR:
        outcome.broken.append(f"samples per insert off by {outcome.ratio_error:.1%}")
    if _find_miscounts(run, status):
        # Its parts are not from one moment: a call may lie between, and reports of a young run's thousands of steps.
        outcome.broken += _find_miscounts(run, run.await_status(status["time"] + REPORT_SECS))


def _ratio_error(status: dict[str, Any]) -> Optional[float]:
    """Returns by what share of all samples the account is off, beyond the error buffer; None where there is none."""
    account = status.get("replay", {})
    if not account.get("samples"):
        return None
    excess: float = max(0.0, abs(account["ahead"]) - account["error_buffer"])
    return excess / account["samples"]


def _find_doubled(run: Run, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns what an account just after a fault has too much: inserts that it had counted before.

    A learner's own may be ahead by what was collected for train steps that died with it; they are made again. What is
    less than that, and `UNKNOWN_STEPS`, is not noticed: nothing is in a run's first seconds.
    """
    account = after.get("replay", {})
    lost = before.get("train_step", 0) - _restored_step(run) if after.get("process") != before.get("process") else 0
    num_steps = max(0, lost) + UNKNOWN_STEPS
    most = account.get("error_buffer", 0) + num_steps * run.configured("train.batch_size")
    if account.get("ahead", 0) <= most:
        return []
    return [f"the account is {account['ahead']:,.0f} samples ahead, {most:,.0f} at most are due: counted twice"]


def _restored_step(run: Run) -> int:
    """Returns the train step that the newest life of the learner began at."""
    found = re.search(r"restored .*ckpt-(\d+)", run.log("learner-0"))
    return int(found[1]) if found else 0


def _find_miscounts(run: Run, status: dict[str, Any]) -> list[str]:
    """Returns what the account counts otherwise than the train steps, or less than the environment steps.

    The account keeps itself within its buffer, also when it has lost what came before. Train steps are a second old at
    most and reports of environment steps two.
    """
    account = status.get("replay", {})
    samples, inserts = account.get("samples", 0), account.get("inserts", 0)
    trained = status.get("train_step", 0) * run.configured("train.batch_size")
    stepped = status.get("environment_steps", 0)
    found = []
    if run.has_mirror():  # the learner counts both, and saves them with its train step
        call = run.configured("train.num_updates_per_call") * run.configured("train.batch_size")
        is_off, unknown_inserts = abs(samples - trained) > call, 0
    else:  # the server does: train steps that died with a learner too, and a dead server counts from its checkpoint on
        unknown = UNKNOWN_STEPS * run.configured("train.batch_size")
        is_off = not trained / 1.5 - unknown <= samples <= trained * 1.5 + unknown
        unknown_inserts = UNKNOWN_STEPS * run.configured("train.collect_steps_per_iteration")
    if is_off:
        found.append(f"{samples:,} samples counted where some {trained:,} were made")
    if inserts < stepped / 1.5 - unknown_inserts:  # windows are fewer than steps, by a fifth in short episodes
        found.append(f"{inserts:,} inserts counted where some {stepped:,} were made")
    return found


def _judge_recovery(outcome: Outcome, since: float) -> None:
    secs = time.monotonic() - since
    outcome.recovery_secs = secs
    if secs > RECOVERY_SECS:
        outcome.broken.append(f"recovered after {secs:.0f} s, promised {RECOVERY_SECS:.0f} s")


def kill_role(
    run: Run, role: str, number: int = signal.SIGKILL, *, while_saving: bool = False, again_at: str = ""
) -> Outcome:
    """Kills one role and waits until it does again what it is there for.

    Args:
      run: Its.
      role: Its name.
      number: Of the signal.
      while_saving: Waits until it is writing a checkpoint.
      again_at: Its new life is killed too, as soon as it says this.
    """
    is_dead_server = role == "replay-server-0" and number == signal.SIGKILL
    pid, saved = run.pid(role), run.saved_items()
    if while_saving:
        await_(lambda: _stop_while_saving(run, role, pid), f"checkpoint that {role} is writing", every_secs=0.001)
    elif is_dead_server:
        run.await_status(time.time())  # train steps after this one are made without a server
    how = " while it saves" if while_saving else " twice" if again_at else ""
    outcome, before, since = _before(run, f"{signal.Signals(number).name} {role}{how}")
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
        said = _await_new_server(run, pid)
        _judge_held(run, outcome, saved, since)
        if run.has_mirror() and not (while_saving or again_at):  # else `before` is from before its server's death
            _judge_training_on(outcome, [before, *said], killed_at, run.configured("train.batch_size"))
    await_(lambda: run.pid(role) not in (0, pid), f"new life of {role}")
    if role == "learner-0":
        after = run.await_training(killed_at)
        _judge_recovery(outcome, since)
        _compare(run, outcome, before, after)
        outcome.train_step_after = _restored_step(run)
        if number == signal.SIGTERM and outcome.train_step_after < (outcome.train_step_before or 0):
            outcome.broken.append("stopped without saving")
        if run.has_mirror() and before.get("replay"):
            came_back = _came_back(run) or 0
            outcome.transitions_lost = max(0, before["replay"]["held"] - came_back)
            if outcome.transitions_lost > 0.01 * before["replay"]["held"]:
                outcome.broken.append(f"only {came_back} of {before['replay']['held']} transitions came back")
    elif role == "eval-actor-0":
        await_(lambda: "ready to evaluate" in run.log(role), "eval actor that is ready")
        # While train steps are faster than episodes snapshots queue up: the first result is progress, the rest is work.
        due = pending & set(run.status().get("pending_evaluations", []))  # less what its last life had sent
        done = _await_results(run, due, min(1, len(due)))
        _judge_recovery(outcome, since)
        if due - done:  # the one that died with its actor goes to the end of the queue
            _await_results(run, due, len(due))
        _compare(run, outcome, before, run.status())
    else:
        word = "serving replay" if role == "replay-server-0" else "acting with the collect policy"
        await_(lambda: word in run.log(role), f"sign of life of {role}")
        steps = run.status().get("environment_steps", 0)
        await_(lambda: run.status().get("environment_steps", 0) > steps, "new environment steps")
        _judge_recovery(outcome, since)
        _compare(run, outcome, before, run.status())
        if role == "replay-server-0" and run.has_mirror():
            _await_return(run, outcome, log_before)
    return outcome


def _stop_while_saving(run: Run, role: str, pid: int) -> bool:
    """Returns whether a process is at its checkpoint; then it has been stopped there, and may be killed at leisure."""
    if not run.is_saving(role):
        return False
    os.kill(pid, signal.SIGSTOP)
    if run.is_saving(role):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def _await_new_server(run: Run, pid: int) -> list[dict[str, Any]]:
    """Returns what the learner said of itself until a replay server serves that is not process `pid`. Raises `Hang`."""
    said: list[dict[str, Any]] = []

    def serves() -> bool:
        status = run.status()
        if status and (not said or status["time"] > said[-1]["time"]):
            said.append(status)
        return run.pid("replay-server-0") not in (0, pid) and "serving replay" in run.log("replay-server-0")

    await_(serves, "new life of replay-server-0")
    return said


def _judge_training_on(outcome: Outcome, said: Sequence[dict[str, Any]], killed_at: float, batch_size: int) -> None:
    """The learner draws from its mirror: without its server it trains on, as far as samples per insert allow.

    Args:
      outcome: Gets what is found.
      said: The learner's accounts of itself, from one just before the server's death to its return.
      killed_at: When the server died, in unix seconds.
      batch_size: Samples in a train step.
    """
    last = said[-1]
    outcome.mirror_steps = last["train_step"] - said[0]["train_step"]
    outcome.mirror_secs = max(0.0, (last["train_step_time"] or 0.0) - killed_at)
    for status in said:
        account = status["replay"]
        is_allowed = account["ahead"] + account["error_buffer"] >= batch_size and not has_trained(status)
        secs = status["time"] - max(killed_at, status["train_step_time"] or 0.0)
        if is_allowed and secs > STANDSTILL_SECS:
            outcome.broken.append(
                f"stood still for {secs:.1f} s after its server's death, promised {STANDSTILL_SECS:.0f} s at most"
            )
            return


def _judge_held(run: Run, outcome: Outcome, saved: dict[str, int], since: float) -> None:
    """A server that serves again holds what its last checkpoint did."""
    secs = time.monotonic() - since
    held = run.held_items()
    if saved:
        outcome.held_again_secs = secs
    if saved and secs > RECOVERY_SECS:
        outcome.broken.append(f"held its checkpoint again after {secs:.0f} s, promised {RECOVERY_SECS:.0f} s")
    for table, count in saved.items():
        if held.get(table, 0) < count:
            outcome.broken.append(f"holds {held.get(table, 0):,} of {count:,} items saved of '{table}'")


def _survive(run: Run, fault: str, inject: Callable[[], None]) -> Outcome:
    """Does something and sees whether training goes on, in the same processes."""
    outcome, before, _ = _before(run, fault)
    lives = {role: run.pid(role) for role in ROLES}
    inject()
    since = time.monotonic()
    run.await_steps(500)
    _judge_recovery(outcome, since)
    _compare(run, outcome, before, run.status())
    for role, pid in lives.items():
        if run.pid(role) != pid or not is_alive(pid):
            outcome.broken.append(f"{role} died")
    return outcome


def stall_role(run: Run, role: str) -> Outcome:
    """Stops a role's process for a while, as a host that hangs does: nobody may give up, all go on."""

    def inject() -> None:
        pid = run.pid(role)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(STALL_SECS)
        finally:
            os.kill(pid, signal.SIGCONT)

    return _survive(run, f"{role} stalls for {STALL_SECS:.0f} s", inject)


def break_network(run: Run, how: str) -> Outcome:
    """Breaks the wire between the replay server and all others for a while: the learner says that it waits, all go on.

    "stalled": nothing arrives, and then all of it. "lost": nothing arrives, and then each connection is found dead.
    "cut": each connection ends, and each new one at once.
    """
    wire = run.wire
    assert wire is not None
    has_said = False

    def inject() -> None:
        nonlocal has_said
        broken_at, mended_at = time.time(), time.monotonic() + PARTITION_SECS
        if how == "cut":
            wire.cut()
        else:
            wire.stall()
        try:
            while time.monotonic() < mended_at:
                status = run.status()
                has_said |= status.get("phase") == "waiting" and status["time"] > broken_at + 1.0
                time.sleep(0.1)
            if how == "lost":
                wire.cut()
        finally:
            wire.mend()

    outcome = _survive(run, f"network {how} for {PARTITION_SECS:.0f} s", inject)
    if not has_said:
        outcome.broken.append("the learner did not say that it waits")
    due = set(await_(lambda: run.status().get("pending_evaluations"), "evaluation under way"))
    _await_results(run, due, 1)
    return outcome


def _await_results(run: Run, due: set[int], num_results: int) -> set[int]:
    """Returns which evaluations of those `due` are done, once so many are. Raises `Hang`."""

    def done() -> set[int]:
        return due - set(run.status().get("pending_evaluations", []))

    await_(lambda: len(done()) >= num_results, f"result of {num_results} of {len(due)} evaluations")
    return done()


def _await_return(run: Run, outcome: Outcome, log_before: str) -> None:
    """Waits until the server has saved what the learner gave back to it, if that lives and trains for so long.

    Args:
      run: The server's.
      outcome: Gets what is found.
      log_before: The learner's before the server died.
    """
    learner = run.pid("learner-0")

    def news(pattern: re.Pattern[str]) -> list[int]:
        return [int(number) for number in pattern.findall(run.log("learner-0")[len(log_before) :])]

    def has_ended() -> bool:
        return run.pid("learner-0") != learner or run.status().get("phase") not in ("training", "waiting")

    def is_saved() -> bool:
        asked = news(SAVES_GIVEN_BACK)
        return has_ended() or bool(asked and run.saved_replay().get("train_step", 0) >= asked[-1])

    try:
        await_(lambda: has_ended() or news(GIVEN_BACK), "replay that is given back", RECOVERY_SECS)
        if any(news(GIVEN_BACK)) or news(SAVES_GIVEN_BACK):  # the latter of an attempt that did not end well
            await_(is_saved, "checkpoint of what was given back", RECOVERY_SECS)
    except Hang as hang:
        outcome.broken.append(str(hang))


def _resume(run: Run, outcome: Outcome, before: dict[str, Any], within_secs: float = 120.0) -> None:
    """Starts the launcher again and notes what came back."""
    since, started_at = time.monotonic(), time.time()
    run.start(MANY_ITERATIONS)
    after = run.await_training(started_at)
    secs = time.monotonic() - since
    outcome.recovery_secs = secs
    if secs > within_secs:
        outcome.broken.append(f"resumed after {secs:.0f} s, expected {within_secs:.0f} s")
    _compare(run, outcome, before, after)
    outcome.train_step_after = _restored_step(run)
    if not outcome.train_step_after:
        outcome.broken.append("began anew")
    came_back = _came_back(run)
    if came_back is not None and before.get("replay"):
        outcome.transitions_lost = max(0, before["replay"]["held"] - came_back)


def _judge_loss(run: Run, outcome: Outcome, before: dict[str, Any], killed_at: float) -> None:
    """What was there `checkpoint_interval_secs` before a death of all, at `killed_at`, must be there again.

    A learner that was younger must bring back what it began with: that is saved as soon as it trains. So must a server
    that holds the replay alone: it began with a checkpoint.
    """
    if _came_back(run) is None:
        outcome.not_done = "the replay server's log does not say what its 'uniform_table' began with"
        return
    saved_at = killed_at - run.configured("learner.checkpoint_interval_secs") - SAVE_SECS
    points = [point for point in run.metrics("train") if before["began_at"] <= point["time"] <= saved_at]
    were_there = [point["replay_held"] for point in points if "replay_held" in point]
    promised = were_there[-1] if were_there else before["came_back"] or 0
    held = before.get("replay", {}).get("held", 0)
    most = max(0, held - promised) + 0.01 * held
    if (outcome.transitions_lost or 0) > most:
        outcome.broken.append(f"{outcome.transitions_lost:,} transitions lost, at most {most:,.0f} were not saved")


def _await_no_process(run: Run, outcome: Outcome, secs: float) -> None:
    try:
        await_(lambda: not run.processes(), "end of all processes", secs)
    except Hang:
        outcome.broken.append(f"{len(run.processes())} processes left after {secs:.0f} s")
        run.kill_processes()


def kill_everything(run: Run, fault: str = "SIGKILL everything", *, roles: bool = True) -> Outcome:
    """Kills the launcher and every role at once, as a power cut would, and starts again."""
    outcome, before, _ = _before(run, fault)
    killed_at = time.time()
    assert run.launcher is not None
    for pid in [run.launcher.pid, *([run.pid(role) for role in ROLES] if roles else [])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.launcher.wait(PATIENCE_SECS)
    _await_no_process(run, outcome, 5.0)
    _resume(run, outcome, before)
    _judge_loss(run, outcome, before, killed_at)
    return outcome


def cut_power(run: Run) -> Outcome:
    """Takes the power from the run's disk in mid-training, and resumes from what a machine would find there.

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
            with _replaced(run.root_dir, run.folder / "run.kept", moved):
                outcome = _lose_power(run, fault, disk)
                run.stop()
                shutil.copytree(moved, run.folder / "run.back", symlinks=True)
            shutil.rmtree(run.root_dir)
            (run.folder / "run.back").rename(run.root_dir)
        except BaseException:
            run.kill_processes()  # else the disk is in use
            raise
    shutil.rmtree(disk.folder)
    started_at = time.time()
    run.start(MANY_ITERATIONS)
    run.await_training(started_at)
    return outcome


def _lose_power(run: Run, fault: str, disk: Disk) -> Outcome:
    """Starts the run on the disk, cuts its power at a random moment, and starts it on what is left."""
    interval_secs = run.configured("learner.checkpoint_interval_secs")
    started_at, first_save = time.time(), run.saved_replay().get("time")
    run.start(MANY_ITERATIONS)
    run.await_training(started_at)
    await_(lambda: run.saved_replay().get("time") != first_save, "checkpoint of the replay")
    time.sleep(random.uniform(1.0, interval_secs + SAVE_SECS))
    outcome, before, _ = _before(run, fault)
    points = run.metrics("train")
    cut_at = time.time()
    disk.cut_power()
    assert run.launcher is not None
    run.launcher.kill()
    run.kill_processes()
    run.launcher.wait(PATIENCE_SECS)
    await_(lambda: not run.processes(), "end of all processes")
    for path in run.temporary.iterdir():  # a machine clears them when it starts
        shutil.rmtree(path, ignore_errors=True)
    disk.come_back()
    since = time.time()
    _resume(run, outcome, before)
    restored = outcome.train_step_after or 0
    old_enough = [p["train_step"] for p in points if p["time"] <= cut_at - interval_secs - POWER_CUT_SECS]
    promised = max(old_enough[-1] if old_enough else 0, before.get("restored", 0))
    if restored < promised:
        outcome.broken.append(f"resumed at train step {restored:,}, promised {promised:,}")
    times = [p["time"] for p in points if p["train_step"] <= restored]
    outcome.lost_secs = cut_at - max(times, default=since)
    return outcome


def kill_launcher(run: Run) -> Outcome:
    """Kills the launcher alone: no role may outlive it."""
    return kill_everything(run, "SIGKILL launcher", roles=False)


def stop(
    run: Run,
    fault: str = "SIGTERM launcher",
    *,
    number: int = signal.SIGTERM,
    damage: Optional[Callable[[Outcome], None]] = None,
    may_lose: bool = False,
) -> Outcome:
    """Stops the run, which saves, does something to its files, after which it `may_lose` some, and starts it again."""
    outcome, before, since = _before(run, fault)
    code = run.stop(number)
    if time.monotonic() - since > STOP_SECS:
        outcome.broken.append(f"stopped after {time.monotonic() - since:.0f} s, promised {STOP_SECS:.0f} s")
    if code != 128 + number:
        outcome.broken.append(f"exit code {code}")
    _await_no_process(run, outcome, 1.0)
    if damage:
        damage(outcome)
    _resume(run, outcome, before)
    if not may_lose and (outcome.transitions_lost or 0) > 0.01 * before.get("replay", {}).get("held", 0):
        outcome.broken.append(f"{outcome.transitions_lost:,} transitions were lost")
    if not may_lose and (outcome.train_step_after or 0) < (outcome.train_step_before or 0):
        outcome.broken.append("train steps were lost")
    return outcome


def stop_twice(run: Run) -> Outcome:
    """A second signal stops at once."""
    outcome, before, since = _before(run, "SIGTERM launcher twice")
    killed_at = time.time()
    assert run.launcher is not None
    run.launcher.send_signal(signal.SIGTERM)
    time.sleep(0.7)  # signals closer together count as one
    run.launcher.send_signal(signal.SIGTERM)
    run.wait(PATIENCE_SECS)
    if time.monotonic() - since > 5.0:
        outcome.broken.append(f"ended after {time.monotonic() - since:.0f} s")
    _await_no_process(run, outcome, 1.0)
    _resume(run, outcome, before)
    _judge_loss(run, outcome, before, killed_at)
    return outcome


def damage_checkpoints(run: Run) -> Outcome:
    """Overwrites bytes in the newest checkpoints of learner and replay: those before them must be taken."""
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
        if not re.search(rf"passing over .*{re.escape(name)}", run.log(role)):
            outcome.broken.append(f"{role} did not say that it passed over {name}")
    return outcome


def send_garbage(run: Run) -> Outcome:
    """Sends what is no gRPC to the port."""

    def inject() -> None:
        port = run.port()
        assert port
        for opening in (b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5.0)
            with connection, contextlib.suppress(OSError):  # the server may hang up on the way
                connection.sendall(opening + random.Random(0).randbytes(1 << 16))

    return _survive(run, "garbage to the port", inject)


def insert_stray(run: Run) -> Outcome:
    """Lets a client insert what does not fit the tables' signatures."""

    def inject() -> None:
        assert run.port()
        command = [sys.executable, "-c", _STRAY, f"127.0.0.1:{run.port()}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECS)
        (run.folder / "stray.log").write_text(ended.stdout + ended.stderr)

    outcome = _survive(run, "insert with a wrong signature", inject)
    if "took it" not in (run.folder / "stray.log").read_text():
        outcome.broken.append(f"nothing was inserted (see {run.folder / 'stray.log'})")
    else:
        try:
            await_(lambda: "not this experiment's" in run.log("learner-0"), "word of a stranger's item", RECOVERY_SECS)
        except Hang:
            outcome.broken.append("the learner did not say that an item is not its own")
    return outcome


def insert_hostile(run: Run) -> Outcome:
    """Lets a client write rows of the right types that cannot be true into every table; then stops and resumes."""

    def inject() -> None:
        assert run.port()
        command = [sys.executable, "-m", "actorlearner.tools.strangers", f"127.0.0.1:{run.port()}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECS)
        (run.folder / "strangers.log").write_text(ended.stdout + ended.stderr)

    outcome = _survive(run, "hostile rows in every table", inject)
    took = re.findall(r"^(\w+) took (\d+)", (run.folder / "strangers.log").read_text(), re.MULTILINE)
    if not took or not all(int(number) for _, number in took):
        outcome.broken.append(f"not every table took rows (see {run.folder / 'strangers.log'})")
    said = run.log("learner-0").count("held a row that does not fit")
    if not said or said > MAX_KINDS:
        outcome.broken.append(f"the learner said {said} times that rows do not fit, expected each kind of them once")
    resumed = stop(run)
    outcome.broken += resumed.broken
    outcome.train_step_after = resumed.train_step_after
    if run.status().get("environment_steps", 0) > 1e12:
        outcome.broken.append("counts that cannot be true are in the checkpoint")
    return outcome


def fill_disk(run: Run) -> Outcome:
    """Lets the learner's next line of metrics meet a full disk: it must end with one clear error."""
    metrics = run.root_dir / "metrics.jsonl"

    def damage(outcome: Outcome) -> None:
        with _replaced(metrics, run.folder / "metrics.kept", Path("/dev/full")):
            _expect_end(run, outcome, 73, "the disk is full")

    return stop(run, "full disk", damage=damage)


def make_read_only(run: Run) -> Outcome:
    """Lets a folder turn read-only under a run, then starts it in one: each must end with one clear error."""
    outcome, before, _ = _before(run, "read-only directory")
    turned_at = time.time()
    evaluated = run.root_dir / "checkpoints" / "evaluated"
    with _replaced(evaluated, run.folder / "evaluated.kept", READ_ONLY):
        _expect_end(run, outcome, 73, "may not be used", starts=False)  # at the next evaluation
    with _replaced(run.root_dir, run.folder / "run.kept", READ_ONLY):
        _expect_end(run, outcome, 73, "cannot hold a run")
    _resume(run, outcome, before)
    _judge_loss(run, outcome, before, turned_at)
    return outcome


@contextlib.contextmanager
def _replaced(path: Path, kept: Path, by: Path) -> Iterator[None]:
    path.rename(kept)
    path.symlink_to(by)
    try:
        yield
    finally:
        path.unlink()
        kept.rename(path)


def _expect_end(
    run: Run,
    outcome: Outcome,
    code: int,
    words: str,
    *bindings: str,
    starts: bool = True,
    experiment: Optional[str] = None,
) -> None:
    """The run must end with an exit code and an error of these words (a pattern), and leave no process."""
    num_said = len(run.output())
    if starts:
        run.start(MANY_ITERATIONS, *bindings, experiment=experiment)
    ended_with = run.wait(PATIENCE_SECS)
    errors = re.findall(r"^error: .*(?:\n[ \t].*)*", run.output()[num_said:], re.MULTILINE)
    if ended_with != code or not any(re.search(words, error) for error in errors):
        outcome.broken.append(f"exit code {ended_with}, expected {code} and an error that says '{words}'")
    _await_no_process(run, outcome, 1.0)


def change_settings(run: Run) -> Outcome:
    """Starts with another replay capacity than the checkpoint has: it must end with the difference, the run intact."""
    setting = f"{'resident' if run.has_mirror() else 'uniform'}_replay.replay_buffer_capacity"
    capacity = run.configured("train.initial_collect_steps") + 7

    def damage(outcome: Outcome) -> None:
        _expect_end(run, outcome, 65, "max_size: the checkpoint has", f"{setting} = {capacity}")

    return stop(run, "other settings than the checkpoint's", damage=damage)


def change_experiment(run: Run) -> Outcome:
    """Starts another experiment on the run's directory: it must end with the difference, the run intact."""
    other = "sac_minitaur" if run.factory("agent") == "dqn" else "dqn_cartpole"

    def damage(outcome: Outcome) -> None:
        words = "holds the run of another experiment|the checkpoint has"
        _expect_end(run, outcome, 65, words, experiment=other)

    return stop(run, "another experiment's checkpoint", damage=damage)


def observe_not_finite(run: Run) -> Outcome:
    """Lets every environment observe a NaN: the run must end with its place. In the replay it would end the next."""
    fault, factory = "NaN observation", run.factory("environment")
    if factory is None:
        return Outcome(fault, not_done="experiment.environment is not bound to a configurable")
    bindings = (
        "import actorlearner.tools.drill_environment",
        f"not_finite_environment.environment = @{factory}()",
        "experiment.environment = @not_finite_environment()",
    )

    def damage(outcome: Outcome) -> None:
        _expect_end(run, outcome, 65, r"environment \d+ gave (observation|reward).* = nan", *bindings)

    return stop(run, fault, damage=damage)


def diverge(run: Run) -> Outcome:
    """Lets the loss overflow: the run must end with the train step, and keep its last good checkpoint."""
    fault, factory = "loss that overflows", run.factory("agent")
    setting = f"{factory}.reward_scale_factor"
    if factory is None or not run.is_configured(setting):
        return Outcome(fault, not_done="the agent has no reward_scale_factor")

    def damage(outcome: Outcome) -> None:
        _expect_end(run, outcome, 65, r"at train step [\d,]+ .*: training has diverged", f"{setting} = 1e38")

    return stop(run, fault, damage=damage)


def await_end(run: Run, num_iterations: int) -> Outcome:
    """Waits for the end of training and looks for what is missing and what was left."""
    outcome = Outcome("the end", train_step_before=run.status().get("train_step"))
    code = run.wait(END_SECS)
    if code:
        outcome.broken.append(f"exit code {code}")
    _await_no_process(run, outcome, 2.0)
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads((run.root_dir / "summary.json").read_text())
        outcome.train_step_after = summary["train_steps"]
        evaluated = [evaluation["train_step"] for evaluation in summary["evaluations"]]
        due = {*range(0, num_iterations, run.configured("train.eval_interval") or num_iterations), num_iterations}
        outcome.evaluations_lost = len(due - set(evaluated))
        if outcome.evaluations_lost or len(evaluated) != len(set(evaluated)):
            outcome.broken.append(f"evaluations of {sorted(due - set(evaluated))} are missing")
    if outcome.train_step_after != num_iterations:
        outcome.broken.append(f"no summary of {num_iterations} train steps")
    outcome.ratio_error = _ratio_error(run.status())
    outcome.broken += _find_miscounts(run, run.status())
    left = [path.name for path in run.temporary.iterdir()]
    left += [str(path) for path in run.root_dir.rglob("*") if path.name.endswith((".tmp", "_temp", ".new", ".old"))]
    with socket.socket() as client:
        if run.port() and not client.connect_ex(("localhost", run.port())):
            outcome.broken.append(f"port {run.port()} is still open")
    if left:
        outcome.broken.append(f"{len(left)} files left behind: {', '.join(sorted(left)[:3])} ...")
    return outcome


FAULTS: dict[str, Callable[[Run], Outcome]] = {
    "kill-learner": lambda run: kill_role(run, "learner-0"),
    "kill-replay-server": lambda run: kill_role(run, "replay-server-0"),
    "kill-collect-actor": lambda run: kill_role(run, "collect-actor-0"),
    "kill-eval-actor": lambda run: kill_role(run, "eval-actor-0"),
    "stop-learner": lambda run: kill_role(run, "learner-0", signal.SIGTERM),
    "stop-replay-server": lambda run: kill_role(run, "replay-server-0", signal.SIGTERM),
    "stop-collect-actor": lambda run: kill_role(run, "collect-actor-0", signal.SIGTERM),
    "stop-eval-actor": lambda run: kill_role(run, "eval-actor-0", signal.SIGTERM),
    "kill-learner-saving": lambda run: kill_role(run, "learner-0", while_saving=True),
    "kill-replay-server-saving": lambda run: kill_role(run, "replay-server-0", while_saving=True),
    "kill-learner-twice": lambda run: kill_role(run, "learner-0", again_at="restored "),
    "kill-replay-server-twice": lambda run: kill_role(run, "replay-server-0", again_at="serving replay"),
    "stall-learner": lambda run: stall_role(run, "learner-0"),
    "stall-replay-server": lambda run: stall_role(run, "replay-server-0"),
    "garbage": send_garbage,
    "stray-insert": insert_stray,
    "hostile-rows": insert_hostile,
    "kill-launcher": kill_launcher,
    "kill-everything": kill_everything,
    "power-cut": cut_power,
    "stop": stop,
    "interrupt": lambda run: stop(run, "SIGINT launcher", number=signal.SIGINT),
    "stop-twice": stop_twice,
    "damage-checkpoints": damage_checkpoints,
    "full-disk": fill_disk,
    "read-only-directory": make_read_only,
    "other-settings": change_settings,
    "other-experiment": change_experiment,
    "nan-observation": observe_not_finite,
    "diverge": diverge,
    "stall-network": lambda run: break_network(run, "stalled"),
    "lose-network": lambda run: break_network(run, "lost"),
    "cut-network": lambda run: break_network(run, "cut"),
}
NETWORK_FAULTS = {name for name in FAULTS if name.endswith("-network")}
