"""Normalised observations: one set of statistics in all of an agent's networks, and in all that is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from actorlearner.agents.normalized import NormalizedObservations, RunningStatistics
from actorlearner.experiment import load_experiment
from actorlearner.replay.moments import Moments, moments_of
from actorlearner.runtime.checkpoints import Checkpoints

SPEC = tf.TensorSpec([3], tf.float32)
RUNNING = ("sac.normalize_observations = 'running'", "sac.actor_fc_layer_params = (8,)")
SMALL = (*RUNNING, "sac.critic_joint_fc_layer_params = (8,)", "pybullet_environment.num_past_steps = 0")


def test_statistics_of_parts_are_those_of_the_whole():
    """Chunks come one by one; what is merged wrongly drifts for ever."""
    values = np.random.default_rng(0).normal([1.0, -50.0, 0.0], [0.1, 20.0, 3.0], (1_000, 3)).astype(np.float32)
    statistics = RunningStatistics([3])
    for part in np.split(values, [1, 40, 41, 700]):
        statistics.update(moments_of(part))
    assert float(statistics.count) == 1_000
    np.testing.assert_allclose(statistics.mean, values.mean(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(statistics.variance, values.var(axis=0), rtol=1e-4)


def test_no_observations_change_nothing():
    """An empty chunk would divide by zero, and every weight would be NaN."""
    statistics = RunningStatistics([3])
    statistics.update(moments_of(np.zeros((0, 3), np.float32)))
    assert float(statistics.count) == 0
    assert statistics.variance.numpy().tolist() == [1.0, 1.0, 1.0]


def test_fixed_centre_and_spread_are_used_and_what_is_far_off_is_cut():
    """One wild velocity must not decide what a network says."""
    settings = NormalizedObservations("fixed", (1.0, 0.0, 0.0), (2.0, 1.0, 10.0), 5.0)
    layer = settings.make_normalizer(SPEC).make_layer()
    np.testing.assert_allclose(layer(tf.constant([[3.0, 70.0, -10.0]])), [[1.0, 5.0, -1.0]])


def test_one_number_stands_for_all_components():
    """So that a user need not count them."""
    layer = NormalizedObservations("fixed", (1.0,), (2.0,)).make_normalizer(SPEC).make_layer()
    np.testing.assert_allclose(layer(tf.constant([[3.0, 1.0, -1.0]])), [[1.0, 0.0, -1.0]])


def test_a_centre_that_does_not_fit_is_refused_by_name():
    """TensorFlow's message would be about shapes that broadcast, deep inside a network."""
    with pytest.raises(ValueError, match=r"observation_center has 2 numbers, but an observation has 3 components"):
        NormalizedObservations("fixed", (1.0, 2.0)).make_normalizer(SPEC)


def test_observations_that_are_no_floats_are_refused_by_name():
    """Pixels in uint8 would be cast silently; several leaves would share one mean."""
    with pytest.raises(ValueError, match="normalize_observations = 'running' needs one array of floats"):
        NormalizedObservations("running").make_normalizer(tf.TensorSpec([84, 84, 3], tf.uint8))


@pytest.mark.parametrize("name", ["sac_minitaur", "dqn_cartpole"])
def test_all_networks_of_an_agent_see_the_same_statistics_and_the_policy_carries_them(name):
    """Critics that see other inputs than the actor, or actors that never get the statistics, learn nothing."""
    bindings = SMALL if name == "sac_minitaur" else ("dqn.normalize_observations = 'running'",)
    agent, _ = load_experiment(name, bindings).make_agent()
    statistics = agent.observation_statistics
    dimensions = statistics.mean.shape[0]
    statistics.update(Moments(10, np.full(dimensions, 2.0), np.full(dimensions, 40.0)))
    for variables in (agent.collect_policy.variables(), agent.policy.variables()):
        assert {id(statistics.mean), id(statistics.variance), id(statistics.count)} <= {id(v) for v in variables}
    networks = [part for part in vars(agent).values() if isinstance(part, tf.keras.layers.Layer)]
    layers = [layer for network in networks for layer in network.submodules if "normalized" in layer.name]
    assert len(layers) >= (5 if name == "sac_minitaur" else 2)
    for layer in layers:
        np.testing.assert_allclose(layer(tf.fill((1, dimensions), 4.0)), np.ones((1, dimensions)), rtol=1e-5)


def test_no_update_of_the_weights_moves_the_statistics():
    """Counted in the loss, an observation would weigh as often as it is drawn; a soft update would blend them."""
    agent, _ = load_experiment("sac_minitaur", SMALL).make_agent()
    statistics = agent.observation_statistics
    statistics.update(Moments(10, np.full(28, 2.0), np.full(28, 40.0)))
    before = [v.numpy() for v in (statistics.mean, statistics.variance, statistics.count)]
    from tests.agents.test_algorithms import batch_for

    agent.train(batch_for(agent))
    for one, variable in zip(before, (statistics.mean, statistics.variance, statistics.count)):
        np.testing.assert_array_equal(one, variable.numpy())


def test_a_resumed_agent_goes_on_with_the_statistics(tmp_path):
    """With reset statistics its policy would see other inputs than it learned on."""
    saved, step = load_experiment("sac_minitaur", SMALL).make_agent()
    saved.observation_statistics.update(Moments(10, np.arange(28.0), np.full(28, 40.0)))
    Checkpoints(tmp_path, step, {"agent": saved}).save({})
    restored, step = load_experiment("sac_minitaur", SMALL).make_agent()
    Checkpoints(tmp_path, step, {"agent": restored}).restore()
    assert float(restored.observation_statistics.count) == 10
    np.testing.assert_array_equal(restored.observation_statistics.mean, np.arange(28.0))
    np.testing.assert_array_equal(restored.observation_statistics.variance, np.full(28, 4.0))
