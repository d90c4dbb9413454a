"""What every algorithm offers: a factory that makes a TF-Agents agent from specs alone.

No role talks to an algorithm; they all talk to `tf_agent.TFAgent`.
"""

from __future__ import annotations

from typing import Any, Protocol

import tensorflow as tf
from tf_agents.agents import tf_agent

# The types of gin bindings, for the algorithms beside this file.
from actorlearner.runtime.configuration import (  # noqa: F401
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


class AgentFactory(Protocol):
    """Makes the same agent in every process."""

    def make_agent(self, time_step_spec: Any, action_spec: Any, train_step: tf.Variable) -> tf_agent.TFAgent:
        """Returns an agent whose variables are initialised; call it under the learner's strategy scope.

        Args:
          time_step_spec: TF-Agents `TimeStep` of tensor specs, without a batch dimension.
          action_spec: Bounded tensor spec of one action.
          train_step: Scalar int64; the agent counts its updates there.

        The agent may say more than a `TFAgent` does, by two attributes:
          observation_statistics: Has `update(moments)`; the learner calls it with what it takes in (`normalized.py`).
          windows_may_end_early: Whether it trains on windows in which an episode ends before their last step, and then
            looks at nothing that comes after.

        Raises:
          ValueError: The algorithm cannot act in this action space; the message says which can.
        """
        ...
