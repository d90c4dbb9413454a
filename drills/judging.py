"""The outcome of a fault, and the promises that it broke."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, Optional

from drills.drilled_run import MANY_ITERATIONS, Hang, Run, await_, has_trained

RECOVERY_SECS = 30.0  # promised
STOP_SECS = 20.0  # promised
STANDSTILL_SECS = 1.0  # promised: longest pause of a learner without its replay server, while it may train
MAX_RATIO_ERROR = 0.01  # promised
SAVE_SECS = 2.0  # time to save a small replay
REPORT_SECS = 3.0  # time until an actor's report is in the learner's status
UNKNOWN_STEPS = 4_000  # upper bound on the train steps made since the killed learner's last report: 2 s at 2,000/s
GIVEN_BACK = re.compile(r"refilled with (\d+) chunks that it had lost")  # the learner's log about a restarted server
SAVES_GIVEN_BACK = re.compile(r"asking to save the refilled replay under train step (\d+)")


@dataclasses.dataclass
class Outcome:
    """The outcome of one fault. None: not applicable."""

    fault: str
    recovery_secs: Optional[float] = None
    transitions_lost: Optional[int] = None
    evaluations_lost: Optional[int] = None
    train_step_before: Optional[int] = None
    train_step_after: Optional[int] = None
    ratio_error: Optional[float] = None
    mirror_steps: Optional[int] = None  # train steps made while the replay server was dead
    mirror_secs: Optional[float] = None  # from its death to the last of these train steps
    held_again_secs: Optional[float] = None  # until the server held its checkpoint again
    lost_secs: Optional[float] = None  # training lost by a power cut, at most
    broken: list[str] = dataclasses.field(default_factory=list)
    not_done: str = ""  # why the fault could not be tested

    @property
    def verdict(self) -> str:
        return "; ".join(self.broken) or (f"not done: {self.not_done}" if self.not_done else "held")

    @property
    def remarks(self) -> str:
        """Further figures, in words; may be empty."""
        found = []
        if self.mirror_steps is not None:
            found.append(f"{self.mirror_steps:,} train steps from the mirror in {self.mirror_secs or 0.0:.1f} s")
        if self.held_again_secs is not None:
            found.append(f"checkpoint held again after {self.held_again_secs:.1f} s")
        if self.lost_secs is not None:
            found.append(f"the last {self.lost_secs:.1f} s of training lost")
        return ", ".join(found)


def note_before(run: Run, fault: str) -> tuple[Outcome, dict[str, Any], float]:
    keepers = ("learner-0",) if run.has_mirror() else ("learner-0", "replay-server-0")
    began_at = max(run.began_at(role) for role in keepers)
    found = {"began_at": began_at, "came_back": count_came_back(run), "restored": restored_step(run)}
    status = {**run.status(), **found}
    return Outcome(fault, train_step_before=status.get("train_step")), status, time.monotonic()


def compare(run: Run, outcome: Outcome, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Records the differences between the last status before a fault and one after it."""
    outcome.train_step_after = after.get("train_step")
    held = [status.get("replay", {}).get("held") for status in (before, after)]
    if None not in held:
        outcome.transitions_lost = max(0, held[0] - held[1])
    outcome.broken += find_doubled(run, before, after)
    # Data collected for lost train steps counts already: the account fits once these are made again. Their number is
    # unknown, because the killed learner was further than its last status says.
    run.await_step(before.get("train_step", 0))
    status = run.status()

    def fits() -> bool:
        nonlocal status
        status = run.status()
        error = find_ratio_error(status)
        return error is not None and error <= MAX_RATIO_ERROR

    with contextlib.suppress(Hang):
        await_(fits, "samples per insert that fit", RECOVERY_SECS)
    outcome.ratio_error = find_ratio_error(status)
    if outcome.ratio_error is None:
        outcome.broken.append("no account of samples per insert")
    elif outcome.ratio_error > MAX_RATIO_ERROR:
        outcome.broken.append(f"samples per insert off by {outcome.ratio_error:.1%}")
    if find_miscounts(run, status):
        # The status is not of one moment: a call, and reports of thousands of steps in a young run, may lie between.
        outcome.broken += find_miscounts(run, run.await_status(status["time"] + REPORT_SECS))


def find_doubled(run: Run, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns inserts that were counted twice, according to a status just after a fault.

    A learner may be ahead by data collected for train steps that died with it, which are made again. Smaller errors
    than that and `UNKNOWN_STEPS` are not detected, so none is in a run's first seconds.
    """
    account = after.get("replay", {})
    lost = before.get("train_step", 0) - restored_step(run) if after.get("process") != before.get("process") else 0
    num_steps = max(0, lost) + UNKNOWN_STEPS
    most = account.get("error_buffer", 0) + num_steps * run.configured("train.batch_size")
    if account.get("ahead", 0) <= most:
        return []
    return [f"the account is {account['ahead']:,.0f} samples ahead, {most:,.0f} at most are due: counted twice"]


def find_miscounts(run: Run, status: dict[str, Any]) -> list[str]:
    """Returns counts of the account that differ from the train steps, or are below the environment steps.

    The account stays within its buffer even if it lost its past. Train steps in the status are at most a second old,
    reports of environment steps two.
    """
    account = status.get("replay", {})
    samples, inserts = account.get("samples", 0), account.get("inserts", 0)
    trained = status.get("train_step", 0) * run.configured("train.batch_size")
    stepped = status.get("environment_steps", 0)
    found = []
    if run.has_mirror():  # the learner counts both, and saves them with its train step
        call = run.configured("train.num_updates_per_call") * run.configured("train.batch_size")
        is_off, unknown_inserts = abs(samples - trained) > call, 0
    else:  # the server counts: also train steps lost with a learner, and from its checkpoint after a restart
        unknown = UNKNOWN_STEPS * run.configured("train.batch_size")
        is_off = not trained / 1.5 - unknown <= samples <= trained * 1.5 + unknown
        unknown_inserts = UNKNOWN_STEPS * run.configured("train.collect_steps_per_iteration")
    if is_off:
        found.append(f"{samples:,} samples counted, but about {trained:,} were made")
    if inserts < stepped / 1.5 - unknown_inserts:  # there are fewer windows than steps, by a fifth in short episodes
        found.append(f"{inserts:,} inserts counted, but about {stepped:,} were made")
    return found


def find_ratio_error(status: dict[str, Any]) -> Optional[float]:
    """Returns the account's error beyond the error buffer, as a share of all samples; None without an account."""
    account = status.get("replay", {})
    if not account.get("samples"):
        return None
    excess: float = max(0.0, abs(account["ahead"]) - account["error_buffer"])
    return excess / account["samples"]


def count_came_back(run: Run) -> Optional[int]:
    """Returns what the replay's keeper (learner or server) started with; None if its log does not say."""
    if not run.has_mirror():
        return run.held_items().get("uniform_table")
    found = re.search(r"(\d+) windows came back", run.log("learner-0"))
    return int(found[1]) if found else 0


def restored_step(run: Run) -> int:
    """Returns the train step that the newest process of the learner began at."""
    found = re.search(r"restored .*ckpt-(\d+)", run.log("learner-0"))
    return int(found[1]) if found else 0


def judge_recovery(outcome: Outcome, since: float) -> None:
    secs = time.monotonic() - since
    outcome.recovery_secs = secs
    if secs > RECOVERY_SECS:
        outcome.broken.append(f"recovered after {secs:.0f} s, promised {RECOVERY_SECS:.0f} s")


def judge_training_on(outcome: Outcome, said: Sequence[dict[str, Any]], killed_at: float, batch_size: int) -> None:
    """Checks that the learner trained on from its mirror without its server, as far as samples per insert allow.

    Args:
      outcome: Receives the findings.
      said: The learner's statuses, from just before the server's death to its return.
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


def judge_held(run: Run, outcome: Outcome, saved: dict[str, int], since: float) -> None:
    """Checks that a restarted server holds what its last checkpoint did."""
    secs = time.monotonic() - since
    held = run.held_items()
    if saved:
        outcome.held_again_secs = secs
    if saved and secs > RECOVERY_SECS:
        outcome.broken.append(f"held its checkpoint again after {secs:.0f} s, promised {RECOVERY_SECS:.0f} s")
    for table, count in saved.items():
        if held.get(table, 0) < count:
            outcome.broken.append(f"holds {held.get(table, 0):,} of {count:,} items saved of '{table}'")


def judge_loss(run: Run, outcome: Outcome, before: dict[str, Any], killed_at: float) -> None:
    """Checks that what was saved `checkpoint_interval_secs` before the death of all, at `killed_at`, is there again.

    A younger learner must restore what it started with, because it saves as soon as it trains. So must a server that
    alone holds the replay: it started with a checkpoint.
    """
    if count_came_back(run) is None:
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


def resume(run: Run, outcome: Outcome, before: dict[str, Any], within_secs: float = 120.0) -> None:
    """Starts the launcher again and records what came back."""
    since, started_at = time.monotonic(), time.time()
    run.start(MANY_ITERATIONS)
    after = run.await_training(started_at)
    secs = time.monotonic() - since
    outcome.recovery_secs = secs
    if secs > within_secs:
        outcome.broken.append(f"resumed after {secs:.0f} s, expected {within_secs:.0f} s")
    compare(run, outcome, before, after)
    outcome.train_step_after = restored_step(run)
    if not outcome.train_step_after:
        outcome.broken.append("began anew")
    came_back = count_came_back(run)
    if came_back is not None and before.get("replay"):
        outcome.transitions_lost = max(0, before["replay"]["held"] - came_back)


def await_new_server(run: Run, pid: int) -> list[dict[str, Any]]:
    """Returns the learner's statuses until a replay server other than process `pid` serves. Raises `Hang`."""
    said: list[dict[str, Any]] = []

    def serves() -> bool:
        status = run.status()
        if status and (not said or status["time"] > said[-1]["time"]):
            said.append(status)
        return run.pid("replay-server-0") not in (0, pid) and "serving replay" in run.log("replay-server-0")

    await_(serves, "restart of replay-server-0")
    return said


def await_results(run: Run, due: set[int], num_results: int) -> set[int]:
    """Waits until `num_results` of the evaluations `due` are done, and returns those. Raises `Hang`."""

    def done() -> set[int]:
        return due - set(run.status().get("pending_evaluations", []))

    await_(lambda: len(done()) >= num_results, f"result of {num_results} of {len(due)} evaluations")
    return done()


def await_return(run: Run, outcome: Outcome, log_before: str) -> None:
    """Waits until the server has saved its refill, if the learner lives and trains that long.

    Args:
      run: The run.
      outcome: Receives the findings.
      log_before: The learner's log before the server died.
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
        await_(lambda: has_ended() or news(GIVEN_BACK), "refill of the replay server", RECOVERY_SECS)
        if any(news(GIVEN_BACK)) or news(SAVES_GIVEN_BACK):  # the latter after a failed attempt
            await_(is_saved, "checkpoint of the refill", RECOVERY_SECS)
    except Hang as hang:
        outcome.broken.append(str(hang))


def await_no_process(run: Run, outcome: Outcome, secs: float) -> None:
    try:
        await_(lambda: not run.processes(), "end of all processes", secs)
    except Hang:
        outcome.broken.append(f"{len(run.processes())} processes left after {secs:.0f} s")
        run.kill_processes()
