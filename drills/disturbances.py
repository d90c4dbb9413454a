"""Faults that must end no role: hung hosts, broken networks, and foreign data sent to the port."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from drills.deaths import stop
from drills.drilled_run import CHECKOUT, PATIENCE_SECS, ROLES, Hang, Run, await_, is_alive
from drills.judging import (
    RECOVERY_SECS,
    Outcome,
    await_results,
    compare,
    judge_recovery,
    note_before,
)

STALL_SECS = 30.0  # longer than it takes to detect a vanished host
PARTITION_SECS = 60.0
MAX_KINDS = 60  # most kinds of rows that do not fit: some for each table
_STRAY = """
import sys, numpy as np, reverb
client = reverb.Client(sys.argv[1])
for table in ("stream", "experience", "uniform_table"):
    try:
        with client.trajectory_writer(num_keep_alive_refs=1, validate_items=False) as writer:
            for _ in range(100 if table == "uniform_table" else 1):  # a single one of 100,000 items is seldom drawn
                writer.append({"nothing": np.zeros(3, np.float32)})
                writer.create_item(table, 1.0, {"nothing": writer.history["nothing"][-1:]})
            writer.flush(timeout_ms=3000)
        print(table, "took it")
    except Exception as error:
        print(table, "refused it:", type(error).__name__, str(error)[:200])
"""


def survive(run: Run, fault: str, inject: Callable[[], None]) -> Outcome:
    """Does something and sees whether training continues, in the same processes."""
    outcome, before, _ = note_before(run, fault)
    lives = {role: run.pid(role) for role in ROLES}
    inject()
    since = time.monotonic()
    run.await_steps(500)
    judge_recovery(outcome, since)
    compare(run, outcome, before, run.status())
    for role, pid in lives.items():
        if run.pid(role) != pid or not is_alive(pid):
            outcome.broken.append(f"{role} died")
    return outcome


def stall_role(run: Run, role: str) -> Outcome:
    """Stops a role's process (SIGSTOP) for a while, as on a hung host: no role may give up, and all continue."""

    def inject() -> None:
        pid = run.pid(role)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(STALL_SECS)
        finally:
            os.kill(pid, signal.SIGCONT)

    return survive(run, f"{role} stalls for {STALL_SECS:.0f} s", inject)


def break_network(run: Run, how: str) -> Outcome:
    """Breaks the network between the replay server and all other roles for a while: they must wait, and continue.

    "stalled": nothing arrives, and then all of it. "lost": nothing arrives, and then each connection is found dead.
    "cut": each connection ends, and each new one immediately.
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

    outcome = survive(run, f"network {how} for {PARTITION_SECS:.0f} s", inject)
    if not has_said:
        outcome.broken.append("the learner did not log that it waits")
    due = set(await_(lambda: run.status().get("pending_evaluations"), "evaluation under way"))
    await_results(run, due, 1)
    return outcome


def send_garbage(run: Run) -> Outcome:
    """Sends bytes that are not gRPC to the port."""

    def inject() -> None:
        port = run.port()
        assert port
        for opening in (b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5.0)
            with connection, contextlib.suppress(OSError):  # the server may close the connection meanwhile
                connection.sendall(opening + random.Random(0).randbytes(1 << 16))

    return survive(run, "garbage to the port", inject)


def insert_stray(run: Run) -> Outcome:
    """Inserts an item that does not fit the tables' signatures."""

    def inject() -> None:
        assert run.port()
        command = [sys.executable, "-c", _STRAY, f"127.0.0.1:{run.port()}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECS)
        (run.folder / "stray.log").write_text(ended.stdout + ended.stderr)

    outcome = survive(run, "insert with a wrong signature", inject)
    if "took it" not in (run.folder / "stray.log").read_text():
        outcome.broken.append(f"nothing was inserted (see {run.folder / 'stray.log'})")
    else:
        try:
            await_(lambda: "not this experiment's" in run.log("learner-0"), "log of a foreign item", RECOVERY_SECS)
        except Hang:
            outcome.broken.append("the learner did not log the foreign item")
    return outcome


def insert_hostile(run: Run) -> Outcome:
    """Writes implausible rows of the right types into every table; then stops and resumes the run."""

    def inject() -> None:
        assert run.port()
        command = [sys.executable, "-m", "drills.strangers", f"127.0.0.1:{run.port()}"]
        paths = [str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECS)
        (run.folder / "strangers.log").write_text(ended.stdout + ended.stderr)

    outcome = survive(run, "hostile rows in every table", inject)
    took = re.findall(r"^(\w+) accepted (\d+)", (run.folder / "strangers.log").read_text(), re.MULTILINE)
    if not took or not all(int(number) for _, number in took):
        outcome.broken.append(f"not every table accepted rows (see {run.folder / 'strangers.log'})")
    said = run.log("learner-0").count("held a row that does not fit")
    if not said or said > MAX_KINDS:
        outcome.broken.append(f"the learner warned {said} times of rows that do not fit, expected once for each kind")
    resumed = stop(run)
    outcome.broken += resumed.broken
    outcome.train_step_after = resumed.train_step_after
    if run.status().get("environment_steps", 0) > 1e12:
        outcome.broken.append("implausible counts are in the checkpoint")
    return outcome
