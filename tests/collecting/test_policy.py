"""What a collect actor acts by, and when that changes."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import pytest

from actorlearner.agents.acting import CompiledActing, RandomActing
from actorlearner.collecting.policy import ActorPolicy
from actorlearner.experiment import load_experiment
from actorlearner.replay.base import RANDOM_POLICY, Replay
from actorlearner.replay.pace import ActorsTurn
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.lifecycle import Stop
from actorlearner.variable_container import Phase, Snapshot


class Weights:
    """What an actor hears of the learner."""

    address = "nowhere:1"

    def __init__(self, policies):
        self._variables = policies.variables
        self.now = Phase.WARMING_UP
        self.snapshot: Optional[Snapshot] = None

    def publish(self, version, train_step, value):
        values = [variable.numpy() * 0 + value for variable in self._variables]
        self.snapshot = Snapshot(version, train_step, values)

    def latest(self):
        return self.snapshot

    def phase(self):
        return self.now


class Parts:
    def __init__(self, initial_collect_steps=10):
        experiment = load_experiment("dqn_cartpole", ["dqn.fc_layer_params = (4,)"])
        self.policies = experiment.policies()
        self.weights: Any = Weights(self.policies)
        self.turn = ActorsTurn()
        sampling = experiment.sampling(self.policies.agent)
        sampling = dataclasses.replace(sampling, initial_collect_steps=initial_collect_steps, num_environments=1)
        self.policy = ActorPolicy(
            self.policies, Replay(), ReplayServers(["nowhere:1"]), sampling, self.weights, self.turn, seed=1,
            patience_secs=5,
        )  # fmt: skip

    def refresh(self):
        self.policy._asked_at = 0.0  # as after a fifth of a second
        return self.policy.refresh(Stop())


def test_it_acts_at_random_until_the_replay_is_warm_then_by_the_newest_weights():
    """Weights of train step 0 collect less than chance does, and older ones than need be teach less."""
    parts = Parts()
    assert parts.refresh()
    assert isinstance(parts.policy.acting, RandomActing) and parts.policy.acted_at == RANDOM_POLICY
    parts.weights.publish(0, 0, 0.5)
    parts.weights.now = Phase.TRAINING
    assert parts.refresh()
    assert isinstance(parts.policy.acting, CompiledActing) and parts.policy.acted_at == 0
    parts.weights.publish(1, 70, 0.25)
    assert parts.refresh()
    assert parts.policy.acted_at == int(parts.policies.train_step) == 70
    assert float(parts.policies.variables[0].numpy().max()) == 0.25


@pytest.mark.parametrize("phase", [Phase.EVALUATING, Phase.OVER])
def test_it_says_when_training_needs_no_more(phase):
    """An actor that goes on keeps a core busy for nobody."""
    parts = Parts()
    parts.weights.now = phase
    assert not parts.refresh()


def test_no_step_is_random_where_nothing_is_collected_at_random():
    """On-policy, a random step is of no use to anybody."""
    parts = Parts(initial_collect_steps=0)
    parts.weights.publish(0, 0, 0.5)
    assert parts.refresh()
    assert isinstance(parts.policy.acting, CompiledActing)


def test_nothing_changes_while_it_is_not_the_actors_turn():
    """In lock-step the weights of a chunk are those that the last one gave."""
    parts = Parts(initial_collect_steps=0)
    parts.turn.may_change = False
    parts.weights.publish(0, 0, 0.5)
    assert parts.refresh()
    assert isinstance(parts.policy.acting, RandomActing)
