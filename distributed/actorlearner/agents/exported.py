"""Exported policies: their actions are the environment's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.policies import tf_policy
from tf_agents.trajectories import policy_step
from tf_agents.trajectories import time_step as ts


def with_environment_actions(policy: tf_policy.TFPolicy, action_spec: Any) -> tf_policy.TFPolicy:
    """Returns `policy` with the environment's actions, of `action_spec`: agents count discrete actions from 0."""
    pairs = zip(tf.nest.flatten(action_spec), tf.nest.flatten(policy.action_spec))
    if all(np.array_equal(spec.minimum, own.minimum) for spec, own in pairs):
        return policy
    return _WithEnvironmentActions(policy, action_spec)


class _WithEnvironmentActions(tf_policy.TFPolicy):
    """Adds to each action the offset between the agent's minimum and the environment's."""

    def __init__(self, policy: tf_policy.TFPolicy, action_spec: Any):
        super().__init__(
            policy.time_step_spec,
            action_spec,
            policy_state_spec=policy.policy_state_spec,
            info_spec=policy.info_spec,
            clip=False,
        )
        self._policy = policy

    def _variables(self) -> Any:
        return self._policy.variables()

    def _get_initial_state(self, batch_size: Any) -> Any:
        return self._policy.get_initial_state(batch_size)

    def _action(self, time_step: ts.TimeStep, policy_state: Any, seed: Any) -> policy_step.PolicyStep:
        step = self._policy.action(time_step, policy_state, seed)
        action = tf.nest.map_structure(
            lambda value, spec, own: value + tf.cast(spec.minimum - own.minimum, value.dtype),
            step.action,
            self.action_spec,
            self._policy.action_spec,
        )
        return step._replace(action=action)

    def _distribution(self, time_step: ts.TimeStep, policy_state: Any) -> policy_step.PolicyStep:
        raise NotImplementedError("use the wrapped policy's distribution")
