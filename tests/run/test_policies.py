"""The policies that others load are whole, and the newest."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.evaluations.queue import EvaluationRequests
from actorlearner.experiment import load_experiment
from actorlearner.run import missing_policies
from actorlearner.run.policies import PolicyExport
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.variable_container import Snapshot

NAMES = ("policy", "collect_policy", "greedy_policy")


@pytest.fixture(scope="module")
def experiment():
    return load_experiment("dqn_cartpole", ["dqn.fc_layer_params = (4,)"])


@pytest.fixture
def trained(experiment, tmp_path):
    """An agent, its train step, its export, and `train(step)`, which gives each weight that value."""
    agent, train_step = experiment.make_agent()
    export = PolicyExport(agent, train_step, tmp_path / "policies")

    def train(step):
        train_step.assign(step)
        for variable in agent.collect_policy.variables():
            variable.assign(tf.fill(variable.shape, tf.cast(step, variable.dtype)))

    return agent, train_step, export, train


def weights_of(folder):
    """Returns the train step and the weights' common value of a SavedModel."""
    loaded = tf.saved_model.load(str(folder))
    (value,) = {float(value) for variable in loaded.model_variables for value in variable.numpy().flat}
    return int(loaded.get_train_step()), value


def numbered(folder):
    """Returns the train step and a weight of each numbered policy, by its name's number."""
    found = {}
    for path in sorted((folder / "policies" / "checkpoints").iterdir()):
        reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
        train_step = int(reader.get_tensor("train_step/.ATTRIBUTES/VARIABLE_VALUE"))
        weight = reader.get_tensor("model_variables/0/.ATTRIBUTES/VARIABLE_VALUE").flat[0]
        found[int(path.name.rpartition("_")[2])] = (train_step, float(weight))
    return found


def test_the_saved_models_hold_the_newest_weights_and_their_train_step(trained, tmp_path):
    """Of a run that had not ended they were untrained, and said nothing of it."""
    _, _, export, train = trained
    train(1)
    export.prepare()
    assert weights_of(tmp_path / "policies" / "greedy_policy") == (1, 1.0)
    train(30)
    finish = export.write_policies()
    train(31)  # training goes on before the disk is done
    finish()
    for name in NAMES:
        assert weights_of(tmp_path / "policies" / name) == (30, 30.0)
    assert sorted(path.name for path in (tmp_path / "policies").iterdir()) == sorted([*NAMES, "checkpoints"])
    batch = tf.constant(np.ones((3, 4), np.float32))
    loaded = tf.saved_model.load(str(tmp_path / "policies" / "greedy_policy"))
    time_step = trained[0].time_step_spec._replace(
        step_type=tf.zeros(3, tf.int32), reward=tf.zeros(3), discount=tf.ones(3), observation=batch
    )
    assert loaded.action(time_step).action.shape == (3,)


def test_a_policy_is_not_seen_under_its_number_before_it_is_whole(trained, tmp_path):
    """After 18 kills of the learner 2 of 33 were half-written, and loading them failed."""
    agent, train_step, export, train = trained
    train(100)
    export.write_checkpoint()  # killed before what this returns
    assert not list((tmp_path / "policies" / "checkpoints").glob("policy_checkpoint_*"))
    PolicyExport(agent, train_step, tmp_path / "policies")
    assert not list((tmp_path / "policies" / "checkpoints").iterdir()), "what it left is cleared away"


def test_the_numbered_policies_that_a_restored_train_step_owes_are_made_up(trained, tmp_path, unused_address):
    """A learner killed between a checkpoint and its policy never comes by that step again: 7 of 33 were missing."""
    agent, train_step, export, train = trained
    checkpoints = Checkpoints(tmp_path / "checkpoints", train_step, {"agent": agent})
    ledger = EvaluationLedger(EvaluationRequests(unused_address), tmp_path)
    variables = agent.collect_policy.variables()
    for step in (100, 200, 300, 400, 500):
        train(step)
        if step == 100:
            export.write_checkpoint()()
        if step == 200:
            ledger.request(Snapshot(1, step, [variable.numpy() for variable in variables]))
        if step in (400, 500):
            checkpoints.save({"version": step})
    train(0)
    assert checkpoints.restore() == {"version": 500}
    missing_policies.make_up_missing(100, train_step, variables, checkpoints, ledger, export)
    assert numbered(tmp_path) == {step: (step, float(step)) for step in (100, 200, 400, 500)}  # nobody has those of 300
    assert int(train_step) == 500
    assert {float(value) for variable in variables for value in variable.numpy().flat} == {500.0}
