"""What a collect actor acts by: a random policy until the replay is warm, then the newest weights."""

from __future__ import annotations

import logging
import time

import numpy as np

from actorlearner.agents.acting import Acting
from actorlearner.agents.policies import Policies
from actorlearner.replay.base import RANDOM_POLICY, Replay, Sampling
from actorlearner.replay.pace import ActorsTurn
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.lifecycle import Stop, wait_until
from actorlearner.runtime.messages import Unreachable
from actorlearner.variable_container import Phase, Subscriber


class ActorPolicy:
    """Acts at random until the replay is warm, then by the collect policy with the newest weights."""

    def __init__(
        self,
        policies: Policies,
        replay: Replay,
        servers: ReplayServers,
        sampling: Sampling,
        weights: Subscriber,
        turn: ActorsTurn,
        *,
        seed: int,
        patience_secs: float,
    ):
        """Args:
        policies: Of the agent.
        replay: Knows whether it is warm.
        servers: Which hold it.
        sampling: Says how many steps are random, and for how many environments one acts.
        weights: Where newer ones come from, and how far training is.
        turn: Whether weights may change now.
        seed: Of the random actions.
        patience_secs: How long the first weights are awaited.
        """
        self._policies = policies
        self._replay = replay
        self._servers = servers
        self._sampling = sampling
        self._weights = weights
        self._turn = turn
        self._patience_secs = patience_secs
        self._is_warming_up = True
        self._asked_at = 0.0
        self._version = -1
        self.acting: Acting = policies.make_random(sampling.num_environments, seed)
        """Chooses the actions."""
        self.acted_at = RANDOM_POLICY
        """Train step at which the weights that act were published."""

    def refresh(self, stop: Stop) -> bool:
        """Takes up what is new, if it may change now; returns whether training still needs data.

        Blocks until the first weights are there when the warm-up ends, otherwise never.

        Raises:
          RoleError: No weights came within `patience_secs` (UNAVAILABLE).
          Stopped: `stop` was set meanwhile.
        """
        if self._weights.phase() > Phase.TRAINING:
            return False
        if self._turn.may_change:
            if self._is_warming_up and self._is_warm():
                self._end_warm_up(stop)
            if not self._is_warming_up:
                self._take_up_weights()
        return self._weights.phase() <= Phase.TRAINING

    def _is_warm(self) -> bool:
        """Returns whether the replay as a whole holds what is collected at random; asks a few times a second."""
        if not self._sampling.initial_collect_steps:
            return True
        if time.monotonic() - self._asked_at < self._sampling.pace.least_secs_between_looks:
            return False
        self._asked_at = time.monotonic()
        try:
            is_warm = self._replay.is_warm(self._servers, self._sampling.initial_collect_steps)
        except Unreachable:
            return False
        return self._weights.phase() >= Phase.TRAINING if is_warm is None else is_warm

    def _end_warm_up(self, stop: Stop) -> None:
        acting = self._policies.make_collecting(self._sampling.num_environments)
        wait_until(
            lambda: self._weights.latest() is not None or self._weights.phase() > Phase.TRAINING,
            lambda: f"the learner's first weights at {self._weights.address}",
            stop=stop,
            deadline_secs=self._patience_secs,
            setting="--peer_patience_secs",
        )
        if self._weights.phase() <= Phase.TRAINING:
            self.acting, self._is_warming_up = acting, False
            logging.info("warm-up is over: acting with the collect policy from here on")

    def _take_up_weights(self) -> None:
        snapshot = self._weights.latest()
        if snapshot is not None and snapshot.version != self._version:
            snapshot.assign_to(self._policies.variables)
            # Of each int of Python TensorFlow keeps a tensor for ever.
            self._policies.train_step.assign(np.int64(snapshot.train_step))
            self._version, self.acted_at = snapshot.version, snapshot.train_step
