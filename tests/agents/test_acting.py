"""Acting for a batch gives what the policy gives, and keeps its state per environment."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.networks import actor_distribution_rnn_network
from tf_agents.policies import actor_policy, greedy_policy, tf_policy
from tf_agents.specs import array_spec, tensor_spec
from tf_agents.trajectories import policy_step
from tf_agents.trajectories import time_step as ts

from actorlearner.agents.acting import CompiledActing, RandomActing
from actorlearner.experiment import load_experiment

OBSERVATION = tensor_spec.TensorSpec((3,), tf.float32)
ACTION = tensor_spec.BoundedTensorSpec((2,), tf.float32, -1.0, 1.0)
SPEC = ts.time_step_spec(OBSERVATION)


def stack(*time_steps):
    """Returns time steps as columns, as a batch of environments gives them."""
    return tf.nest.map_structure(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *time_steps)


def observe(*observations):
    return stack(*(ts.transition(np.full(3, value, np.float32), reward=np.float32(0)) for value in observations))


def test_a_batch_acts_as_the_policy_itself_does():
    """A batch that mixes up its environments still learns something, only worse."""
    experiment = load_experiment("dqn_cartpole", seed=1)
    agent, _ = experiment.make_agent()
    random = np.random.default_rng(0)
    for variable in agent.policy.variables():
        variable.assign(random.normal(size=variable.shape))
    observations = random.normal(size=(30, 4)).astype(np.float32)
    time_steps = [ts.transition(observation, reward=np.float32(0)) for observation in observations]
    batched = CompiledActing(agent.policy, 30).act(stack(*time_steps))
    one_by_one = CompiledActing(agent.policy, 1)
    expected = [int(one_by_one.act(stack(time_step)).action[0]) for time_step in time_steps]
    direct = agent.policy.action(tf.nest.map_structure(tf.convert_to_tensor, stack(*time_steps))).action
    assert batched.action.tolist() == expected == direct.numpy().tolist()
    assert len(set(expected)) == 2, "all actions alike show nothing"
    assert batched.state == ()


def test_new_weights_act_without_compiling_anew():
    """Weights that were baked into the compiled call would make every evaluation one of the first policy."""
    experiment = load_experiment("dqn_cartpole", seed=1)
    agent, _ = experiment.make_agent()
    acting = CompiledActing(agent.policy, 1)
    time_step = ts.transition(np.zeros(4, np.float32), reward=np.float32(0))
    last_bias = agent.policy.variables()[-1]
    for best in (0, 1, 0):
        last_bias.assign([10.0 * (best == 0), 10.0 * (best == 1)])
        assert int(acting.act(stack(time_step)).action[0]) == best


class Counting(tf_policy.TFPolicy):
    """Its action is the number of its calls since the episode began, kept in its state."""

    def __init__(self):
        counts = tensor_spec.BoundedTensorSpec((2,), tf.float32, 0.0, 100.0)
        super().__init__(SPEC, counts, policy_state_spec={"calls": tensor_spec.TensorSpec((1,), tf.float32)})

    def _action(self, time_step, policy_state, seed):
        calls = policy_state["calls"] + 1
        return policy_step.PolicyStep(tf.tile(calls, [1, 2]), {"calls": calls}, ())

    def _distribution(self, time_step, policy_state):
        raise NotImplementedError

    def _variables(self):
        return []


def test_state_is_kept_per_environment_and_begins_anew_with_an_episode():
    """A recurrent policy that remembers the previous episode acts on stale state."""
    acting = CompiledActing(Counting(), 2)
    first, middle = ts.restart(np.zeros(3, np.float32)), ts.transition(np.zeros(3, np.float32), np.float32(0))

    def calls(*time_steps):
        return acting.act(stack(*time_steps)).action[:, 0].tolist()

    assert calls(first, first) == [1, 1]
    assert calls(middle, middle) == [2, 2]
    assert calls(first, middle) == [1, 3]
    assert calls(middle, middle) == [2, 4]


class Remembering(Counting):
    """Its action is the observation of two calls before, kept in its state."""

    def __init__(self):
        actions = tensor_spec.BoundedTensorSpec((3,), tf.float32, 0.0, 100.0)
        super(Counting, self).__init__(SPEC, actions, policy_state_spec=[OBSERVATION, OBSERVATION])

    def _action(self, time_step, policy_state, seed):
        before, last = policy_state
        return policy_step.PolicyStep(tf.identity(before), [last, time_step.observation], ())


def test_what_a_state_keeps_is_not_written_over_by_the_environments():
    """TensorFlow takes numpy's memory without a copy where it is aligned: a state would change behind its policy."""
    acting = CompiledActing(Remembering(), 2)
    time_step = observe(0, 0)
    memory = np.zeros(6 + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    time_step = time_step._replace(observation=memory[start : start + 6].reshape(2, 3))
    seen = []
    for number in range(1, 7):
        time_step.observation[:] = number
        seen.append(acting.act(time_step).action[:, 0].tolist())
    assert seen[2:] == [[1, 1], [2, 2], [3, 3], [4, 4]]


@pytest.mark.parametrize("wrong", [np.zeros((2, 3), np.float64), np.zeros((2, 4), np.float32)])
def test_columns_that_the_policy_does_not_take_are_refused(wrong):
    """A policy that reduces over too many components silently acts on noise."""
    with pytest.raises(ValueError, match=r"float(64|32)\[2, (3|4)\] where the policy takes float32\[2, 3\]"):
        CompiledActing(Counting(), 2).act(observe(0, 0)._replace(observation=wrong))


def test_a_recurrent_network_acts_as_the_policy_itself_does():
    """Its state is a nest of several tensors."""
    network = actor_distribution_rnn_network.ActorDistributionRnnNetwork(
        OBSERVATION, ACTION, input_fc_layer_params=(4,), lstm_size=(5,), output_fc_layer_params=None
    )
    policy = greedy_policy.GreedyPolicy(actor_policy.ActorPolicy(SPEC, ACTION, network))
    acting = CompiledActing(policy, 2)
    state = policy.get_initial_state(2)
    first = stack(*(ts.restart(np.full(3, value, np.float32)) for value in (1, 2)))
    for time_step in (first, observe(3, 4), observe(5, 6)):
        expected = policy.action(tf.nest.map_structure(tf.convert_to_tensor, time_step), state)
        state = expected.state
        np.testing.assert_allclose(acting.act(time_step).action, expected.action.numpy(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_random_actions_stay_within_the_spec_and_reach_its_ends(dtype):
    """An action out of bounds crashes some simulators; one that never reaches them explores too little."""
    array_action = array_spec.BoundedArraySpec((2,), dtype, minimum=-2, maximum=3)
    info = {"log_probability": array_spec.ArraySpec((), np.float32)}
    acting = RandomActing(tensor_spec.to_array_spec(SPEC), array_action, info, 2, seed=3)
    steps = [acting.act(observe(0, 0)) for _ in range(300)]
    actions = np.concatenate([step.action for step in steps])
    assert actions.dtype == dtype
    assert actions.min() >= -2
    assert actions.max() <= 3
    assert actions.min() < -1.8
    assert actions.max() > 2.8
    assert steps[0].info["log_probability"].tolist() == [0.0, 0.0]


def test_random_actions_are_those_of_their_seed():
    """A run that cannot be repeated cannot be debugged."""

    def actions(seed):
        acting = RandomActing(tensor_spec.to_array_spec(SPEC), tensor_spec.to_array_spec(ACTION), (), 3, seed)
        return acting.act(observe(0, 0, 0)).action.tolist()

    assert actions(1) == actions(1)
    assert actions(1) != actions(2)
