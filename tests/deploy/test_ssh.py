"""launch/ssh.sh over three hosts, each with an sshd, an address and a run directory of its own; over TLS."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actorlearner.runtime.tls.authority import make_certificates
from tests.deploy.infrastructure import CHECKOUT, Log, await_that, needed_command, needed_program, run
from tests.documented_commands import documented

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]

SECTION = "Several hosts over ssh"
NAMES = ("gpu1", "cpu1", "cpu2")
LAB = {"HOSTS": " ".join(NAMES), "P": "sshlab", "NET": "10.79.0"}
START_SECS = 420.0  # importing and tracing TensorFlow, on a busy machine


class Hosts:
    """Three hosts with real sshd's, and launch/ssh.sh on a fourth."""

    def __init__(self, folder: Path):
        self._program = needed_program("LAB_HOSTS")
        needed_command("sshd", "openssh-server")
        self._folder = folder
        self._sshds: list[subprocess.Popen[bytes]] = []
        self._root_dir = folder / "run"  # the same path on every host, and on each another directory

    def up(self) -> None:
        run(self._program, "down", environment=LAB)
        run(self._program, "up", environment=LAB)
        self._root_dir.mkdir()
        make_certificates(self._folder / "certs", ["gpu1"])
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._folder / key)
        (self._folder / "known_hosts").write_text(f"* {(self._folder / 'host.pub').read_text()}")
        (self._folder / "client").write_text(
            f"IdentityFile {self._folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {self._folder}/known_hosts\n"
        )
        (self._folder / "server").write_text(
            f"HostKey {self._folder}/host\nAuthorizedKeysFile {self._folder}/user.pub\nStrictModes no\nUsePAM no\n"
            "PidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        )
        for name in NAMES:
            serve = f"mount -t tmpfs none {self._root_dir} && exec /usr/sbin/sshd -D -e -f {self._folder}/server"
            with open(self._folder / f"sshd-{name}.log", "wb") as log:
                self._sshds.append(
                    subprocess.Popen(
                        [self._program, "on", name, "sh", "-c", serve], env={**os.environ, **LAB}, stderr=log
                    )
                )
        for name in NAMES:
            Log(self._folder / f"sshd-{name}.log").await_text("listening", 20)

    def launch(
        self, verb: str, *arguments: str, num_iterations: int = 10_000_000
    ) -> subprocess.CompletedProcess[str]:
        """Runs launch/ssh.sh on the controller's host."""
        command = {
            "start": documented(SECTION, "launch/ssh.sh start"),
            "status": documented(SECTION, "launch/ssh.sh status"),
            "logs": documented(SECTION, "launch/ssh.sh logs learner")[:2],
            "stop": documented(SECTION, "launch/ssh.sh stop"),
        }[verb]
        command_of_settings = (
            'export LEARNER_HOST=gpu1 ACTOR_HOSTS="cpu1 cpu2" ACTORS_PER_HOST=4 EXPERIMENT=dqn_cartpole'
        )
        settings = {
            **dict(setting.split("=", 1) for setting in documented(SECTION, command_of_settings)[1:]),
            "LEARNER_HOST": "root@gpu1",
            "ACTORS_PER_HOST": "1",
            "GIN_BINDINGS": f"train.num_iterations = {num_iterations}; train.eval_interval = 15_000; "
            "learner.checkpoint_interval_secs = 5.0",
            "LEARNER_FLAGS": "--num_video_episodes=0",
            "RUN_DIR": str(self._root_dir),
            "TLS_DIR": str(self._folder / "certs"),
            "STOP_SECS": "60",
            "ACTORLEARNER": f"env PYTHONPATH={CHECKOUT}/distributed {sys.executable} -m actorlearner",
            "SSH": f"ssh -F {self._folder}/client -o BatchMode=yes -o ConnectTimeout=5",
        }
        return subprocess.run(
            [self._program, "on", "ctl", *command, *arguments],
            cwd=CHECKOUT,
            env={**os.environ, **LAB, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    def log(self, name: str) -> str:
        return self.launch("logs", name).stdout

    def train_step(self) -> int:
        match = re.search(r"learner +runs .* at train step (\d+)", self.launch("status").stdout)
        return int(match.group(1)) if match else 0

    def cut(self, name: str) -> None:
        run(self._program, "cut", name, environment=LAB)

    def join(self, name: str) -> None:
        run(self._program, "join", name, environment=LAB)

    def down(self) -> None:
        for name in NAMES:
            self.join(name)
        stopped = self.launch("stop")
        for sshd in self._sshds:
            sshd.terminate()
            sshd.wait(10)
        run(self._program, "down", environment=LAB)
        assert stopped.returncode == 0, stopped.stdout


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    lab = Hosts(tmp_path)
    lab.up()
    try:
        yield lab
    finally:
        lab.down()


def test_training_over_ssh_outlives_a_partition_resumes_after_stop_and_ends_by_itself(hosts: Hosts):
    """Without a scheduler nothing else restarts a role, and an unreachable host must not block the others."""
    started = hosts.launch("start")
    assert started.returncode == 0, started.stdout
    await_that(lambda: hosts.train_step() > 0, "the first train steps", START_SECS, lambda: hosts.log("learner"))
    assert "port 8008 requires a certificate of the CA" in hosts.log("replay-server")
    status = hosts.launch("status")
    assert status.returncode == 0
    assert len(re.findall(r"^\S+: \S+ +runs \(process \d+\)", status.stdout, re.MULTILINE)) == 5, status.stdout
    assert "runs already" in hosts.launch("start").stdout

    hosts.cut("cpu2")
    status = hosts.launch("status")
    assert status.returncode == 1 and "cpu2: out of reach" in status.stdout
    before = hosts.train_step()
    await_that(lambda: hosts.train_step() > before + 1_000, f"training beyond {before} without cpu2", 60)
    cut_stop = hosts.launch("stop")
    assert cut_stop.returncode == 1 and "cpu2: out of reach" in cut_stop.stdout, cut_stop.stdout
    assert re.search("gpu1: learner +stopped", cut_stop.stdout), cut_stop.stdout

    hosts.join("cpu2")
    stopped_at = int(re.findall(r"stopped at train step (\d+)", hosts.log("learner"))[-1])
    end = stopped_at // 1_000 * 1_000 + 20_000  # endless until here: a fast host would have ended before it was stopped
    assert hosts.launch("start", num_iterations=end).returncode == 0  # cpu2's actor runs on, and finds the new server
    await_that(lambda: "restored" in hosts.log("learner"), "the second life", START_SECS, lambda: hosts.log("learner"))
    await_that(
        lambda: "ended with exit code 0" in hosts.log("learner"),
        "the end of training",
        500,
        lambda: hosts.log("learner"),
    )
    await_that(
        lambda: hosts.launch("status").stdout.count("ended with exit code 0") == 5,
        "every role's own end, that of the host that was away too",
        60,
        lambda: hosts.launch("status").stdout + hosts.log("collect-actor-1"),
    )
    assert hosts.launch("status").returncode == 0


def test_a_host_that_is_not_ready_is_named_before_anything_starts(hosts: Hosts):
    """A partial start leaves processes behind on hosts that are not looked at."""
    hosts.cut("cpu1")
    refused = hosts.launch("start")
    assert refused.returncode == 1
    assert "cpu1: out of reach" in refused.stdout and "nothing was started" in refused.stdout
    hosts.join("cpu1")
    assert "runs" not in hosts.launch("status").stdout.replace("does not run", "")
