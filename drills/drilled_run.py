"""The run that a drill breaks: its launcher, its roles' logs and status, and waits for them.

Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

from actorlearner.launcher.command import train_command
from actorlearner.run.status import read_status
from actorlearner.runtime.processes import die_with_parent
from drills.wire import Wire

CHECKOUT = Path(__file__).resolve().parents[1]
"""For the roles of a drilled run, which import its environment from here."""

ROLES = ("learner-0", "replay-server-0", "collect-actor-0", "eval-actor-0")
PATIENCE_SECS = 300.0  # longest wait for anything; after it the drill reports a hang
MANY_ITERATIONS = 1_000_000
EVAL_INTERVAL = 2_000  # train steps

# A short run that is saved often, so that little is lost.
BINDINGS = (
    f"train.eval_interval = {EVAL_INTERVAL}",
    "train.log_interval = 500",
    "train.num_eval_episodes = 3",
    "train.policy_save_interval = 1_000_000_000",
    "learner.checkpoint_interval_secs = 5.0",
    "collect_actor.report_interval_secs = 0.5",
    "replay_server.linger_secs = 3.0",
)

class Hang(Exception):
    """Something expected did not happen within `PATIENCE_SECS`."""


class Run:
    """One run directory, and its running launcher, if any."""

    def __init__(self, experiment: str, folder: Path, gin_bindings: Sequence[str], seed: int):
        self.experiment = experiment
        self._bindings = [*BINDINGS, *gin_bindings]
        self._seed = seed
        self.folder = folder
        self.root_dir = folder / "run"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        self.launcher: Optional[subprocess.Popen[bytes]] = None
        self.wire: Optional[Wire] = None
        self._output_path = folder / "launcher.log"

    def evaluate_every(self, num_steps: int) -> None:
        """Changes the drill's evaluation interval from the next start on; the user's own setting has priority."""
        self._bindings.insert(len(BINDINGS), f"train.eval_interval = {num_steps}")

    def start(self, num_iterations: int, *bindings_of_this_start: str, experiment: Optional[str] = None) -> None:
        """Starts `actorlearner train` in the directory; returns at once.

        Args:
          num_iterations: Train steps until training ends.
          bindings_of_this_start: Applied after all others.
          experiment: Another experiment instead of the drill's, without the user's bindings.
        """
        bindings = [*(BINDINGS if experiment else self._bindings), f"train.num_iterations = {num_iterations}"]
        bindings += bindings_of_this_start
        command = train_command(
            experiment or self.experiment,
            root_dir=self.root_dir,
            seed=self._seed,
            gin_bindings=bindings,
            flags=["--num_video_episodes=0", *([f"--via={self.wire.address}"] if self.wire else [])],
        )
        environment = {
            **os.environ,
            "ACTORLEARNER_DRILL": self.mark,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        with open(self._output_path, "ab") as output:
            self.launcher = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def output(self) -> str:
        """Returns the output of all launchers so far."""
        return self._output_path.read_text(errors="replace")

    def wait(self, secs: float) -> int:
        """Returns the launcher's exit code. Raises `Hang`."""
        assert self.launcher is not None
        try:
            return self.launcher.wait(secs)
        except subprocess.TimeoutExpired:
            raise Hang(f"the launcher did not end within {secs:.0f} s") from None

    def status(self) -> dict[str, Any]:
        """Returns the learner's last status; empty if there is none."""
        status = read_status(self.root_dir / "status.json")
        return status.to_json() if status else {}

    def configured(self, setting: str) -> int:
        """Returns an integer setting of the run's operative configuration; 0 if there is none yet."""
        found = re.search(rf"^{re.escape(setting)} = (\d+)", self._operative_config(), re.MULTILINE)
        return int(found[1]) if found else 0

    def is_configured(self, setting: str) -> bool:
        """Returns whether the run's operative configuration has this setting."""
        return bool(re.search(rf"^{re.escape(setting)} = ", self._operative_config(), re.MULTILINE))

    def factory(self, part: str) -> Optional[str]:
        """Returns the configurable of a part of the experiment, e.g. "dqn" for the agent; None if gin binds none."""
        found = re.search(rf"^experiment\.{part} = @([\w./]+)\(\)$", self._operative_config(), re.MULTILINE)
        return found[1] if found else None

    def _operative_config(self) -> str:
        try:
            return (self.root_dir / "operative_config.gin").read_text()
        except OSError:  # not written yet
            return ""

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """Returns the points of a kind in metrics.jsonl, oldest first, without an unfinished line."""
        points = []
        with contextlib.suppress(OSError):
            for line in (self.root_dir / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    points.append(json.loads(line))
        return [point for point in points if point["kind"] == kind]

    def saved_replay(self) -> dict[str, Any]:
        """Returns the description file of the replay's newest checkpoint; empty before the first."""
        abouts = []
        for path in (self.root_dir / "checkpoints" / "replay").glob("*/about.json"):
            if re.fullmatch(r"\d+-\d+", path.parent.name):
                with contextlib.suppress(FileNotFoundError):  # an older one that was just removed
                    abouts.append(json.loads(path.read_text()))
        return max(abouts, key=lambda about: about["time"], default={})

    def saved_items(self) -> dict[str, int]:
        """Returns the number of items of each table in the replay's newest checkpoint; empty before the first.

        Queues are left out: they are read as soon as their server is back.
        """
        newest = self.saved_replay()
        if not newest:
            return {}
        queues = {name for name, settings in newest["tables"].items() if settings["max_times_sampled"] == 1}
        return {table: count for table, count in newest["items"].items() if table not in queues}

    def is_saving(self, role: str) -> bool:
        """Returns whether the learner or the replay server is writing a checkpoint."""
        checkpoints = self.root_dir / "checkpoints"
        patterns = ("ckpt-*_temp",) if role == "learner-0" else ("replay/writing/*", "replay/*.new")
        return any(next(checkpoints.glob(pattern), None) for pattern in patterns)

    def held_items(self) -> dict[str, int]:
        """Returns what the replay server's newest process held of each table when it began to serve."""
        found = re.search(r"the replay holds (.*)", self.log("replay-server-0"))
        counts = re.findall(r"([\d,]+) in '(\w+)'", found[1]) if found else []
        return {table: int(count.replace(",", "")) for count, table in counts}

    def has_mirror(self) -> bool:
        """Returns whether the learner holds the replay, and can refill its server."""
        return "@resident_replay" in self._operative_config()

    def log(self, role: str) -> str:
        """Returns what the newest process of a role has logged."""
        try:
            return (self.root_dir / "logs" / f"{role}.log").read_text(errors="replace").rpartition("\n--- ")[2]
        except OSError:
            return ""

    def pid(self, role: str) -> int:
        """Returns the process id of a role's newest process; 0 before the first."""
        match = re.match(r"(?:--- )?.* process (\d+): ", self.log(role))
        return int(match[1]) if match else 0

    def began_at(self, role: str) -> float:
        """Returns when a role's newest process began, in unix seconds rounded up; 0 before the first."""
        match = re.match(r"(?:--- )?(.*) process \d+: ", self.log(role))
        return time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")) + 1.0 if match else 0.0

    def port(self) -> int:
        """Returns the port of the replay server's newest process; 0 as long as it does not listen."""
        match = re.search(r"serving replay and variables on port (\d+)", self.log("replay-server-0"))
        return int(match[1]) if match else 0

    def processes(self) -> list[int]:
        """Returns every running process that this drill's launchers started."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def await_status(self, since: float) -> dict[str, Any]:
        """Returns the learner's first status after `since` (unix seconds), or a finished run's last. Raises `Hang`."""

        def newest() -> Optional[dict[str, Any]]:
            status = self.status()
            return status if status.get("time", 0.0) > since or has_trained(status) else None

        return dict(await_(newest, "status of the learner"))

    def await_training(self, since: float, first_step: Optional[int] = None) -> dict[str, Any]:
        """Returns the status once a learner started after `since` (unix seconds) trains. Raises `Hang`."""
        first: dict[int, int] = {}

        def trains() -> Optional[dict[str, Any]]:
            status = self.status()
            if status.get("time", 0.0) <= since or status.get("process") != self.pid("learner-0"):
                return None
            begun_at = first.setdefault(status["process"], status["train_step"])
            is_training = status["train_step"] > begun_at and status["phase"] == "training"
            return status if is_training or status["phase"] in ("final evaluation", "reporting") else None

        return await_(trains, "training")

    def await_steps(self, num_steps: int) -> None:
        """Waits until `num_steps` more train steps are made. Raises `Hang`."""
        self.await_step(self.status().get("train_step", 0) + num_steps + 1)

    def await_step(self, step: int) -> None:
        """Waits for a train step. Raises `Hang`."""
        await_(lambda: self.status().get("train_step", 0) >= step, f"train step {step:,}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops the launcher, which saves, and returns its exit code. Raises `Hang`.

        Args:
          number: Signal number; SIGINT goes to every process that a terminal's Ctrl-C would reach.
        """
        assert self.launcher is not None
        if number == signal.SIGINT:
            os.killpg(self.launcher.pid, number)
        else:
            self.launcher.send_signal(number)
        return self.wait(PATIENCE_SECS)

    def kill_processes(self) -> None:
        """Kills every running process that this drill's launchers started."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def await_(
    condition: Callable[[], Any], what: str, secs: float = PATIENCE_SECS, *, every_secs: float = 0.05
) -> Any:
    """Polls `condition` and returns its first true result. Raises `Hang` after `secs` seconds."""
    deadline = time.monotonic() + secs
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(every_secs)
    raise Hang(f"no {what} within {secs:.0f} s")


def has_trained(status: dict[str, Any]) -> bool:
    """Returns whether a status says that training is over."""
    return status.get("phase", "waiting") not in ("training", "waiting")


def is_alive(pid: int) -> bool:
    """Returns whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
