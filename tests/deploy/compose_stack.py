"""A compose project of docker/compose.yaml on this machine's Docker engine, with a run directory of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import portpicker

from tests.deploy.infrastructure import CHECKOUT

UP_SCRIPT = str(CHECKOUT / "docker" / "up.sh")
COMPOSE = ("docker", "compose", "-f", str(CHECKOUT / "docker" / "compose.yaml"))
BUILD_SECS, START_SECS, RECOVERY_SECS, END_SECS = 1200.0, 300.0, 240.0, 600.0  # deadlines; two cores may be shared


def docker(*arguments: str) -> str:
    ended = subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True, timeout=120)
    return ended.stdout.strip()


class Stack:
    """One compose project with a run directory of its own."""

    def __init__(self, folder: Path, name: str, **settings: str):
        self.run_dir = folder / "run"
        self._log = folder / "up.log"
        self._up: subprocess.Popen[bytes] | None = None
        self.tensorboard_port = portpicker.pick_unused_port()
        self.settings = {
            "COMPOSE_PROJECT_NAME": name,
            "EXPERIMENT": "dqn_cartpole",
            "RUN_DIR": str(self.run_dir),
            "TENSORBOARD_PORT": str(self.tensorboard_port),
            "BUILD_CA_BUNDLE": os.environ.get("SSL_CERT_FILE", "/dev/null"),  # where a proxy signs anew
            **settings,
        }

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.settings}

    def compose(self, *arguments: str, timeout: float = 120.0) -> str:
        return self.run(*COMPOSE, *arguments, timeout=timeout)

    def run(self, *command: str, timeout: float = 120.0) -> str:
        """Returns what `command` wrote to stdout, run in the checkout with this stack's settings."""
        ended = subprocess.run(
            command, cwd=CHECKOUT, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def start_up(self, *command: str) -> None:
        """Starts the documented command, or another, in a process group of its own.

        With the shell's own answer to SIGINT: a test run in the background has it ignored, and so would a script be.
        """
        with self._log.open("ab") as log:
            self._up = subprocess.Popen(
                ["env", "--default-signal=INT", *(command or [*COMPOSE, "up"])],
                cwd=CHECKOUT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def press_ctrl_c(self) -> None:
        """As a terminal does: every process in the foreground gets it."""
        assert self._up is not None
        os.killpg(self._up.pid, signal.SIGINT)

    def terminate(self) -> None:
        """As a service manager does: the command alone is told."""
        assert self._up is not None
        self._up.send_signal(signal.SIGTERM)

    def await_up(self, secs: float) -> int:
        """Returns the exit code of the documented command."""
        assert self._up is not None
        try:
            return self._up.wait(secs)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {secs:g} s:\n{self.output[-4000:]}") from None

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def health(self, service: str) -> list[str]:
        return [docker("inspect", "--format", "{{.State.Health.Status}}", name) for name in self.containers(service)]

    def is_healthy(self, service: str, number: int = 1) -> bool:
        return self.health(service) == ["healthy"] * number

    def restarts(self, service: str) -> int:
        return sum(
            int(docker("inspect", "--format", "{{.RestartCount}}", name)) for name in self.all_containers(service)
        )

    def all_containers(self, service: str) -> list[str]:
        """Those that have ended, too."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def train_step(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((self.run_dir / "status.json").read_text())["train_step"])
        return 0

    def close(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5")
        if self._up is not None:
            self._up.wait(60)
