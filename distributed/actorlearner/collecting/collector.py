"""Steps a batch of environments and writes their steps to the replay."""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tf_agents.trajectories import StepType, trajectory
from tf_agents.trajectories import time_step as ts

from actorlearner.cluster import Cluster
from actorlearner.environments.checks import UnfitData
from actorlearner.experiment import Experiment
from actorlearner.replay.base import Sampling
from actorlearner.replay.pace import ActorsTurn
from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.tables import describe_tables
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, RoleError, Stop
from actorlearner.variable_container import Phase, Subscriber


class Collector:
    """Steps a batch of environments and writes their steps to the replay."""

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
        # A restarted actor must not repeat the episodes of the previous process.
        self._environments = experiment.make_environments(num_environments, "collect-actor", cluster.task, life)
        self.sink = experiment.replay.make_sink(servers, sampling)
        self.environment_steps = self.episodes = 0
        with self._refusing_unfit_data():
            self._time_step = self._environments.reset()
        self._returns = np.zeros(num_environments)
        self.recent_returns: collections.deque[float] = collections.deque(maxlen=20)
        self.blocked_secs = 0.0
        self.began_at = time.monotonic()

    @property
    def environment_crashes(self) -> int:
        return self._environments.num_crashes

    def step(self, acting: Any, acted_at: int) -> None:
        """Acts once in every environment and appends the results to the sink.

        Raises:
          RoleError: A reward or an observation is not finite, or does not fit its spec (DATA).
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
                "good checkpoint is kept. Fix the environment, then start again with the same --root_dir.",
                ExitCode.DATA,
            ) from error

    def _count(self, step_type: np.ndarray, after: ts.TimeStep, crashed: np.ndarray) -> None:
        acted = (step_type != StepType.LAST) & ~crashed  # after a last step comes a reset, which is no environment step
        self.environment_steps += int(np.count_nonzero(acted))
        self._returns[crashed] = 0.0
        self._returns += np.where(acted, after.reward, 0.0)
        for index in np.flatnonzero(acted & (after.step_type == StepType.LAST)):
            self.episodes += 1
            self.recent_returns.append(float(self._returns[index]))
            self._returns[index] = 0.0

    def await_server(self, weights: Subscriber, stop: Stop) -> None:
        """Blocks until the server accepts more, or no more data is needed.

        Raises:
          RoleError: The server refused an item (DATA), or neither it nor the learner showed progress for
            `--peer_patience_secs` (UNAVAILABLE).
        """
        start = said = time.monotonic()
        while self._is_blocked() and not stop.is_set() and weights.phase() <= Phase.TRAINING:
            beat()
            now = time.monotonic()
            silent = min(now - start, weights.learner_silent_secs())
            if silent > self._cluster.peer_patience_secs:
                raise RoleError(
                    f"the replay server at {self._cluster.replay_address} has accepted nothing for "
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
        """Blocks until the next step may be made. See `ActorsTurn.await_answer`."""
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
