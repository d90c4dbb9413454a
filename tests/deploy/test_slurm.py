"""launch/slurm.sbatch on a real Slurm cluster of three nodes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from actorlearner.runtime.tls.authority import make_certificates
from tests.deploy.infrastructure import CHECKOUT, Log, await_that, needed_program, run
from tests.documented_commands import documented

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]

BINDINGS = "train.num_iterations = {}; train.eval_interval = 10_000; learner.checkpoint_interval_secs = 5.0"
ENDLESS = BINDINGS.format(10_000_000)  # how fast are these nodes?
NO_VIDEOS = "--num_video_episodes=0"
RUNS = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
START_SECS = 420.0  # importing and tracing TensorFlow, on a busy machine


class Slurm:
    """One training on the cluster: the learner's job and its arrays of actors."""

    def __init__(self, cluster: str, folder: Path):
        self._cluster = cluster
        self._hosts = needed_program("LAB_HOSTS")
        self._folder = folder
        self._dead: list[str] = []
        self.root_dir = folder / "run"
        self.log = Log(folder / "learner.log")
        self.job = ""

    def ctl(self, *command: object, **environment: str) -> str:
        return run(self._cluster, "ctl", "timeout", "30", *command, environment=environment)

    def submit(self, sbatch: list[str], *, actor_options: str = "", **settings: str) -> str:
        """Returns the number of the job that a documented command submitted."""
        said = self.ctl(
            sbatch[0],
            f"--output={self._folder}/{'%x-%a' if '--array' in sbatch[1] else 'learner'}.log",
            *sbatch[1:],
            ACTORLEARNER=f"{sys.executable} -m actorlearner",
            PYTHONPATH=f"{CHECKOUT}/distributed:{CHECKOUT}/tests/e2e",
            ACTOR_OPTIONS=f"--output={self._folder}/%x-%a.log {actor_options}",
            **{"RUN_DIR": str(self.root_dir), **settings},
        )
        return re.search(r"\d+", said).group()

    def submit_training(self, **settings: str) -> None:
        """Submits dqn_cartpole with two collect actors, or with other settings."""
        command = "sbatch --export=ALL,EXPERIMENT=dqn_cartpole,COLLECT_ACTORS=8 launch/slurm.sbatch"
        actors = settings.pop("COLLECT_ACTORS", "2")
        experiment = settings.pop("EXPERIMENT", "dqn_cartpole")
        sbatch = documented(
            "Slurm", command, **{"dqn_cartpole": experiment, "COLLECT_ACTORS=8": f"COLLECT_ACTORS={actors}"}
        )
        self.job = self.submit(sbatch, **settings)

    def actor_log(self, role: str, task: int) -> Log:
        return Log(self._folder / f"actorlearner-{role}-{self.job}-{task}.log")

    def jobs(self, columns: str, *options: str) -> list[list[str]]:
        """Returns a row for each of this training's jobs and tasks in the queue."""
        names = [f"actorlearner-{role}-{self.job}" for role in ("collect-actor", "eval-actor")]
        said = self.ctl("squeue", "--noheader", "--array", f"--format=%j {columns}", *options)
        rows = [line.split() for line in said.splitlines()]
        return [row[1:] for row in rows if row[0] in names or row[1:2] == [self.job]]

    def actors(self, *options: str) -> dict[str, str]:
        """Returns the node of each actor that runs, by its number in the queue, such as 12_0."""
        rows = self.jobs("%i %N", "--states=RUNNING", *options)
        return {row[0]: row[1] for row in rows if row[0] != self.job}

    def state(self) -> str:
        return self.ctl("squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T").strip()

    def start_now(self, *jobs: str) -> None:
        """Spares requeued jobs the two minutes that Slurm would let them wait; to be asked again until they run.

        Slurm sets the time when all of a job's processes are gone, which may be after it is in the queue; and a node
        refuses for good what was requeued within the second in which it starts ("Job credential revoked").
        """
        for job in jobs:
            state, queued_at = self.ctl("squeue", "-h", f"-j{job}", "-o%T %V").split() or ("", "")
            if state == "PENDING" and (datetime.now() - datetime.fromisoformat(queued_at)).total_seconds() > 2:
                self.ctl(*documented("Slurm", "scontrol update JobId=123 StartTime=now", **{"123": job}))

    def await_life(self, number: int) -> None:
        """Returns when the requeued job runs again."""

        def has_begun() -> bool:
            self.start_now(self.job)
            return self.log.count(f"life {number}:") > 0

        def evidence() -> str:
            return self.log.read() + self.ctl("scontrol", "show", "job", self.job) + self.ctl("sinfo", "--list-reasons")

        await_that(has_begun, f"life {number} of the learner's job", 120, evidence, every_secs=1.0)

    def preempt(self) -> None:
        """Tells the batch script alone, as Slurm does with --signal before it takes the node away."""
        self.ctl("scancel", "--batch", "--signal=USR1", self.job)

    def kill_node(self, node: str) -> None:
        """Every process there is gone at once, Slurm's own too."""
        self._dead.append(node)
        run(self._hosts, "on", node, "sh", "-c", KILL_ALL_HERE)

    def go_on(self, **settings: str) -> None:
        """Submits a job for the run of the one that is gone."""
        command = documented(
            "Slurm",
            "sbatch --export=ALL,RUN_DIR=runs/slurm-123 launch/slurm.sbatch",
            **{"runs/slurm-123": str(self.root_dir)},
        )
        shared = {"EXPERIMENT": "dqn_cartpole", "COLLECT_ACTORS": "1", "LEARNER_FLAGS": NO_VIDEOS}
        self.job = self.submit(command, **shared, **settings)

    def cancel(self) -> None:
        self.ctl("scancel", self.job)
        for role in ("collect-actor", "eval-actor"):
            self.ctl("scancel", f"--name=actorlearner-{role}-{self.job}")

    def clear(self) -> None:
        if self.job:
            self.cancel()
        for node in self._dead:
            run(self._cluster, "start", node)
        if self.job:
            await_that(lambda: not self.jobs("%i %T"), "no job left in the queue", 90)


KILL_ALL_HERE = """
here=$(readlink /proc/self/ns/net)
for process in /proc/[0-9]*; do
  id=${process#/proc/}
  [ "$id" = $$ ] || [ "$(readlink "$process/ns/net")" != "$here" ] || kill -KILL "$id" || true
done
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster that was started for these tests."""
    program = needed_program("SLURM_CLUSTER")
    run(program, "down")
    run(program, "up", deadline_secs=600)
    try:
        yield program
    finally:
        for node in ("gpu1", "cpu1", "cpu2"):  # what a failed test's job left behind would go on for ever
            run(needed_program("LAB_HOSTS"), "on", node, "sh", "-c", KILL_ALL_HERE)
        run(program, "down")


@pytest.fixture
def slurm(cluster: str, tmp_path: Path) -> Iterator[Slurm]:
    training = Slurm(cluster, tmp_path)
    try:
        yield training
    finally:
        training.clear()


def test_training_outlives_an_actors_node_a_preemption_and_a_requeue_and_ends_by_itself(slurm: Slurm):
    """A lost actor's node must not end the learner, and what was learned must not go with a preemption."""
    slurm.submit_training(
        GIN_BINDINGS=ENDLESS,
        LEARNER_FLAGS=NO_VIDEOS,
        actor_options="--mem=3900M",  # two fit on a node: the collect actors on one, the eval actor on the other
    )

    # Preempted before there is anything to save, and while the actors are still being submitted.
    await_that(lambda: slurm.log.count("life 1:"), "the first life", START_SECS, every_secs=0.02)
    slurm.preempt()
    slurm.log.await_text("going back into the queue", START_SECS)
    slurm.await_life(2)
    slurm.log.await_text("is saved: learner and replay", START_SECS)
    await_that(lambda: len(slurm.actors()) == 3, "two collect actors and one eval actor", 60)
    assert slurm.jobs("%i %N").count([slurm.job, "gpu1"]) == 1
    assert {*slurm.actors().values()} == {"cpu1", "cpu2"}, "three nodes are at work"

    # The node of the collect actors dies: Slurm starts them elsewhere; the learner and its server notice nothing.
    nodes = list(slurm.actors().values())
    (node,) = [name for name in ("cpu1", "cpu2") if nodes.count(name) == 2]
    lost = [actor for actor, its_node in slurm.actors().items() if its_node == node]
    lives = slurm.log.count("is process")
    slurm.kill_node(node)

    def is_one_back() -> bool:
        slurm.start_now(*lost)
        return any(slurm.actors().get(actor, node) != node for actor in lost)

    await_that(is_one_back, f"a lost actor on another node than {node}", 120, every_secs=1.0)
    assert node not in slurm.actors().values(), "it is known to be gone"
    saved = slurm.log.count("is saved: learner and replay")
    logs = [slurm.actor_log("collect-actor", task) for task in (0, 1)]
    await_that(
        lambda: any(log.count("warm-up is over") == 2 for log in logs), "a lost actor at work again", START_SECS
    )
    slurm.log.await_text("is saved: learner and replay", START_SECS, count=saved + 2)
    assert slurm.log.count("is process") == lives, "no role of the learner's job was started again"

    # An actor's time is up.
    actor = next(iter(slurm.actors()))
    slurm.ctl("scancel", "--batch", "--signal=USR1", actor)
    logs.append(slurm.actor_log("eval-actor", 0))
    await_that(lambda: any(log.count("SIGUSR1: going back into the queue") for log in logs), "the actor's requeue", 60)

    # It may have to wait: the node that is left holds two of the three.
    await_that(lambda: [actor, "PENDING"] in slurm.jobs("%i %T"), f"{actor} in the queue", 60)

    # Preempted in the middle.
    slurm.preempt()
    slurm.log.await_text("going back into the queue", 60, count=2)
    slurm.await_life(3)
    slurm.log.await_text("restored", START_SECS)

    # Requeued by hand: every process of the job gets SIGTERM.
    saved = slurm.log.count("is saved: learner and replay")
    slurm.log.await_text("is saved: learner and replay", START_SECS, count=saved + 1)
    slurm.ctl("scontrol", "requeue", slurm.job)
    slurm.await_life(4)
    slurm.log.await_text("restored", START_SECS, count=2)

    steps = [int(step) for step in re.findall(r"restored \S+-(\d+)", slurm.log.read())]
    assert 0 < steps[0] < steps[1], "each life goes on where the one before it saved"

    # Cancelled; another job goes on with the run, to its end.
    slurm.cancel()
    await_that(lambda: not slurm.jobs("%i %T"), "no job left in the queue", 90)
    end = steps[1] // 1_000 * 1_000 + 20_000
    slurm.go_on(GIN_BINDINGS=BINDINGS.format(end))
    await_that(lambda: slurm.state() not in RUNS, "the end of training", 400, slurm.log.read)
    assert slurm.state() == "COMPLETED"
    summary = json.loads((slurm.root_dir / "summary.json").read_text())
    assert summary["has_ended"] and summary["train_steps"] == end
    await_that(lambda: not slurm.jobs("%i %T"), "the actors to end by themselves", 60)

    # Submitted again, when there is nothing left to do: every role comes up, hears so, and ends.
    slurm.go_on(GIN_BINDINGS=BINDINGS.format(end))
    await_that(lambda: slurm.state() == "COMPLETED", "the end of a run that had ended", START_SECS, slurm.log.read)
    assert slurm.log.count(f"this run has ended at train step {end}") == 1
    await_that(lambda: not slurm.jobs("%i %T"), "the actors to end by themselves", START_SECS)


def test_a_job_that_cannot_go_on_says_why_and_takes_its_actors_along(slurm: Slurm):
    """Actors that wait for a dead learner hold nodes that others pay for."""
    slurm.submit_training(COLLECT_ACTORS="1", GIN_BINDINGS="train.no_such_setting = 1")
    await_that(lambda: slurm.state() == "FAILED", "the job's failure", START_SECS, slurm.log.read)
    assert "train.no_such_setting" in slurm.log.read()
    assert "the job cannot go on (exit code 64)" in slurm.log.read()
    await_that(lambda: not slurm.jobs("%i %T"), "the actors' end", 60)


def test_a_learner_whose_actors_ended_for_good_ends_with_their_reason_told_through_tls(slurm: Slurm, tmp_path: Path):
    """A learner that starves would be started again for ever, and hold a GPU; the reason lies in another host's log."""
    make_certificates(tmp_path / "certs", ["gpu1"])
    settings = {"TLS_DIR": str(tmp_path / "certs"), "GIN_BINDINGS": "train.eval_interval = 0"}
    experiment = tmp_path / "nan.gin"
    experiment.write_text(
        "import nan_cartpole\ninclude 'dqn_cartpole.gin'\ngym_environment.env_name = 'NanCartPole-v0'\n"
    )
    slurm.submit_training(EXPERIMENT=str(experiment), COLLECT_ACTORS="0", EVAL_ACTORS="0", **settings)
    command = "sbatch --array=8-15 --export=ALL,LEARNER_JOB=123,EXPERIMENT=dqn_cartpole launch/slurm_actors.sbatch"
    changes = {"8-15": "0", "123": slurm.job, "dqn_cartpole": str(experiment)}
    actors = slurm.submit(documented("Slurm", command, **changes), **settings)
    await_that(lambda: slurm.state() == "FAILED", "the job's failure", START_SECS, slurm.log.read)
    assert "no actor is left to wait for: collect-actor 0 failed for good (exit code 65)" in slurm.log.read()
    assert "observation[2] = nan" in slurm.log.read()
    assert slurm.log.count("learner is process") == 1
    assert slurm.log.count("requires a certificate of the CA in") == 1
    assert "the job cannot go on (exit code 65)" in slurm.log.read()
    await_that(lambda: not slurm.ctl("squeue", "-h", f"-j{actors}"), "the actor's end", 60)
