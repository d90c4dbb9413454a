"""Weight decay that decays, in the optimizer that the agent really uses."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from actorlearner.agents.optimizers import make_adam
from actorlearner.experiment import load_experiment


def test_each_update_takes_the_decay_off_a_kernel_and_nothing_off_a_bias():
    """Keras' own optimizers silently lose their decay on the way into TF-Agents' SAC."""
    kernel, bias = tf.Variable([1.0, -2.0], name="dense/kernel"), tf.Variable([1.0], name="dense/bias")
    optimizer = make_adam(0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.apply_gradients([(tf.zeros_like(kernel), kernel), (tf.zeros_like(bias), bias)])
    np.testing.assert_allclose(kernel, np.array([1.0, -2.0]) * 0.95**3, rtol=1e-6)
    assert bias.numpy().tolist() == [1.0]


def test_the_agent_trains_with_the_optimizer_that_decays():
    """What matters is what `SacAgent` makes of it."""
    agent, _ = load_experiment("sac_minitaur_tutorial", ["sac.weight_decay = 0.5"]).make_agent()
    for optimizer in (agent._actor_optimizer, agent._critic_optimizer):
        variable = tf.Variable([1.0], name="any/kernel")
        optimizer.apply_gradients([(tf.zeros_like(variable), variable)])
        np.testing.assert_allclose(variable, [1.0 - 3e-4 * 0.5], rtol=1e-6)


def test_the_step_size_falls_linearly_to_its_last_value():
    """A schedule in the wrong unit never falls, or falls at once."""
    schedule = make_adam(1e-3, final_learning_rate=1e-4, decay_steps=100)._get_hyper("learning_rate")
    assert [round(float(schedule(step)), 7) for step in (0, 50, 100, 200)] == [1e-3, 5.5e-4, 1e-4, 1e-4]
