"""`actorlearner keep-running`: what is restarted, what is not, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import actorlearner
from actorlearner.launcher.restarts import Timing
from actorlearner.runtime.lifecycle import FINAL_CODES, ExitCode
from actorlearner.tools.keep_running import Keeper

QUICK = Timing(first_restart_secs=0.01, longest_restart_secs=0.01)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(actorlearner.__file__).parent.parent)}


def keep(script: str) -> int:
    """Keeps a shell script running in this process, with hardly a pause, and returns its last exit code."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        return Keeper("learner", ["bash", "-c", script], {ExitCode.DONE, *FINAL_CODES}, QUICK).run()
    finally:
        for number, action in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, action)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "actorlearner", "keep-running", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("code", [ExitCode.DONE, *FINAL_CODES])
def test_a_role_that_has_ended_for_good_is_not_started_again(code: ExitCode, capfd):
    """Settings that are wrong stay wrong; a job that starts them for ever holds its nodes."""
    assert keep(f"exit {int(code)}") == code
    assert capfd.readouterr().err.count("is process") == 1


def test_a_role_that_dies_is_started_again(tmp_path: Path, capfd):
    """kill -9 must not end a run of days."""
    assert keep(f"mkdir {tmp_path}/once && kill -9 $$ || exit 0") == 0
    said = capfd.readouterr().err
    assert "learner ended with exit code 137" in said
    assert said.count("is process") == 2


def test_a_role_that_keeps_dying_young_is_given_up(capfd):
    """A crash loop without end looks like a training."""
    assert keep("exit 1") == 1
    said = capfd.readouterr().err
    assert said.count("is process") == 5
    assert "error: learner died repeatedly" in said


def test_sigterm_reaches_the_role_and_its_own_exit_code_comes_back(tmp_path: Path):
    """A role that is killed instead of asked loses what it learned since its last checkpoint."""
    role = f"trap 'touch {tmp_path}/saved; exit 143' TERM; echo ready; while :; do sleep 0.1; done"
    kept = start("learner", "--", "bash", "-c", role)
    try:
        assert kept.stdout.readline() == "ready\n"
        kept.send_signal(signal.SIGTERM)
        assert kept.wait(20) == 143
    finally:
        kept.kill()
    assert (tmp_path / "saved").exists()


def test_a_role_that_saves_hears_sigterm_once(tmp_path: Path):
    """At a second one it stops at once: the 28 s of saving a large replay would be lost."""
    role = f"trap 'echo told >>{tmp_path}/told' TERM; echo ready; while [ ! -e {tmp_path}/saved ]; do sleep 0.1; done"
    kept = start("replay-server", "--", "bash", "-c", role)
    told = tmp_path / "told"
    try:
        assert kept.stdout.readline() == "ready\n"
        for _ in range(3):
            kept.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 20
            while not told.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        (tmp_path / "saved").touch()
        assert kept.wait(20) == 0
    finally:
        kept.kill()
    assert told.read_text() == "told\n"


def test_actorlearner_is_this_program_and_further_codes_may_end_it():
    """In a container it is on no path that the host knows; and a job asks anew where its learner runs."""
    kept = start("tool", "--also_ends_with=1", "--", "actorlearner", "health", "/nowhere")
    out, said = kept.communicate(timeout=60)
    assert kept.returncode == 1
    assert out.strip() and said.count("is process") == 1


def test_a_command_is_needed():
    """Without one there is nothing to keep, and a script that lost its variable would not notice."""
    assert start("learner").wait(60) == ExitCode.USAGE
