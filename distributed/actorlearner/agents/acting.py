"""Acts for a batch of environments: one compiled call per step for a trained policy, numpy for a random one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tree
from tf_agents.policies import random_py_policy, tf_policy
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import policy_step
from tf_agents.trajectories import time_step as ts
from tf_agents.utils import nest_utils


class Acting(Protocol):
    """Chooses one action per environment."""

    def act(self, time_steps: Sequence[ts.TimeStep]) -> Sequence[policy_step.PolicyStep]:
        """Returns one unbatched step of numpy arrays per environment, in order; `state` is kept inside."""
        ...


class CompiledActing:
    """Acts by a TF-Agents policy, for the same `num_environments` environments on every call.

    The policy's state (of a recurrent network) is kept here and begins anew where an episode begins.
    """

    def __init__(self, policy: tf_policy.TFPolicy, num_environments: int):
        self._num_environments = num_environments
        self._initial_state = policy.get_initial_state(num_environments)
        self._state = self._initial_state
        self._time_step_spec = policy.time_step_spec
        specs = tensor_spec.add_outer_dim(policy.time_step_spec, num_environments)
        state_specs = tensor_spec.add_outer_dim(policy.policy_state_spec, num_environments)

        # Flat arguments: structured ones cost as much again as the network, at every call.
        def act(time_step: Any, state: Any) -> list[tf.Tensor]:
            step = policy.action(
                tf.nest.pack_sequence_as(specs, time_step), tf.nest.pack_sequence_as(state_specs, state)
            )
            self._step_structure = step
            return tf.nest.flatten(step)

        function = tf.function(act, autograph=False).get_concrete_function(
            tf.nest.flatten(specs), tf.nest.flatten(state_specs)
        )
        self._function = function

    def act(self, time_steps: Sequence[ts.TimeStep]) -> Sequence[policy_step.PolicyStep]:
        """Returns actions for `num_environments` time steps. See `Acting.act`."""
        batch = nest_utils.stack_nested_arrays(time_steps)
        self._begin_anew(batch.is_first())
        inputs = [tf.constant(array) for array in tf.nest.flatten(batch)] + tf.nest.flatten(self._state)
        outputs = self._function(*inputs)
        step = tf.nest.pack_sequence_as(self._step_structure, outputs)
        self._state = step.state
        arrays = tree.map_structure(np.asarray, (step.action, step.info))
        return [
            policy_step.PolicyStep(action, (), info)
            for action, info in (tree.map_structure(lambda a, i=i: a[i], arrays) for i in range(self._num_environments))
        ]

    def _begin_anew(self, first: np.ndarray) -> None:
        if not tf.nest.flatten(self._state) or not first.any():
            return
        keep = lambda initial, state: tf.where(first.reshape([-1] + [1] * (len(state.shape) - 1)), initial, state)  # noqa: E731
        self._state = tf.nest.map_structure(keep, self._initial_state, self._state)


class RandomActing:
    """Acts uniformly at random within the action spec, whatever it sees."""

    def __init__(self, time_step_spec: Any, action_spec: Any, info_spec: Any, seed: int):
        """Specs are array specs of one environment; `info_spec` is that of the policy whose place it takes."""
        self._policy = random_py_policy.RandomPyPolicy(time_step_spec, action_spec, seed=seed)
        self._info = tree.map_structure(lambda spec: np.zeros(spec.shape, spec.dtype), info_spec)

    def act(self, time_steps: Sequence[ts.TimeStep]) -> Sequence[policy_step.PolicyStep]:
        """Returns one random action per time step. See `Acting.act`."""
        return [self._policy.action(time_step)._replace(info=self._info) for time_step in time_steps]
