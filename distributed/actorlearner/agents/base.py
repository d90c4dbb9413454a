"""The interface of an algorithm: a factory that makes a TF-Agents agent from specs alone.

Roles do not use an algorithm directly; they use `tf_agent.TFAgent`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from tf_agents.agents import tf_agent

# The types of gin bindings, for the algorithms in this folder.
from actorlearner.runtime.configuration import (  # noqa: F401
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


class AgentFactory(Protocol):
    """Makes an agent, the same one in every process."""

    def make_agent(self, time_step_spec: Any, action_spec: Any, train_step: tf.Variable) -> tf_agent.TFAgent:
        """Returns an agent whose variables are initialised; call it under the learner's strategy scope.

        Args:
          time_step_spec: TF-Agents `TimeStep` of tensor specs, without a batch dimension.
          action_spec: Bounded tensor spec of one action.
          train_step: Scalar int64; the agent counts there, once in each update or as it likes.

        Everything that acting needs is in the agent's `collect_policy.variables()`. An agent whose
        `train_sequence_length` is None leaves it to the replay how long its windows are. It may say more than a
        `TFAgent` does, by two attributes:
          observation_statistics: Has `update(moments)`; the learner calls it with what it takes in (`normalized.py`).
          windows_may_end_early: Whether it trains on windows in which an episode ends before their last step, and then
            looks at nothing that comes after.

        Raises:
          ValueError: The algorithm does not support this action space; the message says which algorithm does.
        """
        ...


def check_action_bounds(action_spec: Any) -> None:
    """Checks that every continuous action has bounds, for random actions and for the networks' scaling.

    Raises:
      ValueError: A bound is missing, or the lower is above the upper.
    """
    for spec in tf.nest.flatten(action_spec):
        if not spec.dtype.is_floating:
            continue
        with np.errstate(over="ignore"):
            width = np.asarray(spec.maximum, np.float32) - np.asarray(spec.minimum, np.float32)
        if not np.isfinite(width).all() or (width < 0).any():
            raise ValueError(
                f"the environment's action space has no bounds to act between: {spec}. "
                "Give its Box a finite low and high, with low <= high."
            )


def check_continuous_action(algorithm: str, action_spec: Any) -> None:
    """Checks that the action is one float32 array in which every component can vary.

    Raises:
      ValueError: It is not; the message starts with the algorithm's name.
    """
    if tf.nest.is_nested(action_spec) or action_spec.dtype != tf.float32:
        raise ValueError(
            f"{algorithm} needs one float32 action, but the environment's action spec is {action_spec}. "
            "Give the environment one Box with dtype=np.float32 for its action space."
        )
    if not np.all(np.asarray(action_spec.minimum) < np.asarray(action_spec.maximum)):
        raise ValueError(
            f"{algorithm} needs low < high for every part of the action, but the environment's action spec is "
            f"{action_spec}. Leave constant components out of the space."
        )


def check_vector_observation(algorithm: str, time_step_spec: Any) -> None:
    """Checks that the observation is one vector of numbers, as plain networks need.

    Raises:
      ValueError: It is not; the message starts with the algorithm's name.
    """
    spec = time_step_spec.observation
    if tf.nest.is_nested(spec) or spec.shape.rank != 1 or not (spec.dtype.is_floating or spec.dtype.is_integer):
        raise ValueError(
            f"{algorithm} needs one vector of numbers to observe, but the environment's observation spec is {spec}. "
            "Flatten it in the environment (gym.wrappers.FlattenObservation), or write an algorithm that takes it."
        )
