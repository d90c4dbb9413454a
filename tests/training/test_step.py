"""The learner's compiled loop: fused by XLA or not, it is the agent's own update."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner.experiment import load_experiment
from actorlearner.replay.base import Batch, BatchSource
from actorlearner.replay.chunk_checks import ChunkCheck
from actorlearner.replay.mirror import Mirror
from actorlearner.replay.resident_source import ResidentSource
from actorlearner.replay.servers import ReplayServers
from actorlearner.training.step import TrainFunction

NUM_UPDATES = 7


def one_window(spec, num_steps):
    """Returns a chunk with a single window: whatever the random numbers, every batch is the same."""
    step = tf.nest.map_structure(lambda leaf: np.zeros((1, num_steps, *leaf.shape), leaf.dtype.as_numpy_dtype), spec)
    observation = np.linspace(-1, 1, step.observation.size, dtype=np.float32).reshape(step.observation.shape)
    step = step._replace(
        step_type=np.ones((1, num_steps), np.int32),
        next_step_type=np.ones((1, num_steps), np.int32),
        observation=observation,
        reward=np.full((1, num_steps), 100, np.float32),  # far from what it predicts: the error keeps its sign
        discount=np.ones((1, num_steps), np.float32),
    )
    return {
        "acted_at": np.full(num_steps, 0),
        "ends_run": np.zeros((1, num_steps), bool),
        "length": np.int64(num_steps),
        "step": step,
    }


def train(jit_compile, initial=None):
    """Returns the initial and the trained weights, and the last scalars, of some updates in one call."""
    experiment = load_experiment("dqn_cartpole", ["train.batch_size = 8", "dqn.target_update_period = 3"])
    strategy = tf.distribute.get_strategy()
    agent, train_step = experiment.make_agent()
    variables = agent.collect_policy.variables()
    initial = initial or [variable.numpy() for variable in variables]
    for target in (variables, agent._target_q_network.variables):
        for variable, value in zip(target, initial):
            variable.assign(value)
    spec = tensor_spec.from_spec(agent.collect_data_spec)
    mirror = Mirror(spec, agent.train_sequence_length, 10)
    mirror.add(mirror.make_block(one_window(spec, agent.train_sequence_length)))
    source = ResidentSource(
        ReplayServers(["localhost:1"]),
        [mirror],
        batch_size=8,
        initial_collect_steps=0,
        samples_per_insert=1.0,
        error_buffer=1.0,
        check=ChunkCheck(spec, 100),
    )
    function = TrainFunction(agent, train_step, source, strategy, jit_compile=jit_compile)
    scalars = function(source.handle, tf.constant(NUM_UPDATES))
    assert int(train_step) == NUM_UPDATES
    return initial, [variable.numpy() for variable in variables], {name: float(s) for name, s in scalars.items()}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_call_makes_its_updates_and_says_how_old_the_data_was(jit_compile):
    """A loop that runs once, or a staleness that is always zero, would pass for a fast learner."""
    initial, weights, scalars = train(jit_compile)
    assert max(np.abs(now - was).max() for now, was in zip(weights, initial)) > 1e-3
    assert np.isfinite(scalars["loss"])
    assert scalars["staleness"] == NUM_UPDATES - 1


def test_the_program_fused_by_xla_trains_as_the_plain_loop_does():
    """The fast way on a GPU must be the same algorithm."""
    initial, plain, scalars = train(jit_compile=False)
    _, fused, fused_scalars = train(jit_compile=True, initial=initial)
    for one, other in zip(plain, fused):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    assert fused_scalars["loss"] == pytest.approx(scalars["loss"], rel=1e-3)


class WithWeights(BatchSource):
    """The same batch again and again, with weights and keys; notes what the update says of it."""

    def __init__(self, batch, weight):
        self._batch = batch
        self._weight = weight
        self.errors = tf.Variable([0.0, 0.0])
        self.seen = tf.Variable([0, 0])

    def unpack(self, *parts):
        return Batch(self._batch, tf.zeros([2], tf.int64), tf.fill([2], self._weight), tf.constant([3, 1]))

    def after_update(self, batch, loss_info):
        self.seen.assign(batch.keys)
        self.errors.assign(loss_info.extra.td_error)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_weights_reach_the_update_and_its_errors_reach_the_source(weight):
    """A prioritized replay needs both, in the graph: a loop in Python would wait for each update."""
    agent, train_step = load_experiment("dqn_cartpole", ["dqn.n_step_update = 1"]).make_agent()
    spec = tensor_spec.add_outer_dims_nest(agent.collect_data_spec, (2, 2))
    batch = tensor_spec.sample_spec_nest(spec, seed=1)
    middle = tf.ones((2, 2), tf.int32)
    observation = tf.clip_by_value(batch.observation, -1.0, 1.0)
    batch = batch._replace(
        observation=observation, step_type=middle, next_step_type=middle, reward=tf.fill((2, 2), 100.0)
    )
    source = WithWeights(batch._replace(discount=tf.ones((2, 2))), weight)
    before = [variable.numpy() for variable in agent.collect_policy.variables()]
    scalars = TrainFunction(agent, train_step, source, tf.distribute.get_strategy())(None, tf.constant(3))
    moved = max(np.abs(now.numpy() - was).max() for now, was in zip(agent.collect_policy.variables(), before))
    assert (moved > 0) == (float(scalars["loss"]) > 0) == (weight > 0)
    assert source.seen.numpy().tolist() == [3, 1]
    assert (np.abs(source.errors.numpy()) > 1).all()
