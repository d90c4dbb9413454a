"""A health file is fresh while its process makes progress, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import actorlearner
from actorlearner.runtime import health
from actorlearner.runtime.health import Heartbeat, describe_problem
from actorlearner.runtime.lifecycle import Stop, wait_until


def test_a_beat_touches_the_file_at_most_once_a_second(tmp_path):
    """Collect actors beat with every step, thousands of times a second."""
    now = 0.0
    heartbeat = Heartbeat(tmp_path / "alive", clock=lambda: now)
    heartbeat.beat()
    os.utime(tmp_path / "alive", (1, 1))
    now = 0.9
    heartbeat.beat()
    assert (tmp_path / "alive").stat().st_mtime == 1
    now = 1.0
    heartbeat.beat()
    assert (tmp_path / "alive").stat().st_mtime > 1


def test_what_is_healthy_is_said_by_the_age_of_the_last_beat(tmp_path):
    path = tmp_path / "alive"
    assert "no heartbeat yet" in str(describe_problem(path, 60))
    Heartbeat(path).beat()
    beaten_at = path.stat().st_mtime
    assert describe_problem(path, 60, now=beaten_at + 60) is None
    assert "is 61 s old, more than --max_age_secs = 60" in str(describe_problem(path, 60, now=beaten_at + 61))


def test_a_role_that_cannot_beat_goes_on(tmp_path):
    """A full /tmp must end no training; the file then grows old, which is the message."""
    Heartbeat(tmp_path / "missing" / "alive").beat()


@pytest.fixture
def beats(tmp_path):
    yield tmp_path / "alive"
    health._heartbeat = Heartbeat()


def test_the_beat_of_a_process_before_does_not_count(beats):
    """A restarted role would be called healthy before it has begun."""
    beats.touch()
    health.watch(beats)
    assert not beats.exists()


def test_a_wait_beats(beats):
    """A learner that waits for actors has its own deadline; restarting it would not help."""
    health.watch(beats)
    assert wait_until(lambda: True, lambda: "nothing", stop=Stop(), deadline_secs=1, setting="none")
    assert beats.exists()


def await_beat(path, is_beat):
    """As `eventually`, which is of no use here: it beats by itself."""
    deadline = time.monotonic() + 30
    while not (path.exists() and is_beat(path.stat().st_mtime)):
        assert time.monotonic() < deadline, "no beat within 30 s"
        time.sleep(0.02)


def test_one_long_call_beats_until_its_time_is_up(beats):
    """A server that saves a large table answers no request meanwhile; one that hangs must still be found."""
    health.watch(beats)
    with health.beat_meanwhile(secs=30.0):
        await_beat(beats, lambda beaten_at: True)
        os.utime(beats, (1, 1))
        await_beat(beats, lambda beaten_at: beaten_at > 1)
    health.watch(beats)
    with health.beat_meanwhile(secs=-1.0):
        for thread in threading.enumerate():
            if thread.name == "heartbeat":
                thread.join(10)
        assert not beats.exists()


HANGING = """
import re, time
from actorlearner.runtime.health import beat, watch

watch(hang_secs=4.0)
until = time.monotonic() + 5.0
while time.monotonic() < until:
    beat()
    time.sleep(0.01)
print("went on for longer than that", flush=True)

def simulate():
    return re.match("(a+)+$", "a" * 60 + "b")  # for years, in native code that holds the interpreter's lock

simulate()
"""


def test_a_process_that_hangs_says_where_and_ends():
    """In other systems a hung simulator is a silently missing actor, or a learner that waits without a message."""
    environment = {**os.environ, "PYTHONPATH": str(Path(actorlearner.__file__).parent.parent)}
    command = [sys.executable, "-c", HANGING]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert process.stdout == "went on for longer than that\n"
    assert process.returncode == 1
    assert process.stderr.startswith("Timeout (0:00:04)!")
    assert "in simulate" in process.stderr
