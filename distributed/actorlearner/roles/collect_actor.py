"""Collect actor: steps its environments and writes what it sees to replay.

variable container --weights--> [collect actor] --trajectories--> replay
"""

from __future__ import annotations

import collections
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gin
import numpy as np
from tf_agents.trajectories import StepType, trajectory
from tf_agents.trajectories import time_step as ts

from actorlearner import variable_container
from actorlearner.agents.policies import Policies
from actorlearner.cluster import Cluster
from actorlearner.environments.checks import UnfitData
from actorlearner.experiment import Experiment
from actorlearner.replay.base import RANDOM_POLICY, Sampling
from actorlearner.replay.pace import ActorsTurn
from actorlearner.replay.servers import ReplayServers, refuse_several
from actorlearner.replay.tables import describe_tables
from actorlearner.reports import CollectReport, NewestReport
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.configuration import PositiveFloat
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, RoleError, Stop, wait_until
from actorlearner.runtime.messages import Unreachable
from actorlearner.runtime.telemetry import Events, Rate
from actorlearner.variable_container import Phase, Subscriber


@gin.configurable("collect_actor", module="actorlearner", denylist=["experiment", "cluster", "root_dir", "stop"])
def run_collect_actor(
    experiment: Experiment,
    cluster: Cluster,
    root_dir: Path,
    stop: Stop,
    *,
    refresh_interval_secs: PositiveFloat = 1.0,
    report_interval_secs: PositiveFloat = 2.0,
    events_interval_secs: PositiveFloat = 20.0,
) -> ExitCode:
    """Collects experience until training needs no more or `stop` is set.

    Args:
      experiment: What to run; read only.
      cluster: Where the replay server and the variable container listen.
      root_dir: Where TensorBoard's events go, under collect/.
      stop: Set on SIGTERM; looked at between steps.
      refresh_interval_secs: Time between two looks for newer weights, in seconds.
      report_interval_secs: Time between two reports to the learner, in seconds.
      events_interval_secs: Time between two points in TensorBoard, in seconds.

    Raises:
      RoleError: A peer is unreachable past the deadline (UNAVAILABLE), the server's tables are those of another
        experiment (DATA), or `root_dir` cannot be written (CANNOT_CREATE).
    """
    refuse_several(experiment.replay, cluster.replay_addresses)
    experiment.pace.check_actor(cluster.task)
    experiment.seed_process("collect-actor", cluster.task)
    events_folder = RunDirectory(root_dir).make_collect_events(cluster.task)
    life = len(list(events_folder.glob("events*")))  # 0 for the first process of this task, as its files tell
    events = Events(events_folder)
    policies = experiment.policies()
    agent, train_step, variables = policies.agent, policies.train_step, policies.variables
    servers = ReplayServers(cluster.replay_addresses, cluster.task)
    signatures = experiment.replay.table_signatures(agent.collect_data_spec)
    servers.await_tables(signatures, stop=stop, deadline_secs=cluster.peer_patience_secs)
    variable_container.await_container(
        cluster.variables_address, variables, stop=stop, deadline_secs=cluster.peer_patience_secs
    )
    servers.watch(cluster.variables_address)
    weights = Subscriber(cluster.variables_address, variables, refresh_interval_secs=refresh_interval_secs)
    wait_until(  # a restarted actor must know that training is under way, or it acts at random
        weights.has_looked,
        lambda: f"the variable container at {cluster.variables_address} to say how far training is",
        stop=stop,
        deadline_secs=cluster.peer_patience_secs,
        setting="--peer_patience_secs",
        every_secs=0.05,
    )
    if life or weights.num_chunks():
        experiment.pace.note_restart("a run whose actor was restarted")
    sampling = experiment.sampling(agent)
    collector = Collector(experiment, cluster, servers, tuple(signatures), sampling, life)
    turn = experiment.pace.make_actors_turn(collector.sink, weights, cluster.peer_patience_secs)
    progress = Progress(cluster, NewestReport(cluster.variables_address), events)
    acting: Any = policies.make_random(
        sampling.num_environments, experiment.derive_seed("collect-actor", cluster.task, "random-actions")
    )
    acted_at, version = RANDOM_POLICY, -1
    warming_up = True

    while not stop.is_set() and weights.phase() <= Phase.TRAINING:
        if warming_up and turn.may_change and collector.is_quota_filled(weights.phase()):
            acting = _await_trained_policy(experiment, cluster, policies, weights, stop)
            if acting is None:
                break
            warming_up = False
            logging.info("the replay is warm: acting with the collect policy from here on")
        snapshot = weights.latest()
        if not warming_up and turn.may_change and snapshot is not None and snapshot.version != version:
            snapshot.assign_to(variables)
            train_step.assign(np.int64(snapshot.train_step))  # of each int of Python TensorFlow keeps a tensor for ever
            version, acted_at = snapshot.version, snapshot.train_step
        collector.step(acting, acted_at)
        collector.await_server(weights, stop)
        collector.await_answer(turn, stop)
        if progress.is_due(report_interval_secs):
            progress.report(collector, int(train_step), events_interval_secs)

    progress.report(collector, int(train_step), events_interval_secs=0.0)
    progress.await_sent(timeout_secs=5.0)
    collector.close()
    weights.close()
    servers.close()
    logging.info("collected %d steps in %d episodes", collector.environment_steps, collector.episodes)
    return stop.exit_code if stop.is_set() else ExitCode.DONE


def _await_trained_policy(
    experiment: Experiment, cluster: Cluster, policies: Policies, weights: Subscriber, stop: Stop
) -> Any:
    """Returns the compiled collect policy once there are weights for it; None when training ended meanwhile."""
    acting = policies.make_collecting(experiment.schedule.num_environments)
    wait_until(
        lambda: weights.latest() is not None or weights.phase() > Phase.TRAINING,
        lambda: f"the learner's first weights at {cluster.variables_address}",
        stop=stop,
        deadline_secs=cluster.peer_patience_secs,
        setting="--peer_patience_secs",
    )
    return acting if weights.phase() <= Phase.TRAINING else None


class Collector:
    """Steps a batch of environments and hands what they do to replay."""

    def __init__(
        self,
        experiment: Experiment,
        cluster: Cluster,
        servers: ReplayServers,
        tables: tuple[str, ...],
        sampling: Sampling,
        life: int,
    ):
        num_environments = sampling.num_environments
        self._cluster = cluster
        self._servers = servers
        self._tables = tables
        self._replay = experiment.replay
        self._quota = sampling.initial_collect_steps
        self._secs_between_looks = sampling.pace.least_secs_between_looks
        # A restarted actor must not repeat the episodes of the process before it.
        self._environments = experiment.make_environments(num_environments, "collect-actor", cluster.task, life)
        self.sink = experiment.replay.make_sink(servers, sampling)
        self.environment_steps = self.episodes = 0
        with self._refusing_unfit_data():
            self._time_step = self._environments.reset()
        self._returns = np.zeros(num_environments)
        self._asked_at = 0.0
        self.recent_returns: collections.deque[float] = collections.deque(maxlen=20)
        self.blocked_secs = 0.0
        self.began_at = time.monotonic()

    @property
    def environment_crashes(self) -> int:
        return self._environments.num_crashes

    def is_quota_filled(self, phase: Phase) -> bool:
        """Returns whether the replay as a whole holds `initial_collect_steps`; asks at most five times a second."""
        if not self._quota:
            return True
        if time.monotonic() - self._asked_at < self._secs_between_looks:
            return False
        self._asked_at = time.monotonic()
        try:
            is_warm = self._replay.is_warm(self._servers, self._quota)
        except Unreachable:
            return False
        return phase >= Phase.TRAINING if is_warm is None else is_warm

    def step(self, acting: Any, acted_at: int) -> None:
        """Acts once in every environment and hands what came of it to the sink.

        Raises:
          RoleError: A reward or an observation is not finite, or not what its space says (DATA).
        """
        policy_step = acting.act(self._time_step)
        before = self._time_step
        with self._refusing_unfit_data():
            after = self._environments.step(policy_step.action)
        crashed = self._environments.crashed
        self.sink.append(
            trajectory.Trajectory(
                step_type=before.step_type,
                observation=before.observation,
                action=policy_step.action,
                policy_info=policy_step.info,
                next_step_type=after.step_type,
                reward=after.reward,
                discount=after.discount,
            ),
            acted_at,
            crashed,
        )
        self._time_step = after
        self._count(before.step_type, after, crashed)

    @contextlib.contextmanager
    def _refusing_unfit_data(self) -> Iterator[None]:
        try:
            yield
        except UnfitData as error:
            raise RoleError(
                f"after {self.environment_steps:,} environment steps {error}: nothing of it was sent, and the last "
                "good checkpoint is kept. Mend the environment, then start again with the same --root_dir.",
                ExitCode.DATA,
            ) from error

    def _count(self, step_type: np.ndarray, after: ts.TimeStep, crashed: np.ndarray) -> None:
        acted = (step_type != StepType.LAST) & ~crashed  # after a last step comes a reset, no step of the environment
        self.environment_steps += int(np.count_nonzero(acted))
        self._returns[crashed] = 0.0
        self._returns += np.where(acted, after.reward, 0.0)
        for index in np.flatnonzero(acted & (after.step_type == StepType.LAST)):
            self.episodes += 1
            self.recent_returns.append(float(self._returns[index]))
            self._returns[index] = 0.0

    def await_server(self, weights: Subscriber, stop: Stop) -> None:
        """Returns when the server has taken enough, or nothing more is wanted.

        Raises:
          RoleError: The server refused an item (DATA), or neither it nor the learner gave a sign of life for
            `--peer_patience_secs` (UNAVAILABLE).
        """
        start = said = time.monotonic()
        while self._is_blocked() and not stop.is_set() and weights.phase() <= Phase.TRAINING:
            beat()
            now = time.monotonic()
            silent = min(now - start, weights.learner_silent_secs())
            if silent > self._cluster.peer_patience_secs:
                raise RoleError(
                    f"the replay server at {self._cluster.replay_address} has taken nothing for "
                    f"{now - start:.0f} s and the learner has been silent for {silent:.0f} s, longer than "
                    f"--peer_patience_secs = {self._cluster.peer_patience_secs:g}. Start what is missing, or raise it.",
                    ExitCode.UNAVAILABLE,
                )
            if now - said > SAY_EVERY_SECS:
                said = now
                logging.info(
                    "waiting %.0f s for the replay at %s to take more: the learner has to catch up, or is away (%s)",
                    now - start,
                    self._servers.mine(),
                    describe_tables(self._servers.mine(), self._tables),
                )
        self.blocked_secs += time.monotonic() - start

    def await_answer(self, turn: ActorsTurn, stop: Stop) -> None:
        """Returns when the next step may be made. See `ActorsTurn.await_answer`."""
        start = time.monotonic()
        turn.await_answer(stop)
        self.blocked_secs += time.monotonic() - start

    def _is_blocked(self) -> bool:
        try:
            return self.sink.is_blocked()
        except RuntimeError as error:
            raise RoleError(
                f"the replay server at {self._cluster.replay_address} refused a trajectory: {error}", ExitCode.DATA
            ) from error

    def close(self) -> None:
        self.sink.close(timeout_secs=0.5)
        self._environments.close()


class Progress:
    """Tells the learner and TensorBoard how collecting goes."""

    def __init__(self, cluster: Cluster, reporter: NewestReport, events: Events):
        self._actor = secrets.randbits(62)
        self._task = cluster.task
        self._reporter = reporter
        self._events = events
        self._rate = Rate()
        self._reported_at = self._shown_at = time.monotonic()

    def is_due(self, interval_secs: float) -> bool:
        return time.monotonic() - self._reported_at >= interval_secs

    def await_sent(self, timeout_secs: float) -> None:
        """Returns when the learner's queue has the last report, or after `timeout_secs` seconds."""
        self._reporter.await_sent(timeout_secs)

    def report(self, collector: Collector, train_step: int, events_interval_secs: float) -> None:
        """Hands the counts so far to the thread that sends them."""
        self._reported_at = time.monotonic()
        rate = self._rate.update(collector.environment_steps)
        average_return = float(np.mean(collector.recent_returns)) if collector.recent_returns else float("nan")
        self._reporter.put(
            CollectReport(
                actor=self._actor,
                task=self._task,
                environment_steps=collector.environment_steps,
                episodes=collector.episodes,
                environment_crashes=collector.environment_crashes,
                average_return=average_return,
                blocked_secs=collector.blocked_secs,
                wall_secs=time.monotonic() - collector.began_at,
            )
        )
        if self._reported_at - self._shown_at >= events_interval_secs:
            self._shown_at = self._reported_at
            scalars = {
                "EnvironmentSteps": collector.environment_steps,
                "EnvironmentStepsPerSec": rate,
                "NumberOfEpisodes": collector.episodes,
                "EnvironmentCrashes": collector.environment_crashes,
                "BlockedSecs": collector.blocked_secs,
            }
            if collector.recent_returns:
                scalars["AverageReturn"] = average_return
            self._events.write(train_step, scalars)
