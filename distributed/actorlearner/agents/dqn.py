"""Deep Q-learning (Mnih et al., 2015), with double Q-learning (van Hasselt et al., 2016) and n-step returns.

The agent is TF-Agents' `DqnAgent` or `DdqnAgent`; the Q network is the one of the TF-Agents DQN tutorial.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Optional

import gin
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import sequential
from tf_agents.utils import common

from actorlearner.agents.base import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_vector_observation,
)
from actorlearner.agents.normalized import NormalizedObservations, Normalizer

_LOSSES = {"squared": common.element_wise_squared_loss, "huber": common.element_wise_huber_loss}


@gin.configurable("dqn", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class Dqn(NormalizedObservations):
    """Makes DQN agents. It also has the bindings of `NormalizedObservations`.

    Attributes:
      learning_rate: Adam's step size at train step 0.
      final_learning_rate: Adam's step size from `learning_rate_decay_steps` on, reached linearly; None keeps
        `learning_rate`.
      learning_rate_decay_steps: Train steps over which the step size falls.
      fc_layer_params: Units of each hidden layer.
      gamma: Discount of future rewards.
      n_step_update: Rewards summed before bootstrapping; windows are one step longer.
      double_q: Let the online network choose and the target network value the next action.
      target_update_tau: Fraction, 0 to 1, by which the target network moves towards the network at each target update.
      target_update_period: Train steps between two target updates.
      initial_epsilon, epsilon_greedy: Share of random actions at train step 0, and from `epsilon_decay_steps` on.
      epsilon_decay_steps: Train steps over which the share falls, linearly; 0 starts at `epsilon_greedy`.
      td_errors_loss: Loss of the temporal difference, "squared" or "huber".
      gradient_clipping: Largest gradient norm; None does not clip.
      reward_scale_factor: Rewards are multiplied by this.
    """

    learning_rate: PositiveFloat = 1e-3
    final_learning_rate: Optional[PositiveFloat] = None
    learning_rate_decay_steps: PositiveInt = 1
    fc_layer_params: tuple[PositiveInt, ...] = (100, 50)
    gamma: Fraction = 0.99
    n_step_update: PositiveInt = 1
    double_q: bool = False
    target_update_tau: Fraction = 1.0
    target_update_period: PositiveInt = 1
    initial_epsilon: Fraction = 1.0
    epsilon_greedy: Fraction = 0.1
    epsilon_decay_steps: NonNegativeInt = 0
    td_errors_loss: Literal["squared", "huber"] = "squared"
    gradient_clipping: Optional[PositiveFloat] = None
    reward_scale_factor: PositiveFloat = 1.0

    def make_agent(self, time_step_spec: Any, action_spec: Any, train_step: tf.Variable) -> dqn_agent.DqnAgent:
        """Returns an initialised `DqnAgent`. See `AgentFactory.make_agent`."""
        leaves = tf.nest.flatten(action_spec)
        is_one = len(leaves) == 1 and not tf.nest.is_nested(action_spec)
        if not is_one or not leaves[0].dtype.is_integer or leaves[0].shape.rank != 0:
            raise ValueError(
                f"dqn needs one discrete (scalar integer) action, but the environment's action spec is {action_spec}. "
                "Use an algorithm for continuous actions (include 'agents/sac.gin', experiment.agent = @sac()) "
                "or a discrete environment."
            )
        check_vector_observation("dqn", time_step_spec)
        normalizer = self.make_normalizer(time_step_spec.observation)
        agent_class = dqn_agent.DdqnAgent if self.double_q else dqn_agent.DqnAgent
        agent = agent_class(
            time_step_spec,
            action_spec,
            q_network=self._make_q_network(int(leaves[0].maximum - leaves[0].minimum) + 1, normalizer),
            optimizer=tf.keras.optimizers.Adam(learning_rate=self._make_learning_rate()),
            epsilon_greedy=self._make_epsilon(train_step),
            n_step_update=self.n_step_update,
            target_update_tau=self.target_update_tau,
            target_update_period=self.target_update_period,
            td_errors_loss_fn=_LOSSES[self.td_errors_loss],
            gamma=self.gamma,
            reward_scale_factor=self.reward_scale_factor,
            gradient_clipping=self.gradient_clipping,
            train_step_counter=train_step,
        )
        agent.initialize()
        agent.observation_statistics = normalizer.statistics if normalizer else None
        return agent

    def _make_q_network(self, num_actions: int, normalizer: Optional[Normalizer]) -> sequential.Sequential:
        first = [normalizer.make_layer()] if normalizer else []
        hidden = [
            tf.keras.layers.Dense(
                num_units,
                activation="relu",
                kernel_initializer=tf.keras.initializers.VarianceScaling(
                    scale=2.0, mode="fan_in", distribution="truncated_normal"
                ),
            )
            for num_units in self.fc_layer_params
        ]
        q_values = tf.keras.layers.Dense(
            num_actions,
            kernel_initializer=tf.keras.initializers.RandomUniform(minval=-0.03, maxval=0.03),
            bias_initializer=tf.keras.initializers.Constant(-0.2),
        )
        return sequential.Sequential([*first, *hidden, q_values])

    def _make_learning_rate(self) -> Any:
        if self.final_learning_rate is None:
            return self.learning_rate
        return tf.keras.optimizers.schedules.PolynomialDecay(
            self.learning_rate, self.learning_rate_decay_steps, self.final_learning_rate
        )

    def _make_epsilon(self, train_step: tf.Variable) -> Any:
        if not self.epsilon_decay_steps:
            return self.epsilon_greedy
        return lambda: _linear(self.initial_epsilon, self.epsilon_greedy, self.epsilon_decay_steps, train_step)


def _linear(first: float, last: float, num_steps: int, train_step: tf.Variable) -> tf.Tensor:
    """Returns a scalar that changes linearly from `first` at train step 0 to `last` at `num_steps`, and stays there."""
    done = tf.minimum(tf.cast(train_step, tf.float32) / num_steps, 1.0)
    return first + (last - first) * done
