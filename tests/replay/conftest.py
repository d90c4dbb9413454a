"""Fixtures for the tests of every replay."""

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import sequential
from tf_agents.specs import array_spec, tensor_spec
from tf_agents.trajectories import time_step

from actorlearner.replay.resident import ResidentReplay
from tests.replay.episodes import sample


@pytest.fixture(scope="module")
def spec():
    """The collect data spec of a DQN agent with one observation: the number of the step."""
    observation = array_spec.BoundedArraySpec((1,), np.float32, -1e9, 1e9)
    action = tensor_spec.from_spec(array_spec.BoundedArraySpec((), np.int64, 0, 1))
    network = sequential.Sequential([tf.keras.layers.Dense(2)])
    agent = dqn_agent.DqnAgent(
        tensor_spec.from_spec(time_step.time_step_spec(observation)),
        action,
        network,
        tf.keras.optimizers.Adam(1e-3),
        train_step_counter=tf.Variable(0, dtype=tf.int64),
    )
    return agent.collect_data_spec


@pytest.fixture
def replay():
    """A small resident replay."""
    return ResidentReplay(replay_buffer_capacity=1_000, chunk_length=8, stream_length=4)


@pytest.fixture
def address(serve, replay, spec):
    """Of a server with its tables."""
    return f"localhost:{serve(replay.make_tables(spec, sample())).port}"
