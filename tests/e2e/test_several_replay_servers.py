"""Several replay servers: actors are spread over them, the learner reads all, one may be away, one may join."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from actorlearner.local import find_free_ports
from actorlearner.replay.resident import STREAM_TABLE
from actorlearner.runtime.messages import read_server_info
from tests.e2e.processes import RUN_SECS, START_SECS, TINY, Process, Processes, bind

ENDLESS = (
    *TINY,
    "train.num_iterations = 1_000_000_000",
    "train.eval_interval = 0",
    "learner.checkpoint_interval_secs = 2.0",
    "resident_replay.chunk_length = 20",
)
SHORT_SECS = 45.0  # for what takes some seconds on a quiet machine


class Run:
    """Roles started by hand, with two replay servers, and what they have come to."""

    def __init__(self, processes: Processes, folder: Path, eventually: Any):
        self._processes = processes
        self._folder = folder
        self._eventually = eventually
        self.first, self.second, self.third = (f"localhost:{port}" for port in find_free_ports(3))

    def start(self, role: str, *flags: str, bindings: tuple[str, ...] = ENDLESS) -> Process:
        addresses = f"--replay_address={self.first},{self.second}"
        return self._processes.start(role, "dqn_cartpole", addresses, "--root_dir=run", *flags, *bind(*bindings))

    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder / "run" / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def num_read(self, address: str) -> int:
        """Returns how many chunks of a server's the learner has read since that began."""
        return read_server_info(address, timeout_secs=10)[STREAM_TABLE].rate_limiter_info.sample_stats.completed

    def await_read(self, *addresses: str) -> None:
        """Returns when the learner has read more from each."""
        before = {address: self.num_read(address) for address in addresses}
        for address in addresses:
            self._eventually(lambda address=address: self.num_read(address) > before[address], secs=SHORT_SECS)

    def await_steps(self, num_steps: int = 200) -> None:
        before = self.status()["train_step"]
        self._eventually(lambda: self.status()["train_step"] > before + num_steps, secs=SHORT_SECS)

    def await_servers(self, **answering: bool) -> None:
        """Returns when status.json says of just these servers whether they answer."""
        expected = {getattr(self, name): answers for name, answers in answering.items()}
        self._eventually(lambda: self.status().get("replay", {}).get("servers") == expected, secs=SHORT_SECS)



def is_ratio_kept(replay: dict[str, Any]) -> bool:
    """Returns whether samples per insert are kept to within one call, and one chunk, which is taken in as a whole."""
    samples_per_insert = 8
    windows_per_chunk = 2 * (18 - 6 + 1)
    return abs(replay["ahead"]) <= replay["error_buffer"] + samples_per_insert * windows_per_chunk


def test_a_run_outlives_a_replay_server_takes_it_back_takes_in_another_and_resumes(processes, tmp_path, eventually):
    """Actors bound to a dead server would wait for ever, and one that is added would stay empty."""
    run = Run(processes, tmp_path, eventually)
    run.start("replay-server", "--task=0")
    second = run.start("replay-server", "--task=1")
    learner = run.start("learner")
    # Of two servers task 5 takes the second, of three the third.
    actors = [run.start("collect-actor", f"--task={task}") for task in (0, 5)]
    learner.await_line("train step 50:", RUN_SECS)
    run.await_read(run.first, run.second)
    second.await_line("saved the replay", SHORT_SECS)

    second.send(signal.SIGKILL)
    run.await_steps()
    run.await_servers(first=True, second=False)
    actors[1].await_line(f"writing to the replay server at {run.first}", SHORT_SECS)
    run.await_steps()

    second = run.start("replay-server", "--task=1")
    second.await_line("restoring the replay's checkpoint", START_SECS)
    run.await_servers(first=True, second=True)
    actors[1].await_line(f"writing to the replay server at {run.second}", SHORT_SECS)
    run.await_read(run.first, run.second)

    third = run.start("replay-server", "--task=2", f"--advertise={run.third}", f"--variables_address={run.first}")
    third.await_line(f"joined the run at {run.first} as {run.third}", START_SECS)
    run.await_servers(first=True, second=True, third=True)
    actors[1].await_line(f"writing to the replay server at {run.third}", SHORT_SECS)
    run.await_read(run.first, run.third)

    learner.send(signal.SIGTERM)
    assert learner.wait(SHORT_SECS) == 143, learner.output
    before = run.status()
    learner = run.start("learner")
    came_back = learner.await_line(r"(\d+) windows came back from the replay servers, (\d+) of them", START_SECS)
    eventually(lambda: run.status()["process"] == learner.pid and run.status()["phase"] == "training", SHORT_SECS)
    assert int(came_back[1]) > 0.95 * before["replay"]["held"]
    run.await_steps()
    run.await_read(run.first, run.third)
    eventually(lambda: is_ratio_kept(run.status()["replay"]), SHORT_SECS)
