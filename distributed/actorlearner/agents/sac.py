"""Soft actor-critic (Haarnoja et al., 2018, arXiv:1812.05905), for continuous actions.

The agent is TF-Agents' `SacAgent`, built as the "SAC minitaur with the Actor-Learner API" tutorial builds it; the
parameters have the tutorial's names and its values for defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import gin
import tensorflow as tf
from tf_agents.agents.ddpg import critic_network
from tf_agents.agents.sac import sac_agent, tanh_normal_projection_network
from tf_agents.networks import actor_distribution_network

from actorlearner.agents.base import (
    Fraction,
    PositiveFloat,
    PositiveInt,
    check_continuous_action,
    check_vector_observation,
)


@gin.configurable("sac", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class Sac:
    """Makes SAC agents.

    Attributes:
      critic_learning_rate, actor_learning_rate, alpha_learning_rate: Adam's step sizes; alpha is the entropy's weight.
      target_update_tau: How far the target critics move towards the critics, 0 to 1, at each target update.
      target_update_period: Train steps between two target updates.
      gamma: Discount of future rewards.
      reward_scale_factor: Rewards are multiplied by this; the larger, the less entropy counts.
      actor_fc_layer_params, critic_joint_fc_layer_params: Units of each hidden layer.
      gradient_clipping: Largest gradient norm; None does not clip.
    """

    critic_learning_rate: PositiveFloat = 3e-4
    actor_learning_rate: PositiveFloat = 3e-4
    alpha_learning_rate: PositiveFloat = 3e-4
    target_update_tau: Fraction = 0.005
    target_update_period: PositiveInt = 1
    gamma: Fraction = 0.99
    reward_scale_factor: PositiveFloat = 1.0
    actor_fc_layer_params: tuple[PositiveInt, ...] = (256, 256)
    critic_joint_fc_layer_params: tuple[PositiveInt, ...] = (256, 256)
    gradient_clipping: Optional[PositiveFloat] = None

    def make_agent(self, time_step_spec: Any, action_spec: Any, train_step: tf.Variable) -> sac_agent.SacAgent:
        """Returns an initialised `SacAgent`. See `AgentFactory.make_agent`."""
        leaves = tf.nest.flatten(action_spec)
        if len(leaves) != 1 or not leaves[0].dtype.is_floating:
            raise ValueError(
                f"sac needs one continuous (float) action, but the environment's action spec is {action_spec}. "
                "Use an algorithm for discrete actions (include 'agents/dqn.gin', experiment.agent = @dqn()) "
                "or a continuous environment."
            )
        check_continuous_action("sac", action_spec)
        check_vector_observation("sac", time_step_spec)
        observation_spec = time_step_spec.observation
        critic_net = critic_network.CriticNetwork(
            (observation_spec, action_spec),
            observation_fc_layer_params=None,
            action_fc_layer_params=None,
            joint_fc_layer_params=tuple(self.critic_joint_fc_layer_params),
            kernel_initializer="glorot_uniform",
            last_kernel_initializer="glorot_uniform",
        )
        actor_net = actor_distribution_network.ActorDistributionNetwork(
            observation_spec,
            action_spec,
            fc_layer_params=tuple(self.actor_fc_layer_params),
            continuous_projection_net=tanh_normal_projection_network.TanhNormalProjectionNetwork,
        )
        agent = sac_agent.SacAgent(
            time_step_spec,
            action_spec,
            actor_network=actor_net,
            critic_network=critic_net,
            actor_optimizer=tf.keras.optimizers.Adam(learning_rate=self.actor_learning_rate),
            critic_optimizer=tf.keras.optimizers.Adam(learning_rate=self.critic_learning_rate),
            alpha_optimizer=tf.keras.optimizers.Adam(learning_rate=self.alpha_learning_rate),
            target_update_tau=self.target_update_tau,
            target_update_period=self.target_update_period,
            td_errors_loss_fn=tf.math.squared_difference,
            gamma=self.gamma,
            reward_scale_factor=self.reward_scale_factor,
            gradient_clipping=self.gradient_clipping,
            train_step_counter=train_step,
        )
        agent.initialize()
        return agent
