"""Chooses actions for a batch of environments: one compiled call per step for a policy, NumPy for random actions.

Time steps and actions are columns: arrays of shape [num_environments, ...].
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tree
from tf_agents.policies import random_py_policy, tf_policy
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import StepType, policy_step
from tf_agents.trajectories import time_step as ts


class Acting(Protocol):
    """Chooses one action per environment."""

    def act(self, time_step: ts.TimeStep) -> policy_step.PolicyStep:
        """Returns actions and policy infos for a time step, as columns; the policy's `state` is kept inside."""
        ...


class CompiledActing:
    """Acts with a TF-Agents policy, for the same `num_environments` environments in every call.

    The policy's state (of a recurrent network) is kept here and reset where an episode starts.
    """

    def __init__(self, policy: tf_policy.TFPolicy, num_environments: int):
        self._num_environments = num_environments
        self._initial_state = policy.get_initial_state(num_environments)
        self._state = self._initial_state
        self._has_state = bool(tf.nest.flatten(self._initial_state))
        specs = tensor_spec.add_outer_dim(policy.time_step_spec, num_environments)
        state_specs = tensor_spec.add_outer_dim(policy.policy_state_spec, num_environments)

        num_inputs = len(tf.nest.flatten(specs))

        # Flat positional arguments: structured ones cost several times as much as the network, at every call.
        def act(*flat: tf.Tensor) -> list[tf.Tensor]:
            time_step = tf.nest.pack_sequence_as(specs, flat[:num_inputs])
            state = tf.nest.pack_sequence_as(state_specs, flat[num_inputs:])
            self._step_structure = policy.action(time_step, state)
            return tf.nest.flatten(self._step_structure)

        self._function = tf.function(act, autograph=False).get_concrete_function(
            *_unnamed(specs), *_unnamed(state_specs)
        )
        # Most policies use only the observation; unused inputs are not passed.
        placeholders = self._function.inputs[:num_inputs]
        self._unused = [
            None if placeholder.consumers() else tf.zeros(placeholder.shape, placeholder.dtype)
            for placeholder in placeholders
        ]
        self._captured = self._function.captured_inputs
        self._output_types = [output.dtype for output in self._function.outputs]
        self._is_checked = False

    def act(self, time_step: ts.TimeStep) -> policy_step.PolicyStep:
        """Returns actions for `num_environments` environments. See `Acting.act`."""
        self._begin_anew(time_step)
        columns = tree.flatten(time_step)
        if not self._is_checked:
            self._check(columns)
        if self._has_state:  # it may keep a column, whose memory the environments overwrite
            columns = [np.array(column) for column in columns]
        inputs = [column if unused is None else unused for column, unused in zip(columns, self._unused)]
        # Call the function's operation directly: Python's call path takes five times as long.
        outputs = iter(
            tf.raw_ops.StatefulPartitionedCall(
                args=[*inputs, *tf.nest.flatten(self._state), *self._captured],
                Tout=self._output_types,
                f=self._function,
            )
        )
        # Part by part, because packing the whole step takes a tenth of the call.
        action, self._state, info = (
            tree.unflatten_as(part, list(itertools.islice(outputs, len(tree.flatten(part)))))
            for part in self._step_structure
        )
        action, info = tree.map_structure(np.asarray, (action, info))
        return policy_step.PolicyStep(action, (), info)

    def _check(self, columns: list[np.ndarray]) -> None:
        """Checks the columns against the policy's inputs, because the operation does not. Raises `ValueError`."""
        for column, placeholder in zip(columns, self._function.inputs):
            is_of_type = column.dtype == placeholder.dtype.as_numpy_dtype
            if not is_of_type or not placeholder.shape.is_compatible_with(column.shape):
                raise ValueError(
                    f"the environments give {column.dtype}{list(column.shape)} where the policy takes "
                    f"{placeholder.dtype.name}{list(placeholder.shape)} for '{placeholder.op.name}'"
                )
        self._is_checked = True

    def _begin_anew(self, time_step: ts.TimeStep) -> None:
        """Resets the policy's state where an episode starts."""
        if not self._has_state:
            return
        first = time_step.step_type == StepType.FIRST
        if first.any():
            self._state = tf.nest.map_structure(
                lambda initial, state: tf.where(first.reshape([-1] + [1] * (len(state.shape) - 1)), initial, state),
                self._initial_state,
                self._state,
            )


def _unnamed(specs: Any) -> list[tf.TensorSpec]:
    """Returns the leaves without names: TensorFlow would treat named ones as keyword arguments."""
    return [tf.TensorSpec(spec.shape, spec.dtype) for spec in tf.nest.flatten(specs)]


class RandomActing:
    """Acts uniformly at random within the action spec."""

    def __init__(
        self,
        time_step_spec: Any,
        action_spec: Any,
        info_spec: Any,
        num_environments: int,
        seed: int,
        num_repeats: int = 1,
    ):
        """Args:
        time_step_spec, action_spec: Array specs of one environment.
        info_spec: Info spec of the policy that it replaces.
        num_environments: Number of environments.
        seed: Seed of the actions.
        num_repeats: Number of steps for which each action is held.
        """
        self._policy = random_py_policy.RandomPyPolicy(
            time_step_spec, action_spec, seed=seed, outer_dims=(num_environments,)
        )
        self._num_repeats, self._num_given = num_repeats, 0
        self._held: Any = None
        self._info = tree.map_structure(lambda spec: np.zeros((num_environments, *spec.shape), spec.dtype), info_spec)

    def act(self, time_step: ts.TimeStep) -> policy_step.PolicyStep:
        """Returns random actions. See `Acting.act`."""
        if self._num_given % self._num_repeats == 0:
            self._held = self._policy.action(time_step)
        self._num_given += 1
        return self._held._replace(info=self._info)
