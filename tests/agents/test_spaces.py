"""Spaces that an algorithm cannot take are refused by name; exported policies give the environment's own actions."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.policies import policy_saver, random_tf_policy
from tf_agents.specs import array_spec, tensor_spec
from tf_agents.trajectories import time_step as ts

from actorlearner.agents.base import check_action_bounds
from actorlearner.agents.dqn import Dqn
from actorlearner.agents.exported import with_environment_actions
from actorlearner.agents.sac import Sac
from actorlearner.environments.actions import from_zero, offsets

VECTOR = tensor_spec.TensorSpec((3,), tf.float32)


def box(low, high, shape=(2,), dtype=tf.float32):
    return tensor_spec.BoundedTensorSpec(shape, dtype, low, high, "action")


def whole(low, high, shape=(), dtype=tf.int64):
    return tensor_spec.BoundedTensorSpec(shape, dtype, low, high, "action")


@pytest.mark.parametrize(
    "bounds", [(-np.inf, np.inf), (0.0, np.inf), ([-np.inf, 0.0], 1.0), (-3e38, 3e38), (1.0, -1.0)]
)
def test_actions_without_bounds_are_refused(bounds):
    """Random ones would be drawn up to 1e38, and the first update gives a NaN."""
    with pytest.raises(ValueError, match="no bounds to act between: .*Give its Box a finite low and high"):
        check_action_bounds({"move": box(*bounds), "fire": whole(0, 1)})
    check_action_bounds({"move": box(-1.0, 1.0), "fire": whole(0, 1)})


@pytest.mark.parametrize(
    ("factory", "observation", "action", "message"),
    [
        (Sac, VECTOR, whole(0, 2), "sac needs one continuous"),
        (Sac, VECTOR, whole(0, 1, (4,), tf.int32), "sac needs one continuous"),
        (Sac, VECTOR, {"a": box(-1.0, 1.0)}, "sac needs one float32 action"),
        (Sac, VECTOR, (box(-1.0, 1.0), whole(0, 2)), "sac needs one continuous"),
        (Sac, VECTOR, box(-1.0, 1.0, dtype=tf.float64), "sac needs one float32 action"),
        (
            Sac,
            VECTOR,
            box(np.array([0, 1], np.float32), np.array([0, 2], np.float32)),
            "sac needs low < high for every part",
        ),
        (Sac, {"a": VECTOR}, box(-1.0, 1.0), "sac needs one vector of numbers to observe"),
        (Dqn, VECTOR, box(-1.0, 1.0), "dqn needs one discrete"),
        (Dqn, VECTOR, whole(0, 2, (2,)), "dqn needs one discrete"),
        (Dqn, VECTOR, {"a": whole(0, 2)}, "dqn needs one discrete"),
        (Dqn, {"a": VECTOR}, whole(0, 2), "dqn needs one vector of numbers to observe"),
        (Dqn, tensor_spec.TensorSpec((8, 8, 3), tf.uint8), whole(0, 2), "dqn needs one vector of numbers to observe"),
        (Dqn, tensor_spec.TensorSpec((), tf.int64), whole(0, 2), "dqn needs one vector of numbers to observe"),
    ],
)
def test_spaces_that_an_algorithm_cannot_take_are_refused_by_name(factory, observation, action, message):
    """Keras' error about a layer does not say which space to change."""
    with pytest.raises(ValueError, match=message):
        factory().make_agent(ts.time_step_spec(observation), action, tf.Variable(0, dtype=tf.int64))


def test_whole_numbers_count_from_zero_for_the_agent_and_all_else_stays_as_it_is():
    """DQN takes no others; what has been restored from a run directory must not change its spec."""
    spec = {"a": whole(-2, 0), "b": box(-1.0, 1.0), "c": whole(0, 4)}
    own = from_zero(spec)
    assert (int(own["a"].minimum), int(own["a"].maximum)) == (0, 2)
    assert own["b"] is spec["b"] and own["c"] is spec["c"]
    assert tf.nest.map_structure(int, offsets({"a": spec["a"], "c": spec["c"]})) == {"a": -2, "c": 0}
    huge = array_spec.BoundedArraySpec((), np.int64, np.iinfo(np.int64).min, np.iinfo(np.int64).max)
    assert offsets(huge) == 0, "there is no room to count from 0"


def test_an_exported_policy_gives_the_environments_actions(tmp_path):
    """A user who plays it in the environment does not know how the agent counts actions."""
    time_step_spec, environments = ts.time_step_spec(VECTOR), whole(5, 7)
    policy = random_tf_policy.RandomTFPolicy(time_step_spec, from_zero(environments))
    assert with_environment_actions(policy, from_zero(environments)) is policy
    exported = with_environment_actions(policy, environments)
    policy_saver.PolicySaver(exported, batch_size=None).save(str(tmp_path / "policy"))
    loaded = tf.saved_model.load(str(tmp_path / "policy"))
    time_step = ts.restart(tf.zeros((200, 3)), batch_size=200)
    assert set(loaded.action(time_step).action.numpy()) == {5, 6, 7}
