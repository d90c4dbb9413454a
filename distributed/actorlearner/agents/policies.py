"""The three policies of an agent: collect, greedy (for evaluation) and random."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.policies import greedy_policy, tf_policy
from tf_agents.specs import tensor_spec

from actorlearner.agents.acting import CompiledActing, RandomActing


class Policies:
    """An agent's policies and the variables that acting needs; each role makes its own.

    Attributes:
      agent: The agent.
      train_step: Exploration may depend on it; actors set it to the train step of their weights.
      variables: Everything that acting needs, statistics included, in the order in which it is published.
    """

    def __init__(self, agent: tf_agent.TFAgent, train_step: tf.Variable, num_random_repeats: int = 1):
        """Args:
        agent, train_step: See above.
        num_random_repeats: Number of steps for which each random action is held.
        """
        self.agent = agent
        self.train_step = train_step
        # called once: it walks through the agent
        self.variables: Sequence[tf.Variable] = agent.collect_policy.variables()
        self._num_random_repeats = num_random_repeats

    @property
    def collect(self) -> tf_policy.TFPolicy:
        return self.agent.collect_policy

    @property
    def plain(self) -> tf_policy.TFPolicy:
        """What was trained: no exploration is added, and it is not made greedy."""
        policy = self.agent.policy
        return policy.wrapped_policy if isinstance(policy, greedy_policy.GreedyPolicy) else policy

    @functools.cached_property
    def greedy(self) -> tf_policy.TFPolicy:
        policy = self.agent.policy
        return policy if isinstance(policy, greedy_policy.GreedyPolicy) else greedy_policy.GreedyPolicy(policy)

    def make_collecting(self, num_environments: int) -> CompiledActing:
        """Returns the collect policy, compiled for a batch of environments."""
        return CompiledActing(self.collect, num_environments)

    def make_greedy(self, num_environments: int) -> CompiledActing:
        """Returns the greedy policy, compiled for a batch of environments."""
        return CompiledActing(self.greedy, num_environments)

    def make_random(self, num_environments: int, seed: int) -> RandomActing:
        """Returns uniformly random acting, with the collect policy's interface."""
        specs: list[Any] = [self.agent.time_step_spec, self.agent.action_spec, self.collect.info_spec]
        time_step_spec, action_spec, info_spec = map(tensor_spec.to_array_spec, specs)
        return RandomActing(time_step_spec, action_spec, info_spec, num_environments, seed, self._num_random_repeats)
