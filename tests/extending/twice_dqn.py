"""A new algorithm: DQN that makes several updates on each batch, and counts every one as a train step."""

from __future__ import annotations

import dataclasses
from typing import Any

import gin
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import sequential

from actorlearner.agents.base import PositiveFloat, PositiveInt, check_vector_observation


@gin.configurable("twice_dqn", module="extending")
@dataclasses.dataclass(frozen=True)
class TwiceDqn:
    """Makes the agents.

    Attributes:
      learning_rate: Adam's step size.
      num_updates: On each batch.
    """

    learning_rate: PositiveFloat = 1e-3
    num_updates: PositiveInt = 2

    def make_agent(self, time_step_spec: Any, action_spec: Any, train_step: tf.Variable) -> dqn_agent.DqnAgent:
        """Returns an initialised agent. See `AgentFactory.make_agent`."""
        check_vector_observation("twice_dqn", time_step_spec)
        num_actions = int(action_spec.maximum - action_spec.minimum) + 1
        agent = _TwiceAgent(
            time_step_spec,
            action_spec,
            sequential.Sequential([tf.keras.layers.Dense(16, "relu"), tf.keras.layers.Dense(num_actions)]),
            tf.keras.optimizers.Adam(self.learning_rate),
            num_updates=self.num_updates,
            train_step_counter=train_step,
        )
        agent.initialize()
        return agent


class _TwiceAgent(dqn_agent.DqnAgent):
    def __init__(self, *arguments: Any, num_updates: int, **settings: Any):
        super().__init__(*arguments, **settings)
        self._num_updates = num_updates

    def _train(self, experience: Any, weights: Any) -> Any:
        for _ in range(self._num_updates):
            loss_info = super()._train(experience, weights)
        return loss_info
