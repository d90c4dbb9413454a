"""Discrete actions: agents count them from 0, environments from the start of their space.

TF-Agents' DQN takes only actions that count from 0, and TF-Agents' specs of gym environments ignore the `start` of a
`Discrete` space. So the environment's own spec is corrected, the agent gets the spec `from_zero`, and the offset is
added where an agent's action reaches the environment: in the batch, and in exported policies.
"""

from __future__ import annotations

from typing import Any

import gym
import numpy as np
import tree
from tf_agents.environments import py_environment
from tf_agents.specs import array_spec, tensor_spec

from actorlearner.environments.checks import find_gym


def correct_starts(environment: py_environment.PyEnvironment) -> None:
    """Corrects a gym environment's specs to the bounds of its `Discrete` spaces, which TF-Agents counts from 0."""
    inner = find_gym(environment)
    if inner is not None:
        inner._action_spec = _with_starts(inner.gym.action_space, inner._action_spec)
        inner._observation_spec = _with_starts(inner.gym.observation_space, inner._observation_spec)
        inner._flat_obs_spec = tree.flatten(inner._observation_spec)


def _with_starts(space: Any, spec: Any) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return type(spec)((key, _with_starts(space[key], part)) for key, part in spec.items())
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_with_starts(*pair) for pair in zip(space, spec))
    start = getattr(space, "start", 0) if isinstance(space, gym.spaces.Discrete) else 0
    if not start:
        return spec
    return array_spec.BoundedArraySpec((), spec.dtype, start, start + space.n - 1, spec.name)


def from_zero(action_spec: Any) -> Any:
    """Returns the agent's action specs for the environment's."""
    return tree.map_structure(
        lambda spec, offset: (
            tensor_spec.BoundedTensorSpec(
                spec.shape, spec.dtype, spec.minimum - offset, spec.maximum - offset, spec.name
            )
            if np.any(offset)
            else spec
        ),
        action_spec,
        offsets(action_spec),
    )


def offsets(action_spec: Any) -> Any:
    """Returns the offset from an agent's action to the environment's, for the environment's array or tensor specs."""
    return tree.map_structure(_offset, action_spec)


def _offset(spec: Any) -> np.ndarray:
    dtype = np.dtype(getattr(spec.dtype, "as_numpy_dtype", spec.dtype))
    if dtype.kind not in "iu" or not hasattr(spec, "minimum"):
        return np.zeros((), dtype)
    width = np.max(np.asarray(spec.maximum, object) - np.asarray(spec.minimum, object))
    return np.asarray(spec.minimum if width <= np.iinfo(dtype).max else 0, dtype)
