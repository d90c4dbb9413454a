"""Soft actor-critic (Haarnoja et al., 2018, arXiv:1812.05905), for continuous actions.

The agent is TF-Agents' `SacAgent`. With its defaults it is built as the "SAC minitaur with the Actor-Learner API"
tutorial builds it, with the tutorial's parameter names. Extensions beyond the paper, each with a binding of its own:
normalised observations, n-step returns, LayerNorm, bounded standard deviations, weight decay.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Optional

import gin
import tensorflow as tf
from tf_agents.agents.sac import sac_agent
from tf_agents.trajectories import trajectory

from actorlearner.agents.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_continuous_action,
    check_vector_observation,
)
from actorlearner.agents.n_step import to_n_step_transition
from actorlearner.agents.networks import BoundedStd, DenseActor, DenseCritic
from actorlearner.agents.normalized import NormalizedObservations, RunningStatistics
from actorlearner.agents.optimizers import make_adam


@gin.configurable("sac", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class Sac(NormalizedObservations):
    """Makes SAC agents. It also has the bindings of `NormalizedObservations`.

    Attributes:
      critic_learning_rate, actor_learning_rate, alpha_learning_rate: Adam's step sizes; alpha is the entropy's weight.
      final_learning_rate: Step size of critics and actor from `learning_rate_decay_steps` on, reached linearly; None
        keeps the initial ones.
      learning_rate_decay_steps: Train steps over which the step sizes fall.
      weight_decay: Each update of critics or actor subtracts this times the step size times the kernel.
      initial_alpha: The entropy's weight at train step 0.
      target_entropy: The entropy to which alpha is adjusted; None takes minus half the number of action components.
      target_update_tau: Fraction, 0 to 1, by which the target critics move towards the critics at each target update.
      target_update_period: Train steps between two target updates.
      gamma: Discount of future rewards.
      n_step_update: Rewards summed before bootstrapping; windows are one step longer than this.
      reward_scale_factor: Rewards are multiplied by this; the larger, the less entropy counts.
      actor_fc_layer_params, critic_joint_fc_layer_params: Units of each hidden layer.
      actor_layer_norm, critic_layer_norm: Whether each hidden layer has a LayerNorm before its ReLU.
      log_std_bounds: Smallest and largest logarithm of the policy's standard deviations, before tanh squashes actions;
        None sets no bounds.
      actor_last_layer_scale: Factor on the Glorot initialisation of the actor's last layer.
      gradient_clipping: Largest gradient norm; None does not clip.
    """

    critic_learning_rate: PositiveFloat = 3e-4
    actor_learning_rate: PositiveFloat = 3e-4
    alpha_learning_rate: PositiveFloat = 3e-4
    final_learning_rate: Optional[PositiveFloat] = None
    learning_rate_decay_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    initial_alpha: PositiveFloat = 1.0
    target_entropy: Optional[float] = None
    target_update_tau: Fraction = 0.005
    target_update_period: PositiveInt = 1
    gamma: Fraction = 0.99
    n_step_update: PositiveInt = 1
    reward_scale_factor: PositiveFloat = 1.0
    actor_fc_layer_params: tuple[PositiveInt, ...] = (256, 256)
    critic_joint_fc_layer_params: tuple[PositiveInt, ...] = (256, 256)
    actor_layer_norm: bool = False
    critic_layer_norm: bool = False
    log_std_bounds: Optional[tuple[float, float]] = None
    actor_last_layer_scale: PositiveFloat = 1.0
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
        if self.log_std_bounds is not None and not self.log_std_bounds[0] < self.log_std_bounds[1]:
            raise ValueError(f"sac.log_std_bounds = {self.log_std_bounds}: the first must be below the second.")
        observation_spec = time_step_spec.observation
        normalizer = self.make_normalizer(observation_spec)
        agent = NStepSacAgent(
            self.n_step_update,
            normalizer.statistics if normalizer else None,
            time_step_spec,
            action_spec,
            actor_network=DenseActor(
                observation_spec,
                action_spec,
                self.actor_fc_layer_params,
                normalizer,
                self.actor_layer_norm,
                BoundedStd(*self.log_std_bounds) if self.log_std_bounds else tf.exp,
                self.actor_last_layer_scale,
            ),
            critic_network=DenseCritic(
                (observation_spec, action_spec), self.critic_joint_fc_layer_params, normalizer, self.critic_layer_norm
            ),
            actor_optimizer=self._make_optimizer(self.actor_learning_rate),
            critic_optimizer=self._make_optimizer(self.critic_learning_rate),
            alpha_optimizer=make_adam(self.alpha_learning_rate),
            target_update_tau=self.target_update_tau,
            target_update_period=self.target_update_period,
            td_errors_loss_fn=tf.math.squared_difference,
            gamma=self.gamma,
            initial_log_alpha=math.log(self.initial_alpha),
            target_entropy=self.target_entropy,
            reward_scale_factor=self.reward_scale_factor,
            gradient_clipping=self.gradient_clipping,
            train_step_counter=train_step,
        )
        agent.initialize()
        return agent

    def _make_optimizer(self, learning_rate: float) -> tf.keras.optimizers.legacy.Optimizer:
        return make_adam(
            learning_rate,
            final_learning_rate=self.final_learning_rate,
            decay_steps=self.learning_rate_decay_steps,
            weight_decay=self.weight_decay,
        )


class NStepSacAgent(sac_agent.SacAgent):
    """`SacAgent` on windows of `num_steps + 1` steps; one step is TF-Agents' own."""

    def __init__(
        self, num_steps: int, statistics: Optional[RunningStatistics], *args: Any, gamma: float, **settings: Any
    ):
        super().__init__(*args, gamma=gamma, **settings)
        self.observation_statistics = statistics
        self.windows_may_end_early = num_steps > 1
        self._train_sequence_length = num_steps + 1
        if num_steps > 1:
            self._as_transition = self._to_transition

    def _to_transition(self, experience: trajectory.Trajectory) -> trajectory.Transition:
        return to_n_step_transition(experience, self._gamma)
