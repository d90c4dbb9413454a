"""n-step returns (Sutton, 1988; Peng and Williams, 1994) for algorithms that train on transitions.

A window of n + 1 steps becomes one transition: the action of its first step, the discounted sum of the rewards up to
the n-th step, and the state from which to bootstrap. Later actions are used as they are, without a correction for
changes of the policy since then (as in Rainbow, Hessel et al., 2017, and D4PG, Barth-Maron et al., 2018).
"""

from __future__ import annotations

import tensorflow as tf
from tf_agents.trajectories import StepType, policy_step, trajectory
from tf_agents.trajectories import time_step as ts


def to_n_step_transition(experience: trajectory.Trajectory, gamma: float) -> trajectory.Transition:
    """Returns one transition for each window; if the episode ends within the window, it uses the steps up to the end.

    An algorithm's target is reward + gamma * discount * value(next observation); so `discount` holds the remaining
    factors of gamma. A terminated episode has discount 0. A truncated one (its last discount is 1) bootstraps from its
    last observation. Steps of the window after the end of its episode are ignored.

    Shapes: B = batch, n = steps - 1. Leaves of `experience` are [B, n + 1, ...], those of the result [B, ...].
    """
    num_steps = experience.reward.shape[1] - 1
    ends = tf.equal(experience.next_step_type[:, :num_steps], StepType.LAST)
    # [B, n]: 1 in the steps up to the end of the episode, inclusive; 0 after it.
    goes_on = tf.math.cumprod(1.0 - tf.cast(ends, tf.float32), axis=1, exclusive=True)
    powers = tf.constant([gamma**step for step in range(num_steps)], tf.float32)
    discounts = experience.discount[:, :num_steps]
    weights = powers * tf.math.cumprod(discounts, axis=1, exclusive=True) * goes_on  # of the rewards, [B, n]
    reward = tf.reduce_sum(weights * experience.reward[:, :num_steps], axis=1)
    num_used = tf.reduce_sum(tf.cast(goes_on, tf.int32), axis=1)  # [B], from 1 to n
    at_end = num_used - 1
    discount = tf.gather(weights * discounts, at_end, batch_dims=1)
    first = tf.nest.map_structure(lambda leaf: leaf[:, 0], experience.observation)
    last = tf.nest.map_structure(lambda leaf: tf.gather(leaf, num_used, batch_dims=1), experience.observation)
    zeros, ones = tf.zeros_like(reward), tf.ones_like(reward)
    return trajectory.Transition(
        time_step=ts.TimeStep(experience.step_type[:, 0], zeros, ones, first),
        action_step=policy_step.PolicyStep(
            tf.nest.map_structure(lambda leaf: leaf[:, 0], experience.action),
            (),
            tf.nest.map_structure(lambda leaf: leaf[:, 0], experience.policy_info),
        ),
        next_time_step=ts.TimeStep(tf.gather(experience.next_step_type, at_end, batch_dims=1), reward, discount, last),
    )
