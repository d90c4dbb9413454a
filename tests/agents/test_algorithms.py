"""Each algorithm as its gin file configures it: it trains, and its settings reach the agent."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.specs import tensor_spec

from actorlearner.agents.acting import CompiledActing
from actorlearner.experiment import load_experiment
from actorlearner.runtime.checkpoints import Checkpoints


def batch_for(agent, batch_size=4):
    spec = tensor_spec.add_outer_dims_nest(agent.collect_data_spec, (batch_size, agent.train_sequence_length))
    batch = tensor_spec.sample_spec_nest(spec, seed=1)
    middle = tf.ones((batch_size, agent.train_sequence_length), tf.int32)
    return batch._replace(
        observation=tf.clip_by_value(batch.observation, -1.0, 1.0),
        reward=tf.ones_like(batch.reward),
        discount=tf.ones_like(batch.discount),
        step_type=middle,
        next_step_type=middle,
    )


@pytest.mark.parametrize("name", ["dqn_cartpole", "sac_minitaur"])
def test_a_shipped_agent_trains_and_counts_its_train_steps(name):
    """The train step is the only clock there is."""
    agent, train_step = load_experiment(name).make_agent()
    before = [v.numpy() for v in agent.collect_policy.variables()]
    assert int(train_step) == 0
    loss = agent.train(batch_for(agent)).loss
    assert np.isfinite(float(loss))
    assert int(train_step) == 1
    assert any(np.any(a != b.numpy()) for a, b in zip(before, agent.collect_policy.variables()))


def everything_trained(agent):
    """Returns the values of the agent's variables, and of its optimizers', which are in no certain order."""
    optimizers = [part for name, part in vars(agent).items() if name.endswith("_optimizer")]
    assert optimizers
    slots = [sorted(variable.numpy().tobytes() for variable in optimizer.variables()) for optimizer in optimizers]
    return [variable.numpy() for variable in agent.variables], slots


@pytest.mark.parametrize(
    ("name", "bindings", "target"),
    [
        # Neither period divides the number of updates: how long ago the last one was must come back as well.
        ("dqn_cartpole", ["dqn.target_update_period = 3", "dqn.fc_layer_params = (8,)"], "_target_q_network"),
        ("sac_minitaur", ["sac.target_update_period = 3"], "_target_critic_network_1"),
    ],
)
def test_a_restored_agent_makes_the_updates_that_the_saved_one_makes(tmp_path, name, bindings, target):
    """A reset optimizer, or a target network equal to the online one, silently sets a resumed run back."""
    saved, saved_step = load_experiment(name, bindings).make_agent()
    batch = batch_for(saved)

    def update(agent):
        tf.config.run_functions_eagerly(True)  # quick for so few, and only so a seed is set anew
        try:
            tf.random.set_seed(5)  # SAC draws actions
            agent.train(batch)
        finally:
            tf.config.run_functions_eagerly(False)

    for _ in range(4):
        update(saved)
    behind = getattr(saved, target).variables[0].numpy()
    Checkpoints(tmp_path, saved_step, {"agent": saved}).save({})

    restored, restored_step = load_experiment(name, bindings).make_agent()
    tf.function(restored.train).get_concrete_function(batch)  # as the learner: its optimizers have their variables then
    Checkpoints(tmp_path, restored_step, {"agent": restored}).restore()
    for num_updates in range(3):
        (variables, slots), (others, other_slots) = everything_trained(saved), everything_trained(restored)
        assert len(variables) == len(others)
        for variable, one, other in zip(saved.variables, variables, others):
            np.testing.assert_array_equal(one, other, f"{variable.name} after {num_updates} more updates")
        assert slots == other_slots, f"after {num_updates} more updates"
        update(saved)
        update(restored)
    assert (getattr(saved, target).variables[0].numpy() != behind).any(), "it was updated in between"


def make_dqn(*bindings):
    return load_experiment("dqn_cartpole", bindings).make_agent()


def test_n_step_updates_lengthen_the_windows():
    """Windows of two steps under n = 5 would train on rewards that are not there."""
    assert make_dqn("dqn.n_step_update = 5")[0].train_sequence_length == 6
    assert make_dqn("dqn.n_step_update = 1")[0].train_sequence_length == 2


@pytest.mark.parametrize("double_q", [True, False])
def test_double_q_chooses_the_agent(double_q):
    """A setting that nothing reads is worse than none."""
    agent, _ = make_dqn(f"dqn.double_q = {double_q}")
    assert isinstance(agent, dqn_agent.DdqnAgent) is double_q


def test_epsilon_falls_with_the_train_step_that_an_actor_is_given():
    """Every actor follows the learner's clock; one that counted its own steps would explore too long."""
    bindings = ("dqn.initial_epsilon = 1.0", "dqn.epsilon_greedy = 0.0", "dqn.epsilon_decay_steps = 10")
    agent, train_step = make_dqn(*bindings)
    agent.policy.variables()[-1].assign([10.0, 0.0])  # greedy is action 0
    acting = CompiledActing(agent.collect_policy, 400)
    spec = tensor_spec.add_outer_dim(agent.time_step_spec, 400)
    batch = tensor_spec.sample_spec_nest(spec, seed=1)._replace(observation=tf.zeros((400, 4)))
    columns = tf.nest.map_structure(lambda column: column.numpy(), batch)

    def share_of_others(step):
        train_step.assign(step)
        return np.mean(acting.act(columns).action)

    assert 0.4 < share_of_others(0) < 0.6
    assert 0.15 < share_of_others(5) < 0.35
    assert share_of_others(10) == 0
    assert share_of_others(1_000) == 0


def test_the_learning_rate_falls_linearly_to_its_last_value():
    """A schedule in the wrong unit never falls, or falls at once."""
    agent, _ = make_dqn(
        "dqn.learning_rate = 1e-3", "dqn.final_learning_rate = 1e-4", "dqn.learning_rate_decay_steps = 100"
    )
    schedule = agent._optimizer._learning_rate  # the public one is today's value
    assert [round(float(schedule(step)), 7) for step in (0, 50, 100, 200)] == [1e-3, 5.5e-4, 1e-4, 1e-4]


def test_sac_takes_its_networks_from_gin():
    """The tutorial's 256 units are a default that a user will want to change."""
    agent, _ = load_experiment(
        "sac_minitaur_tutorial", ["sac.actor_fc_layer_params = (7, 6)", "sac.critic_joint_fc_layer_params = (5,)"]
    ).make_agent()
    assert [tuple(v.shape) for v in agent.collect_policy.variables() if len(v.shape) == 2][:2] == [(28, 7), (7, 6)]
