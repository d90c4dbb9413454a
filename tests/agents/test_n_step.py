"""Windows of several steps as one transition: sums, discounts, and the ends of episodes."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents import data_converter
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import StepType, trajectory
from tf_agents.trajectories import time_step as ts

from actorlearner.agents.n_step import to_n_step_transition

GAMMA = 0.9
FIRST, MID, LAST = int(StepType.FIRST), int(StepType.MID), int(StepType.LAST)


def window(step_types, rewards, discounts):
    """Returns one window [1, T]; observation k is k, action k is 10 k."""
    after = [*step_types[1:], MID]
    return trajectory.Trajectory(
        step_type=tf.constant([step_types], tf.int32),
        observation=tf.constant([[[float(k)] for k in range(len(step_types))]]),
        action=tf.constant([[[10.0 * k] for k in range(len(step_types))]]),
        policy_info=(),
        next_step_type=tf.constant([after], tf.int32),
        reward=tf.constant([rewards], tf.float32),
        discount=tf.constant([discounts], tf.float32),
    )


def parts(transition):
    after = transition.next_time_step
    return (
        float(transition.time_step.observation[0, 0]),
        float(transition.action_step.action[0, 0]),
        pytest.approx(float(after.reward[0])),
        pytest.approx(float(after.discount[0])),
        float(after.observation[0, 0]),
        int(after.step_type[0]),
    )


def test_a_whole_window_sums_its_rewards_and_bootstraps_from_its_last_observation():
    """A reward too many or too few shifts every value that is learned."""
    given = window([FIRST, MID, MID, MID], [1.0, 2.0, 3.0, 99.0], [1.0, 1.0, 1.0, 1.0])
    summed = 1.0 + 0.9 * 2.0 + 0.81 * 3.0
    assert parts(to_n_step_transition(given, GAMMA)) == (0.0, 0.0, summed, 0.81, 3.0, MID)


@pytest.mark.parametrize(("last_discount", "expected"), [(0.0, 0.0), (1.0, 0.9)])
def test_a_window_that_meets_the_end_uses_what_there_is(last_discount, expected):
    """Termination must not bootstrap, truncation must, and neither may see the episode that comes after."""
    given = window([MID, MID, LAST, FIRST], [1.0, 2.0, 50.0, 99.0], [1.0, last_discount, 1.0, 1.0])
    assert parts(to_n_step_transition(given, GAMMA)) == (0.0, 0.0, 1.0 + 0.9 * 2.0, expected, 2.0, LAST)


def test_a_window_that_opens_with_the_last_action_is_one_step():
    """The step before a fall is the one from which falling is learned."""
    given = window([MID, LAST, LAST, LAST], [5.0, 7.0, 7.0, 7.0], [0.0, 1.0, 1.0, 1.0])
    assert parts(to_n_step_transition(given, GAMMA)) == (0.0, 0.0, 5.0, 0.0, 1.0, LAST)


def test_whole_windows_are_what_tf_agents_makes_of_them():
    """Its own converter is the reference wherever no episode ends."""
    spec = trajectory.from_transition(
        ts.time_step_spec(tensor_spec.TensorSpec([2], tf.float32)),
        trajectory.policy_step.PolicyStep(tensor_spec.BoundedTensorSpec([1], tf.float32, -1, 1), (), ()),
        ts.time_step_spec(tensor_spec.TensorSpec([2], tf.float32)),
    )
    batch = tensor_spec.sample_spec_nest(tensor_spec.add_outer_dims_nest(spec, (7, 6)), seed=3)
    middle = tf.ones((7, 6), tf.int32)
    batch = batch._replace(
        observation=tf.random.stateless_normal((7, 6, 2), (1, 2)),
        reward=tf.random.stateless_normal((7, 6), (3, 4)),
        discount=tf.ones((7, 6)),
        step_type=middle,
        next_step_type=middle,
    )
    context = data_converter.DataContext(
        time_step_spec=ts.time_step_spec(tensor_spec.TensorSpec([2], tf.float32)),
        action_spec=spec.action,
        info_spec=(),
    )
    theirs = data_converter.AsNStepTransition(context, gamma=GAMMA, n=5)(batch)
    ours = to_n_step_transition(batch, GAMMA)
    for name in ("reward", "discount", "observation"):
        np.testing.assert_allclose(
            getattr(ours.next_time_step, name), getattr(theirs.next_time_step, name), rtol=1e-5, err_msg=name
        )
    np.testing.assert_array_equal(ours.time_step.observation, theirs.time_step.observation)
    np.testing.assert_array_equal(ours.action_step.action, theirs.action_step.action)


def test_an_environment_that_discounts_by_itself_discounts_every_reward_after():
    """Only the last discount would count: values too large, and no word of it."""
    given = window([FIRST, MID, MID, MID], [1.0, 2.0, 3.0, 99.0], [0.5, 0.8, 0.9, 1.0])
    summed = 1.0 + 0.9 * 0.5 * 2.0 + 0.81 * 0.4 * 3.0
    assert parts(to_n_step_transition(given, GAMMA)) == (0.0, 0.0, summed, 0.81 * 0.36, 3.0, MID)
