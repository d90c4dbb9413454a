"""Moments are saved under the names of their variables."""

from __future__ import annotations

import pytest
import tensorflow as tf

from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.lifecycle import ExitCode, RoleError


class Agent(tf.Module):
    """Two variables of one shape, and an optimizer that was given them in this or the other order."""

    def __init__(self, optimizer, backwards=False):
        super().__init__()
        self.first, self.second = tf.Variable([0.0, 0.0]), tf.Variable([0.0, 0.0])
        self.optimizer = optimizer
        self.steps = tf.Variable(0, dtype=tf.int64)
        gradients = [(tf.constant([1.0, 2.0]), self.first), (tf.constant([3.0, 4.0]), self.second)]
        optimizer.apply_gradients(gradients[::-1] if backwards else gradients)

    def momentum(self, variable):
        return self.optimizer.momentums[self.optimizer._index_dict[self.optimizer._var_key(variable)]]


def sgd():
    return tf.keras.optimizers.SGD(1.0, momentum=0.9)


def checkpoints_of(folder, agent):
    return Checkpoints(folder, agent.steps, {"agent": agent})


def forget(agent):
    for variable in agent.optimizer.variables:
        variable.assign(tf.zeros_like(variable))


def test_an_agent_that_lists_its_variables_in_another_order_gets_each_moment_back(tmp_path):
    """By index, the momentum of one layer would push another."""
    checkpoints_of(tmp_path, Agent(sgd())).save({})
    agent = Agent(sgd(), backwards=True)
    forget(agent)
    checkpoints_of(tmp_path, agent).restore()
    assert agent.momentum(agent.first).numpy().tolist() == [-1.0, -2.0]
    assert agent.momentum(agent.second).numpy().tolist() == [-3.0, -4.0]
    assert int(agent.optimizer.iterations) == 1


def test_a_checkpoint_from_before_the_moments_had_names_is_restored_and_then_saved_with_names(tmp_path):
    """A run that has trained for days must resume after an upgrade."""
    agent = Agent(sgd())
    counts = tf.Variable("{}", dtype=tf.string)
    tf.train.Checkpoint(train_step=agent.steps, counts=counts, agent=agent).write(str(tmp_path / "ckpt-0"))
    upgraded = Agent(sgd())
    forget(upgraded)
    checkpoints = checkpoints_of(tmp_path, upgraded)
    checkpoints.restore()
    assert upgraded.momentum(upgraded.second).numpy().tolist() == [-3.0, -4.0]
    upgraded.steps.assign(1)
    checkpoints.save({})
    again = Agent(sgd(), backwards=True)
    forget(again)
    checkpoints_of(tmp_path, again).restore()
    assert again.momentum(again.second).numpy().tolist() == [-3.0, -4.0]
    assert int(again.steps) == 1


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    """Moments that are silently left out restart from zero."""
    checkpoints_of(tmp_path, Agent(tf.keras.optimizers.Adam())).save({})
    with pytest.raises(
        RoleError, match="ckpt-0 does not fit this experiment: it has _momentums of agent/first"
    ) as raised:
        checkpoints_of(tmp_path, Agent(sgd())).restore()
    assert raised.value.exit_code == ExitCode.DATA


class InOneList(tf.keras.optimizers.SGD):
    """Keeps two moments of each variable in one list."""

    def build(self, var_list):
        super().build(var_list)
        if not hasattr(self, "mixed"):
            self.mixed = [self.add_variable_from_reference(one, kind) for one in var_list for kind in ("a", "b")]


def test_an_optimizer_whose_state_has_no_certain_owner_is_refused_when_the_run_begins(tmp_path):
    """At the first resume, days later, it is too late."""
    with pytest.raises(
        RoleError, match=r"the optimizer agent/optimizer \(InOneList\) keeps .*a/Variable.* so that"
    ) as raised:
        checkpoints_of(tmp_path, Agent(InOneList())).restore()
    assert raised.value.exit_code == ExitCode.USAGE


def test_an_optimizer_of_variables_that_are_not_the_agents_is_refused_when_the_run_begins(tmp_path):
    """A network that hangs on nothing is trained, and is new after each resume."""
    agent = Agent(sgd())
    stray = tf.Variable([1.0])
    agent.others = sgd()
    agent.others.apply_gradients([(tf.constant([1.0]), stray)])
    with pytest.raises(RoleError, match=r"the optimizer agent/others \(SGD\) trains variables that are not part"):
        checkpoints_of(tmp_path, agent).restore()
