"""Roles started by hand, as on several machines: no launcher, no shared path, the server last."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from actorlearner.runtime.ports import find_free_port
from tests.e2e.processes import RUN_SECS, TINY, Process, Processes, bind

NAMES = ("eval-actor-0", "collect-actor-0", "learner-0", "collect-actor-1", "eval-actor-1", "replay-server-0")


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Process], dict[str, int]]]:
    """The folder, every role's process, and how each ended."""
    folder = tmp_path_factory.mktemp("machines")
    address = f"localhost:{find_free_port()}"
    with Processes(folder) as processes:
        started: dict[str, Process] = {}
        for name in NAMES:
            kind, _, task = name.rpartition("-")
            machine = folder / name
            machine.mkdir()
            command = [kind, "dqn_cartpole", f"--replay_address={address}", f"--task={task}", f"--root_dir=run-{name}"]
            if kind == "learner":
                command.append("--num_video_episodes=0")
            if kind == "replay-server":
                # The others have long been knocking when the server comes.
                started["learner-0"].await_line("batch size")
            # The learner's last words and every actor's next look must fall within the server's lingering.
            bindings = [*TINY, "replay_server.linger_secs = 8.0"]
            started[name] = processes.start(*command, *bind(*bindings), cwd=machine)
        yield folder, started, {name: process.wait(RUN_SECS) for name, process in started.items()}


def test_every_role_ends_by_itself_with_0(roles):
    """With the stock example actors never notice that training is over, and the eval job never ends."""
    _, started, exit_codes = roles
    assert exit_codes == dict.fromkeys(NAMES, 0), "\n".join(
        f"== {name}\n{process.output}" for name, process in started.items() if exit_codes[name]
    )


def test_training_reaches_its_end(roles):
    """A server that comes last must not leave anybody waiting for an answer to a question asked before."""
    folder, _, _ = roles
    summary = json.loads((folder / "learner-0" / "run-learner-0" / "summary.json").read_text())
    assert summary["train_steps"] == 200
    assert summary["delivered"]["num_episodes"] == 3


def test_two_eval_actors_evaluate_every_due_snapshot_exactly_once(roles):
    """Two eval actors that poll a shared policy evaluate some snapshots twice and others never."""
    folder, started, _ = roles
    times_evaluated = collections.Counter(
        int(step)
        for name in ("eval-actor-0", "eval-actor-1")
        for step in re.findall(r"train step (\d+): average return", started[name].output)
    )
    summary = json.loads((folder / "learner-0" / "run-learner-0" / "summary.json").read_text())
    assert [evaluation["train_step"] for evaluation in summary["evaluations"]] == [0, 100, 200]
    times_evaluated[summary["delivered"]["train_step"]] -= 1  # once more, for the delivered policy
    assert times_evaluated == {0: 1, 100: 1, 200: 1}


def test_both_collect_actors_collect_and_the_learner_counts_them_all(roles):
    """A second actor that overwrites the first one's count makes the curve's environment steps wrong."""
    folder, started, _ = roles
    collected = [
        int(started[name].await_line(r"collected (\d+) steps").group(1))
        for name in ("collect-actor-0", "collect-actor-1")
    ]
    summary = json.loads((folder / "learner-0" / "run-learner-0" / "summary.json").read_text())
    assert min(collected) > 0
    # The learner writes its summary when the evaluations are there, maybe before an actor's last word.
    assert 0.9 * sum(collected) <= summary["environment_steps"] <= sum(collected)


def test_each_role_writes_below_its_own_root_dir_only(roles):
    """A role that needs the learner's directory would not run on another machine."""
    folder, _, _ = roles
    written = {name: {path.name for path in (folder / name).iterdir()} for name in NAMES}
    for name in NAMES:
        assert written[name] <= {f"run-{name}"}, name
    assert (folder / "collect-actor-1" / "run-collect-actor-1" / "collect" / "1").is_dir()


def test_a_run_that_has_ended_ends_again_though_its_replay_server_comes_last(roles, processes):
    """A learner that announces the end once, before anyone listens, leaves its replay server behind for ever."""
    folder, _, _ = roles
    address = f"localhost:{find_free_port()}"
    learner = processes.start(
        "learner", "dqn_cartpole", f"--replay_address={address}", "--num_video_episodes=0", *bind(*TINY),
        f"--root_dir={folder / 'learner-0' / 'run-learner-0'}",
    )  # fmt: skip
    learner.await_line("this run has ended at train step 200")
    port = address.partition(":")[2]
    server = processes.start("replay-server", "dqn_cartpole", f"--port={port}", *bind(*TINY))
    assert server.wait(RUN_SECS) == 0, server.output
    assert learner.wait(RUN_SECS) == 0, learner.output
    assert "no role is left to announce the end to" not in learner.output
