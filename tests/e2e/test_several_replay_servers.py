"""Several replay servers: actors are spread over them, the learner reads all, one may be away, one may join."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from actorlearner.replay.chunks import STREAM_TABLE
from actorlearner.runtime.messages import read_server_info
from actorlearner.runtime.ports import find_free_ports
from tests.documented_commands import documented
from tests.e2e.processes import RUN_SECS, START_SECS, TINY, Process, Processes, bind

SECTION = "When one replay server is not enough"
ENDLESS = (
    *TINY,
    "train.num_iterations = 1_000_000_000",
    "train.eval_interval = 0",
    "learner.checkpoint_interval_secs = 2.0",
    "resident_replay.chunk_length = 20",
)
FIRST = (
    ".venv/bin/actorlearner replay-server dqn_cartpole --replay_address=host1:8008,host2:8008 --task=0 "
    "--root_dir=runs/cartpole --may_join=host3:8008"
)
SECOND = (
    ".venv/bin/actorlearner replay-server dqn_cartpole --replay_address=host1:8008,host2:8008 --task=1 "
    "--root_dir=runs/cartpole"
)
THIRD = (
    ".venv/bin/actorlearner replay-server dqn_cartpole --advertise=host3:8008 --variables_address=host1:8008 --task=2 "
    "--root_dir=runs/cartpole"
)
LEARNER = ".venv/bin/actorlearner learner dqn_cartpole --replay_address=host1:8008,host2:8008 --root_dir=runs/cartpole"
ACTOR = (
    ".venv/bin/actorlearner collect-actor dqn_cartpole --replay_address=host1:8008,host2:8008 "
    "--root_dir=runs/cartpole --task=0"
)
SHORT_SECS = 45.0  # for what takes some seconds on a quiet machine


class Run:
    """Roles started by hand, with two replay servers, and what they have come to."""

    def __init__(self, processes: Processes, folder: Path, eventually: Any):
        self._processes = processes
        self._folder = folder
        self._eventually = eventually
        self.first, self.second, self.third = (f"localhost:{port}" for port in find_free_ports(3))

    def start(self, command: str, *flags: str) -> Process:
        """Starts a documented command; its hosts are ports here."""
        hosts = {"host1:8008": self.first, "host2:8008": self.second, "host3:8008": self.third}
        here = {host: address for host, address in hosts.items() if host in command}
        arguments = documented(SECTION, command, **here, **{"runs/cartpole": "run"})[1:]
        return self._processes.start(*arguments, *flags, *bind(*ENDLESS))

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
    run.start(FIRST)
    second = run.start(SECOND)
    learner = run.start(LEARNER)
    # Of two servers task 5 takes the second, of three the third.
    actors = [run.start(ACTOR), run.start(ACTOR, "--task=5")]
    learner.await_line("train step 50:", RUN_SECS)
    run.await_read(run.first, run.second)
    second.await_line("saved the replay", SHORT_SECS)

    second.send(signal.SIGKILL)
    run.await_steps()
    run.await_servers(first=True, second=False)
    actors[1].await_line(f"switching to the replay server at {run.first}", SHORT_SECS)
    run.await_steps()

    second = run.start(SECOND)
    second.await_line("restoring the replay's checkpoint", START_SECS)
    run.await_servers(first=True, second=True)
    actors[1].await_line(f"switching to the replay server at {run.second}", SHORT_SECS)
    run.await_read(run.first, run.second)

    third = run.start(THIRD)
    third.await_line(f"joined the run at {run.first} as {run.third}", START_SECS)
    run.await_servers(first=True, second=True, third=True)
    actors[1].await_line(f"switching to the replay server at {run.third}", SHORT_SECS)
    run.await_read(run.first, run.third)

    learner.send(signal.SIGTERM)
    assert learner.wait(SHORT_SECS) == 143, learner.output
    before = run.status()
    learner = run.start(LEARNER)
    came_back = learner.await_line(r"(\d+) windows came back from the replay servers, (\d+) of them", START_SECS)
    eventually(lambda: run.status()["process"] == learner.pid and run.status()["phase"] == "training", SHORT_SECS)
    assert int(came_back[1]) > 0.95 * before["replay"]["held"]
    run.await_steps()
    run.await_read(run.first, run.third)
    eventually(lambda: is_ratio_kept(run.status()["replay"]), SHORT_SECS)
