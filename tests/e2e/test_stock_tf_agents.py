"""TF-Agents' own distributed classes join a running system, without a line of our package on their side."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reverb
import tensorflow as tf
import tree
from tf_agents.agents.dqn import dqn_agent
from tf_agents.drivers import py_driver
from tf_agents.environments import suite_gym
from tf_agents.experimental.distributed import reverb_variable_container
from tf_agents.networks import q_network
from tf_agents.policies import random_py_policy
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils
from tf_agents.specs import tensor_spec
from tf_agents.train.utils import spec_utils, train_utils
from tf_agents.trajectories import trajectory

from actorlearner.experiment import load_experiment
from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.uniform import UniformReplay
from actorlearner.runtime.ports import find_free_port
from tests.e2e.processes import START_SECS, TINY, Process, Processes, bind

TABLE = "uniform_table"
NUM_STEPS = 2
NUM_STRAYS = 20  # of about 200 items: hardly a batch is without one
SERVER_SAMPLED = (
    *TINY,
    "experiment.replay = @uniform_replay()",
    "uniform_replay.rate_limiter = 'min_size'",
    "dqn.n_step_update = 1",
    "dqn.fc_layer_params = (8,)",
    "train.num_iterations = 40",
    "train.log_interval = 20",
    "train.eval_interval = 0",
    "replay_server.linger_secs = 600.0",  # the test ends it
)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("stock")) as processes:
        yield processes


@pytest.fixture(scope="module")
def learner_side(started: Processes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Process, Path]:
    """A replay server and a learner, with nobody of ours collecting; a stranger has inserted what does not fit."""
    address = f"localhost:{find_free_port()}"
    root_dir = tmp_path_factory.mktemp("learner")
    flags = [f"--replay_address={address}", *bind(*SERVER_SAMPLED)]
    server = started.start("replay-server", "dqn_cartpole", *flags)
    learner = started.start("learner", "dqn_cartpole", f"--root_dir={root_dir}", "--num_video_episodes=0", *flags)
    server.await_line("serving")
    with reverb.Client(address).trajectory_writer(num_keep_alive_refs=1, validate_items=False) as stranger:
        stranger.append({"nothing": np.zeros(3, np.float32)})
        for _ in range(NUM_STRAYS):
            stranger.create_item(TABLE, 1.0, {"nothing": stranger.history["nothing"][-1:]})
        stranger.flush(timeout_ms=int(START_SECS * 1000))
    return address, learner, root_dir


@pytest.fixture(scope="module")
def actor_side(started: Processes) -> str:
    """A replay server that one collect actor of ours fills, with no learner."""
    address = f"localhost:{find_free_port()}"
    flags = [f"--replay_address={address}", *bind(*SERVER_SAMPLED)]
    server = started.start("replay-server", "dqn_cartpole", *flags)
    started.start("collect-actor", "dqn_cartpole", *flags)
    server.await_line("serving")
    return address


def _make_environment():
    return suite_gym.load("CartPole-v1", max_episode_steps=60)


@pytest.fixture(scope="module")
def stock_agent() -> tuple[Any, tf.Variable]:
    """The agent as a TF-Agents user would build it beside the experiment's."""
    environment = _make_environment()
    _, action_spec, time_step_spec = spec_utils.get_tensor_specs(environment)
    train_step = train_utils.create_train_step()
    agent = dqn_agent.DqnAgent(
        time_step_spec,
        action_spec,
        q_network=q_network.QNetwork(environment.observation_spec(), environment.action_spec(), fc_layer_params=(8,)),
        optimizer=tf.keras.optimizers.Adam(1e-3),
        train_step_counter=train_step,
    )
    agent.initialize()
    return agent, train_step


def test_a_learner_of_ours_trains_on_what_stock_observers_write(learner_side, stock_agent):
    """A table that only our writer can fill would strand everybody's collecting code."""
    address, learner, _ = learner_side
    agent, _ = stock_agent
    environment = _make_environment()
    policy = random_py_policy.RandomPyPolicy(environment.time_step_spec(), environment.action_spec(), seed=0)
    observer = reverb_utils.ReverbAddTrajectoryObserver(
        reverb.Client(address), table_name=TABLE, sequence_length=NUM_STEPS, stride_length=1
    )
    driver = py_driver.PyDriver(environment, policy, [observer], max_steps=200)
    driver.run(environment.reset())
    observer.close()
    assert reverb.Client(address).server_info(timeout=10)[TABLE].current_size >= 100
    learner.await_line("train step 40:")
    assert learner.wait(START_SECS) == 0, learner.output


def test_a_learner_trains_on_though_a_stranger_inserts_what_does_not_fit(learner_side):
    """Otherwise it ends with exit code 1, and so does each restarted one, because the item is still there."""
    address, learner, _ = learner_side
    assert learner.wait(START_SECS) == 0, learner.output
    said = f"W .*an item in the table '{TABLE}' at {address} is not this experiment's: Inconsistent number"
    assert len(re.findall(said, learner.output)) == 1, learner.output


def test_a_stock_variable_container_brings_the_learners_weights_into_a_stock_policy(learner_side, stock_agent):
    """The stock collect and eval jobs read weights this way, by structure and order alone."""
    address, learner, root_dir = learner_side
    assert learner.wait(START_SECS) == 0, learner.output
    agent, train_step = stock_agent
    policy = agent.collect_policy
    variables = {
        reverb_variable_container.POLICY_KEY: policy.variables(),
        reverb_variable_container.TRAIN_STEP_KEY: train_step,
    }
    container = reverb_variable_container.ReverbVariableContainer(
        address, table_names=[reverb_variable_container.DEFAULT_TABLE]
    )
    before = [np.array(variable) for variable in policy.variables()]
    pulled = container.pull()
    container.update(variables)
    assert int(train_step) == 40 == int(pulled[reverb_variable_container.TRAIN_STEP_KEY])
    trained = tf.saved_model.load(str(root_dir / "policies" / "collect_policy")).model_variables
    assert len(trained) == len(policy.variables()) == len(before)
    for now, expected in zip(policy.variables(), trained):
        np.testing.assert_array_equal(now, expected)
    assert any((was != np.array(now)).any() for was, now in zip(before, policy.variables()))


def test_a_stock_replay_buffer_reads_what_our_collect_actor_writes(actor_side: str, stock_agent):
    """A stock learner beside our actors must get batches its agent can train on."""
    agent, _ = stock_agent
    buffer = reverb_replay_buffer.ReverbReplayBuffer(
        agent.collect_data_spec,
        sequence_length=NUM_STEPS,
        table_name=TABLE,
        server_address=actor_side,
        rate_limiter_timeout_ms=int(START_SECS * 1000),
    )
    dataset = buffer.as_dataset(sample_batch_size=16, num_steps=NUM_STEPS)
    experience, info = next(iter(dataset))
    assert experience.observation.shape == (16, NUM_STEPS, 4)
    # The next observation of a window's first step is the observation of its second.
    assert not np.any(np.all(experience.observation[:, 0] == experience.observation[:, 1], axis=-1))
    assert not np.any(experience.is_boundary().numpy()[:, 0]), "a window never begins on the last step of an episode"
    assert np.isfinite(float(agent.train(experience).loss))


def _record_episodes(num_episodes: int, environment: Any) -> list[trajectory.Trajectory]:
    """Returns the steps of whole episodes, each with its boundary."""
    policy = random_py_policy.RandomPyPolicy(environment.time_step_spec(), environment.action_spec(), seed=1)
    steps: list[trajectory.Trajectory] = []
    py_driver.PyDriver(
        environment, policy, [steps.append], max_episodes=num_episodes, end_episode_on_boundary=True
    ).run(environment.reset())
    return steps


def _read_all(client: reverb.Client, spec: Any, num_steps: int, num_items: int) -> list[Any]:
    dataset = reverb.TrajectoryDataset(
        client.server_address,
        TABLE,
        dtypes=tree.map_structure(lambda s: s.dtype, spec),
        shapes=tree.map_structure(lambda s: tf.TensorShape([num_steps]).concatenate(s.shape), spec),
        max_in_flight_samples_per_worker=1,
        num_workers_per_iterator=1,
        max_samples=num_items,
        rate_limiter_timeout_ms=10_000,
    )
    return [tree.map_structure(np.asarray, sample.data) for sample in dataset]


@pytest.mark.parametrize("num_steps", [2, 6])
def test_our_writer_makes_item_for_item_what_the_stock_observer_makes(num_steps: int):
    """One window more or less at an episode's end trains on a transition that never was."""
    environment = _make_environment()
    steps = _record_episodes(3, environment)
    assert sum(bool(step.is_boundary()) for step in steps) == 3
    policy = random_py_policy.RandomPyPolicy(environment.time_step_spec(), environment.action_spec())
    spec = tensor_spec.from_spec(policy.collect_data_spec)
    servers = [
        reverb.Server([reverb.Table.queue(TABLE, 1_000, signature=tensor_spec.add_outer_dim(spec))], port=None)
        for _ in range(2)
    ]
    ours, stock = [reverb.Client(f"localhost:{server.port}") for server in servers]

    observer = reverb_utils.ReverbAddTrajectoryObserver(stock, table_name=TABLE, sequence_length=num_steps)
    for step in steps:
        observer(step)
    observer.close()
    replay = UniformReplay(chunk_length=4, max_pending_items=16)
    experiment = load_experiment("dqn_cartpole")
    agent, _ = experiment.make_agent()
    sampling = dataclasses.replace(experiment.sampling(agent), num_steps=num_steps, num_environments=1)
    sink = replay.make_sink(ReplayServers([ours.server_address]), sampling)
    for step in steps:
        sink.append(tree.map_structure(lambda leaf: np.asarray(leaf)[None], step), 0, np.array([False]))
        assert not sink.is_blocked()
    sink.close(10.0)

    num_items = [client.server_info(timeout=10)[TABLE].current_size for client in (ours, stock)]
    assert num_items[0] == num_items[1] > 20
    for our_item, stock_item in zip(*(_read_all(client, spec, num_steps, num_items[0]) for client in (ours, stock))):
        tree.map_structure(np.testing.assert_array_equal, our_item, stock_item)
    for server in servers:
        server.stop()
