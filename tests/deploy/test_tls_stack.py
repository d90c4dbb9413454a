"""docker/compose.tls.yaml on a real Docker engine: `tests/run.sh deploy`, as root.

One run is trained throughout: strangers are refused, an actor joins from outside, the certificates are renewed.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import portpicker
import pytest
from cryptography import x509

from actorlearner.runtime.tls.authority import make_certificates
from tests.deploy.infrastructure import CHECKOUT, await_that, needed_engine, run
from tests.documented_commands import documented

FILES = [CHECKOUT / "docker" / name for name in ("compose.yaml", "compose.tls.yaml")]
COMPOSE = ["docker", "compose", *(word for path in FILES for word in ("-f", str(path)))]
ROLES = ("replay-server", "learner", "collect-actor", "eval-actor")
GIN_BINDINGS = "\n".join(
    [
        "train.num_iterations = 1_000_000",
        "train.log_interval = 500",
        "train.num_eval_episodes = 2",
        "gym_environment.max_episode_steps = 200",
    ]
)
BUILD_SECS, START_SECS = 1200.0, 300.0  # deadlines; two cores may be shared
USER = 1000

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(2400)]


class Stack:
    """One compose project over TLS, whose port is published on this machine's loopback."""

    def __init__(self, folder: Path):
        self.certs = folder / "certs"
        self.port = portpicker.pick_unused_port()
        self._run_dir = folder / "run"
        self._log = folder / "up.log"
        self._settings = {
            "COMPOSE_PROJECT_NAME": f"actorlearner-tls-{os.getpid()}",
            "EXPERIMENT": "dqn_cartpole",
            "COLLECT_ACTORS": "1",
            "RUN_DIR": str(self._run_dir),
            "GIN_BINDINGS": GIN_BINDINGS,
            "TENSORBOARD_PORT": str(portpicker.pick_unused_port()),
            "BUILD_CA_BUNDLE": os.environ.get("SSL_CERT_FILE", "/dev/null"),  # where a proxy signs anew
            "TLS_DIR": str(self.certs),
            "TLS_PORT": str(self.port),
        }

    def issue(self, folder: Path, renew: bool = False) -> None:
        """Makes certificates that the containers' user can read."""
        make_certificates(folder, [], renew=renew)
        run("chown", "-R", USER, folder)

    def compose(self, *arguments: str, deadline_secs: float = 120.0) -> str:
        return run(*COMPOSE, *arguments, environment=self._settings, deadline_secs=deadline_secs)

    def up(self) -> None:
        self.issue(self.certs)
        self.compose("up", "--detach", *ROLES, deadline_secs=BUILD_SECS)

    def container(self, service: str) -> str:
        (container,) = self.compose("ps", "--quiet", service).split()
        return container

    def status(self, name: str) -> int:
        """Returns one of the learner's numbers, 0 while it has none."""
        try:
            return int(json.loads((self._run_dir / "status.json").read_text())[name])
        except (OSError, ValueError):
            return 0

    def train_step(self) -> int:
        return self.status("train_step")

    def logs(self, *services: str) -> str:
        return self.compose("logs", "--no-color", *services)

    def outside(self, certs: Path | None, *flags: str, name: str | None = None) -> list[str]:
        """Returns the documented command of an actor on another machine, which reaches what the host publishes."""
        here = {"gpu1:8008": f"localhost:{self.port}", "$PWD/certs": str(certs), "$(id -u)": str(USER)}
        words = documented(
            "TLS between machines",
            'docker run --detach --init --read-only --tmpfs /tmp --user "$(id -u)" '
            '--volume "$PWD/certs/collect-actor:/tls/collect-actor:ro" --env ACTORLEARNER_TLS_DIR=/tls '
            "actorlearner:cpu collect-actor dqn_cartpole --replay_address=gpu1:8008 --root_dir=/tmp/run --task=100",
            **here,
        )
        words.remove("--detach")
        words[2:2] = ["--rm", "--network=host", *(["--name", name] if name else [])]
        if certs is None:
            words[2:2] = ["--env=ACTORLEARNER_TLS_DIR="]
            position = words.index("--volume")
            del words[position : position + 4]
        return [*words, f"--gin_bindings={GIN_BINDINGS}", *flags]

    def run_outside(self, certs: Path | None, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.outside(certs, *flags), capture_output=True, text=True, timeout=START_SECS)

    def serial_number(self) -> int:
        """Returns that of the certificate which the replay server shows."""
        pem = ssl.get_server_certificate(("localhost", self.port))
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    def close(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A run without an end, over TLS."""
    needed_engine()
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.up()
        await_that(lambda: stack.train_step() > 0, "the first train steps", START_SECS, stack.logs)
        yield stack
    finally:
        stack.close()


CONNECT = """
import socket, sys
for port in map(int, sys.argv[2:]):
    try:
        socket.create_connection((sys.argv[1], port), timeout=3).close()
        print(port)
    except OSError:
        pass
"""


def test_reverbs_own_port_is_reached_through_the_tunnel_alone(stack: Stack):
    """A tunnel beside an open port protects nothing."""
    server = stack.container("replay-server")
    table = run("docker", "exec", server, "cat", "/proc/net/tcp", "/proc/net/tcp6")
    ports = {int(found, 16) for found in re.findall(r": [0-9A-F]+:([0-9A-F]{4}) 0+:0000 0A ", table)}
    assert 8008 in ports and len(ports) >= 2, table
    addresses = run(
        "docker", "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}", server
    )
    for address in addresses.split():
        probe = [sys.executable, "-c", CONNECT, address, *map(str, sorted(ports))]
        assert run(*probe).split() == ["8008"]  # from the host
    inside = run(
        "docker", "exec", stack.container("learner"), "python", "-c", CONNECT, "replay-server", *map(str, sorted(ports))
    )
    assert inside.split() == ["8008"]


def test_a_client_without_a_certificate_is_refused_and_says_so(stack: Stack, tmp_path: Path):
    """To Reverb's clients a refusal is a deadline that passes."""
    stranger = stack.run_outside(None, "--peer_patience_secs=10")
    assert stranger.returncode == 77, stranger.stderr
    assert f"localhost:{stack.port} uses TLS: give --tls_dir" in stranger.stderr
    stack.issue(tmp_path / "other")
    run("cp", stack.certs / "ca.crt", tmp_path / "other" / "collect-actor")
    impostor = stack.run_outside(tmp_path / "other", "--peer_patience_secs=10")
    assert impostor.returncode == 77, impostor.stderr
    assert "refuses the certificate /tls/collect-actor/tls.crt: it is of another CA" in impostor.stderr
    refusals = stack.logs("replay-server")
    assert "does not speak TLS" in refusals and "shows a certificate that is of another CA" in refusals


def test_an_actor_on_another_machine_joins(stack: Stack):
    stack.compose("stop", "collect-actor")
    name = f"actorlearner-tls-joins-{os.getpid()}"
    steps = stack.status("environment_steps") + 1_000  # more than may still have been on its way
    joining = subprocess.Popen(stack.outside(stack.certs, name=name), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        await_that(lambda: stack.status("environment_steps") > steps, "steps of the new actor", START_SECS, stack.logs)
    finally:
        run("docker", "stop", name)
        joining.communicate(timeout=60)
        stack.compose("start", "collect-actor")


def test_certificates_are_renewed_while_the_run_goes_on(stack: Stack):
    """A run of weeks outlives its certificates; to start anything again is neither needed nor harmful."""
    before = stack.serial_number()
    server = stack.container("replay-server")
    started_at = run("docker", "inspect", "--format", "{{.State.StartedAt}}", server)
    stack.issue(stack.certs, renew=True)
    assert stack.serial_number() != before
    stack.compose("restart", "collect-actor", "eval-actor")
    step = stack.train_step()
    await_that(lambda: stack.train_step() > step + 1_000, "training with new certificates", START_SECS, stack.logs)
    assert run("docker", "inspect", "--format", "{{.State.StartedAt}}", server) == started_at
