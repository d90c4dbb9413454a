"""launch/slurm.sbatch on a real Slurm cluster of three nodes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.infrastructure import CHECKOUT, Log, await_that, needed_program, run

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]

START_SECS = 420.0  # importing and tracing TensorFlow, on a busy machine


class Slurm:
    """One training on the cluster: the learner's job and its arrays of actors."""

    def __init__(self, folder: Path):
        self._cluster = needed_program("SLURM_CLUSTER")
        self._hosts = needed_program("LAB_HOSTS")
        self._folder = folder
        self._cut: list[str] = []
        self.root_dir = folder / "run"
        self.job = ""

    def ctl(self, *command: object, **environment: str) -> str:
        return run(self._cluster, "ctl", "timeout", "30", *command, environment=environment)

    def submit(self, **settings: str) -> None:
        said = self.ctl(
            "sbatch",
            f"--output={self._folder}/learner.log",
            "launch/slurm.sbatch",
            ACTORLEARNER=f"{sys.executable} -m actorlearner",
            PYTHONPATH=str(CHECKOUT / "distributed"),
            RUN_DIR=str(self.root_dir),
            ACTOR_OPTIONS=f"--output={self._folder}/%x-%a.log",
            **settings,
        )
        self.job = re.search(r"\d+", said).group()
        self.log = Log(self._folder / "learner.log")

    def actor_log(self, role: str, task: int) -> Log:
        return Log(self._folder / f"actorlearner-{role}-{self.job}-{task}.log")

    def jobs(self, columns: str, *options: str) -> list[list[str]]:
        """Returns a row for each of this training's jobs and tasks in the queue."""
        names = [f"actorlearner-{role}-{self.job}" for role in ("collect-actor", "eval-actor")]
        said = self.ctl("squeue", "--noheader", "--array", f"--format=%j {columns}", *options)
        rows = [line.split() for line in said.splitlines()]
        return [row[1:] for row in rows if row[0] in names or row[1:2] == [self.job]]

    def state(self) -> str:
        return self.ctl("squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T").strip()

    def start_now(self, job: str) -> None:
        """Spares a requeued job the two minutes that Slurm would let it wait."""
        await_that(lambda: "PENDING" in self.ctl("squeue", "-h", f"-j{job}", "-o%T"), f"job {job} in the queue", 60)
        self.ctl("scontrol", "update", f"JobId={job}", "StartTime=now")

    def cut(self, node: str) -> None:
        self._cut.append(node)
        run(self._hosts, "cut", node)

    def clear(self) -> None:
        for node in self._cut:
            run(self._hosts, "join", node)
        if self.job:
            self.ctl("scancel", self.job)
            for role in ("collect-actor", "eval-actor"):
                self.ctl("scancel", f"--name=actorlearner-{role}-{self.job}")
            await_that(lambda: not self.jobs("%i %T"), "no job left in the queue", 60)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path)
    try:
        yield cluster
    finally:
        cluster.clear()


def test_training_outlives_an_actors_node_a_preemption_and_a_requeue_and_ends_by_itself(slurm: Slurm):
    """A lost actor's node must not end the learner, and what was learned must not go with a preemption."""
    slurm.submit(
        EXPERIMENT="dqn_cartpole",
        COLLECT_ACTORS="2",
        GIN_BINDINGS="train.num_iterations = 20_000; train.eval_interval = 10_000; "
        "learner.checkpoint_interval_secs = 5.0",
        LEARNER_FLAGS="--num_video_episodes=0",
    )
    slurm.log.await_text("is saved: learner and replay", START_SECS)

    # The node of the actors is gone: Slurm gives them another one; the learner and its server notice nothing.
    (node,) = {node for job, node in slurm.jobs("%i %N") if job != slurm.job}
    slurm.cut(node)
    actors = {job for job, _ in slurm.jobs("%i %N") if job != slurm.job}
    assert len(actors) == 3  # two collect actors, one eval actor
    for actor in actors:
        slurm.start_now(actor)
    await_that(
        lambda: [n for j, s, n in slurm.jobs("%i %T %N", "--states=RUNNING") if j in actors and n != node] != [],
        f"actors on another node than {node}",
        60,
    )
    for task in (0, 1):
        slurm.actor_log("collect-actor", task).await_text("is process", START_SECS, count=2)
    saved = slurm.log.count("is saved: learner and replay")
    slurm.log.await_text("is saved: learner and replay", START_SECS, count=saved + 2)
    assert slurm.log.count("learner is process") == slurm.log.count("replay-server is process") == 1

    # Preempted, as Slurm does it with --signal: the batch script alone is told.
    slurm.ctl("scancel", "--batch", "--signal=USR1", slurm.job)
    slurm.log.await_text("saved; going back into the queue", 30)
    slurm.start_now(slurm.job)
    slurm.log.await_text("life 2", 60)
    slurm.log.await_text("restored", START_SECS)

    # Requeued by hand: every process of the job gets SIGTERM.
    saved = slurm.log.count("is saved: learner and replay")
    slurm.log.await_text("is saved: learner and replay", START_SECS, count=saved + 1)
    slurm.ctl("scontrol", "requeue", slurm.job)
    slurm.start_now(slurm.job)
    slurm.log.await_text("life 3", 60)
    slurm.log.await_text("restored", START_SECS, count=2)

    await_that(lambda: slurm.state() not in ("RUNNING", "COMPLETING"), "the end of training", 400, slurm.log.read)
    assert slurm.state() == "COMPLETED"
    summary = json.loads((slurm.root_dir / "summary.json").read_text())
    assert summary["has_ended"] and summary["train_steps"] == 20_000
    await_that(lambda: not slurm.jobs("%i %T"), "the actors to end by themselves", 60)
    steps = [int(step) for step in re.findall(r"restored \S+-(\d+)", slurm.log.read())]
    assert 0 < steps[0] < steps[1], "each life goes on where the one before it saved"


def test_a_job_that_cannot_go_on_says_why_and_takes_its_actors_along(slurm: Slurm):
    """Actors that wait for a dead learner hold nodes that others pay for."""
    slurm.submit(EXPERIMENT="dqn_cartpole", COLLECT_ACTORS="1", GIN_BINDINGS="train.no_such_setting = 1")
    await_that(lambda: slurm.state() == "FAILED", "the job's failure", START_SECS, slurm.log.read)
    assert "train.no_such_setting" in slurm.log.read()
    assert "the job cannot go on (exit code 64)" in slurm.log.read()
    await_that(lambda: not slurm.jobs("%i %T"), "the actors' end", 60)
