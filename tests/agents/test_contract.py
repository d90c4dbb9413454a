"""What every algorithm owes, whichever there are: a gin file in gin/agents makes it one of them."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner import variable_container
from actorlearner.experiment import Experiment, load_experiment, shipped_experiments_folder
from actorlearner.run.policies import NAMES, PolicyExport
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.lifecycle import RoleError
from actorlearner.variable_container import Phase, Publisher, Subscriber

ALGORITHMS = sorted(path.stem for path in (shipped_experiments_folder() / "agents").glob("*.gin"))

ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1")  # with actions of one kind and of the other

NUM_ENVIRONMENTS = 3


def load(folder, algorithm: str) -> Experiment:
    """Returns an experiment with the algorithm as its gin file has it, in an environment in which it can act."""
    for env_name in ENVIRONMENTS:
        path = folder / f"{algorithm}_{env_name[0]}.gin"
        path.write_text(
            f"include 'base.gin'\ninclude 'environments/cartpole.gin'\ninclude 'agents/{algorithm}.gin'\n"
            f"gym_environment.env_name = '{env_name}'\ntrain.num_iterations = 1\n"
        )
        experiment = load_experiment(str(path))
        if hasattr(experiment.agent, "normalize_observations"):  # statistics are needed to act, too
            experiment = load_experiment(str(path), [f"{algorithm}.normalize_observations = 'running'"])
        try:
            experiment.make_agent()
        except RoleError as error:
            reason = error
        else:
            return experiment
    raise reason


def make_batch(experiment, agent):
    window = experiment.replay.window(agent)
    spec = tensor_spec.add_outer_dims_nest(agent.collect_data_spec, (4, window.num_steps))
    batch = tensor_spec.sample_spec_nest(spec, seed=1)
    middle = tf.ones((4, window.num_steps), tf.int32)
    return batch._replace(
        observation=tf.clip_by_value(batch.observation, -1.0, 1.0),
        reward=tf.ones_like(batch.reward),
        discount=tf.ones_like(batch.discount),
        step_type=middle,
        next_step_type=middle,
    )


def train(experiment, policies):
    """Makes an update, and lets the statistics, if there are any, be of some observations."""
    tf.function(policies.agent.train)(make_batch(experiment, policies.agent))
    statistics = getattr(policies.agent, "observation_statistics", None)
    if statistics is not None:
        statistics.mean.assign(tf.fill(statistics.mean.shape, 0.25))
        statistics.count.assign(100.0)


@pytest.fixture(scope="module", params=ALGORITHMS)
def experiment(request, tmp_path_factory):
    return load(tmp_path_factory.mktemp("contract"), request.param)


@pytest.fixture(scope="module")
def trained(experiment):
    policies = experiment.policies()
    train(experiment, policies)
    return policies


@pytest.fixture(scope="module")
def time_step(experiment):
    """A first time step of several environments, as columns."""
    environments = experiment.make_environments(NUM_ENVIRONMENTS, "test")
    yield environments.reset()
    environments.close()


def values(policies):
    return [variable.numpy() for variable in policies.variables]


def assert_equal(one, other):
    assert len(one) == len(other)
    for value, other_value in zip(one, other):
        np.testing.assert_array_equal(value, other_value)


def test_there_are_algorithms():
    """A test over none of them passes."""
    assert len(ALGORITHMS) >= 2


def test_an_update_moves_weights_and_is_counted(experiment):
    """The train step is the only clock; an agent may count as it likes, but not nothing."""
    policies = experiment.policies()
    before = values(policies)
    train(experiment, policies)
    assert int(policies.train_step) >= 1
    assert any(np.any(was != now) for was, now in zip(before, values(policies)))


@pytest.mark.parametrize("name", ["collect", "greedy"])
def test_everything_that_acting_needs_is_published(trained, name):
    """An actor whose policy needs more acts by what its own process began with, and nobody sees it."""
    policy = getattr(trained, name)
    specs = tensor_spec.add_outer_dim(policy.time_step_spec, 1)
    acts = tf.function(lambda step: policy.action(step, policy.get_initial_state(1)), autograph=False)
    needed = acts.get_concrete_function(specs).graph.variables
    assert needed
    published = {id(variable) for variable in (*trained.variables, trained.train_step)}
    assert [variable.name for variable in needed if id(variable) not in published] == []


def test_what_is_saved_comes_back(experiment, trained, tmp_path):
    """A resumed run that lacks a variable goes on as another run."""
    Checkpoints(tmp_path, trained.train_step, {"agent": trained.agent}).save({})
    restored = experiment.policies()
    tf.function(restored.agent.train).get_concrete_function(make_batch(experiment, restored.agent))
    Checkpoints(tmp_path, restored.train_step, {"agent": restored.agent}).restore()
    assert int(restored.train_step) == int(trained.train_step)
    assert_equal(values(restored), values(trained))
    assert_equal(
        [variable.numpy() for variable in restored.agent.variables],
        [variable.numpy() for variable in trained.agent.variables],
    )


def test_what_is_published_acts_in_an_actor_as_in_the_learner(serve, experiment, trained, time_step, eventually):
    """Weights in another order, or of another type, would act without a word."""
    address = f"localhost:{serve(variable_container.make_tables(trained.variables)).port}"
    publisher = Publisher(address, learner=1)
    publisher.publish(int(trained.train_step), trained.variables)
    publisher.announce(Phase.TRAINING)
    actor = experiment.policies()
    weights = Subscriber(address, actor.variables, refresh_interval_secs=0.05)
    eventually(lambda: weights.latest() is not None)
    weights.latest().assign_to(actor.variables)
    weights.close()
    publisher.close()
    assert_equal(values(actor), values(trained))
    one, other = (policies.make_greedy(NUM_ENVIRONMENTS).act(time_step).action for policies in (trained, actor))
    np.testing.assert_array_equal(one, other)


def test_greedy_actions_are_the_same_each_time_and_in_bounds(trained, time_step):
    """A return of a policy that explores says nothing of what is handed over."""
    acting = trained.make_greedy(NUM_ENVIRONMENTS)
    first, again = acting.act(time_step).action, acting.act(time_step).action
    np.testing.assert_array_equal(first, again)
    assert (first >= trained.agent.action_spec.minimum).all()
    assert (first <= trained.agent.action_spec.maximum).all()


def test_random_actions_fill_the_collect_policys_place(experiment, trained, time_step):
    """Items of the warm-up must fit into the tables of the rest."""
    step = trained.make_random(NUM_ENVIRONMENTS, seed=1).act(time_step)
    collected = trained.make_collecting(NUM_ENVIRONMENTS).act(time_step)
    tf.nest.assert_same_structure(step.info, collected.info)
    assert step.action.shape == collected.action.shape
    assert step.action.dtype == collected.action.dtype


def test_the_exported_policies_act_as_the_agents_own(experiment, trained, time_step, tmp_path):
    """What is handed over is a file, not the agent."""
    export = PolicyExport(trained.agent, trained.train_step, tmp_path, experiment.environment_action_spec)
    export.save_policies()
    assert {path.name for path in tmp_path.iterdir()} >= set(NAMES)
    loaded = tf.saved_model.load(str(tmp_path / "greedy_policy"))
    columns = tf.nest.map_structure(tf.convert_to_tensor, time_step)
    state = loaded.get_initial_state(NUM_ENVIRONMENTS)
    action = loaded.action(columns, state).action.numpy()
    expected = trained.make_greedy(NUM_ENVIRONMENTS).act(time_step).action
    np.testing.assert_allclose(action, expected, rtol=1e-6)
    assert int(loaded.get_train_step()) == int(trained.train_step)
