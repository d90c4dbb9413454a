"""docker/compose.yaml on a real Docker engine: `tests/run.sh deploy`, as root, as processes are killed from the host.

One run is trained throughout: it is scaled, each container's process is killed, one is frozen, all are taken down, and
then it goes on to its end.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.compose_stack import BUILD_SECS, END_SECS, RECOVERY_SECS, START_SECS, Stack, docker
from tests.deploy.infrastructure import await_that, needed_engine
from tests.documented_commands import documented

RUNNING_ROLES = ("replay-server", "learner", "collect-actor", "eval-actor")
FULL = 92_000  # train steps of dqn_cartpole

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A run without an end; two collect actors."""
    needed_engine()
    stack = Stack(
        tmp_path_factory.mktemp("stack"),
        f"actorlearner-test-{os.getpid()}",
        VIDEO_EPISODES="1",
        SEED="1",
        GIN_BINDINGS="train.num_iterations = 1_000_000; learner.checkpoint_interval_secs = 5.0",
    )
    try:
        stack.start_up()
        await_that(lambda: stack.is_healthy("collect-actor", 2), "two healthy collect actors", BUILD_SECS)
        await_that(lambda: stack.train_step() > 0, "the first train steps", START_SECS)
        yield stack
    finally:
        stack.close()


def test_everything_gets_healthy(stack: Stack):
    for service in (*RUNNING_ROLES[:2], "eval-actor", "tensorboard"):
        await_that(functools.partial(stack.is_healthy, service), f"a healthy {service}", START_SECS)


def test_tensorboard_answers_on_its_published_port(stack: Stack):
    with urllib.request.urlopen(f"http://127.0.0.1:{stack.tensorboard_port}/", timeout=30) as answer:
        assert answer.status == 200


ADDRESSES = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 8008), timeout=5)
except OSError as error:
    sys.exit(f"no: {error}")
print("reached")
"""


def test_reverb_is_reached_by_roles_and_by_no_other_container(stack: Stack):
    """Reverb has no authentication: any client that reaches it can read, fill and empty the replay."""
    (server,) = stack.containers("replay-server")
    addresses = docker("inspect", "--format", ADDRESSES, server).split()
    assert len(addresses) == 1
    (learner,) = stack.containers("learner")
    assert docker("exec", learner, "python", "-c", CONNECT, addresses[0]) == "reached"
    stranger = ["docker", "run", "--rm", "--network", "bridge", "--entrypoint", "python", "actorlearner:cpu"]
    ended = subprocess.run([*stranger, "-c", CONNECT, addresses[0]], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("no: ")
    assert docker("port", server) == ""


def test_files_of_the_run_belong_to_the_roles_user(stack: Stack):
    assert {path.stat().st_uid for path in [stack.run_dir, *stack.run_dir.iterdir()]} == {1000}


def test_collect_actors_are_added_to_a_running_system(stack: Stack):
    """Each takes a task number, seeds and a folder of its own."""
    before = stack.containers("collect-actor")
    command = documented(
        "Docker",
        "docker compose -f docker/compose.yaml up --detach --no-deps --no-recreate "
        "--scale collect-actor=8 collect-actor",
        **{"collect-actor=8": "collect-actor=4"},
    )
    stack.run(*command)
    await_that(lambda: stack.is_healthy("collect-actor", 4), "four healthy collect actors", START_SECS)
    assert set(before) < set(stack.containers("collect-actor"))
    folders = stack.run_dir / "collect"
    await_that(lambda: {path.name for path in folders.iterdir()} == {"0", "1", "2", "3"}, "four folders", 60)


def _started_at(container: str) -> str:
    return docker("inspect", "--format", "{{.State.StartedAt}}", container)


def _has_started_since(before: str, container: str) -> bool:
    return _started_at(container) != before


def test_containers_whose_processes_are_killed_come_back_and_training_goes_on(stack: Stack):
    """One of each, the next as soon as the engine has started the one before again."""
    services = (*RUNNING_ROLES, "tensorboard")
    numbers = {service: len(stack.containers(service)) for service in services}
    for service in services:
        container = stack.containers(service)[0]
        before = _started_at(container)
        os.kill(int(docker("inspect", "--format", "{{.State.Pid}}", container)), signal.SIGKILL)
        await_that(
            functools.partial(_has_started_since, before, container),
            f"the engine to start {service} again",
            60,
        )
    for service, number in numbers.items():
        await_that(
            functools.partial(stack.is_healthy, service, number), f"{service} to be healthy again", RECOVERY_SECS
        )
    step = stack.train_step()
    await_that(lambda: stack.train_step() > step, "training to go on after the deaths", RECOVERY_SECS)


def test_a_frozen_role_becomes_unhealthy_and_healthy_again(stack: Stack):
    """A check that only asks whether there is a process would call it well."""
    (container,) = stack.containers("eval-actor")
    init = int(docker("inspect", "--format", "{{.State.Pid}}", container))
    (role,) = map(int, Path(f"/proc/{init}/task/{init}/children").read_text().split())
    os.kill(role, signal.SIGSTOP)
    try:
        await_that(lambda: stack.health("eval-actor") == ["unhealthy"], "the check to notice", RECOVERY_SECS)
    finally:
        os.kill(role, signal.SIGCONT)
    await_that(lambda: stack.is_healthy("eval-actor"), "the check to see it thawed", RECOVERY_SECS)


def test_after_down_and_up_the_run_goes_on_to_its_end_and_everything_stops(stack: Stack):
    """`down` removes every container; what a run is lies in its directory. It ends with CartPole held for 40 s."""
    stack.run(*documented("Docker", "docker compose -f docker/compose.yaml down"), timeout=180)
    stack.await_up(60)
    reached = stack.train_step()
    assert reached > 0
    assert list((stack.run_dir / "checkpoints" / "replay").iterdir())
    end = max(FULL, (reached // 4_000 + 1) * 4_000)
    stack.settings["GIN_BINDINGS"] = stack.settings["GIN_BINDINGS"].replace("1_000_000", str(end))
    num_points = len((stack.run_dir / "metrics.jsonl").read_text().splitlines())

    stack.start_up(*documented("Docker", "docker compose -f docker/compose.yaml up"))
    assert stack.await_up(END_SECS) == 0
    assert stack.compose("ps", "--quiet") == ""
    summary = json.loads((stack.run_dir / "summary.json").read_text())
    assert summary["has_ended"] and summary["train_steps"] == end
    points = [json.loads(line) for line in (stack.run_dir / "metrics.jsonl").read_text().splitlines()[num_points:]]
    assert min(point["train_step"] for point in points if point["kind"] == "train") > reached - 2_000
    assert "delivered: the policy of train step" in stack.output
    assert (stack.run_dir / "videos" / "trained_policy.mp4").is_file()
    assert summary["delivered"]["num_episodes"] == 20
    assert summary["delivered"]["min_episode_length"] > 2_000, "40 s at 50 steps a second, in every episode"


def test_a_run_that_has_ended_says_so_when_started_again_and_stops(stack: Stack):
    """A replay server that never hears of the end would keep the stack up for ever."""
    stack.settings["VIDEO_EPISODES"] = "0"
    stack.run(*documented("Docker", "docker compose -f docker/compose.yaml up --detach tensorboard"), timeout=300)
    await_that(lambda: stack.compose("ps", "--quiet") == "", "every container's own end", START_SECS)
    follow = documented("Docker", "docker compose -f docker/compose.yaml logs --follow learner")
    assert "this run has ended at train step" in stack.run(*follow)
