"""The learner's compiled loop: fused by XLA or not, it is the agent's own update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner import variable_container
from actorlearner.cluster import Cluster
from actorlearner.experiment import load_experiment
from actorlearner.replay.chunk_checks import ChunkCheck
from actorlearner.replay.mirror import Mirror
from actorlearner.replay.resident_source import ResidentSource
from actorlearner.replay.servers import ReplayServers
from actorlearner.roles.learner import (
    UNKNOWN_STEPS,
    PublishInterval,
    TimeShares,
    _furthest_step,
    _refuse_second_learner,
    _restore_replay,
    make_train_function,
)
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, Stopped
from actorlearner.variable_container import VERSION_SIGNATURE, VERSION_TABLE, Phase, Publisher

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
    function = make_train_function(agent, train_step, source, strategy, jit_compile=jit_compile)
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


def test_shares_of_time_say_where_it_went():
    """A learner that waits and one that computes look the same from outside; only one of them needs more actors."""
    seconds = iter([0.0, 1.0, 6.0, 6.0, 8.0, 8.0, 9.0, 10.0, 20.0])
    shares = TimeShares(clock=lambda: next(seconds))
    with shares.waiting():  # from 1 to 6
        pass
    with shares.computing():  # from 6 to 8
        pass
    with shares.ingesting():  # from 8 to 9
        pass
    expected = {"waiting_share": 0.5, "computing_share": 0.2, "ingesting_share": 0.1, "between_share": 0.2}
    assert shares.take() == pytest.approx(expected)
    assert shares.take() == {**dict.fromkeys(expected, 0.0), "between_share": 1.0}


def test_weights_are_published_after_the_train_steps_and_the_seconds_asked_for():
    """By the clock alone a machine three times as fast collects with weights three times as many train steps old."""
    now = 0.0
    interval = PublishInterval(train_steps=100, secs=1.0, clock=lambda: now)
    interval.begin(36)
    now = 5.0
    assert not interval.is_over(108)
    assert interval.is_over(144)
    interval.begin(144)
    now = 5.9
    assert not interval.is_over(1_000)
    now = 6.0
    assert interval.is_over(1_000)


def test_a_learner_that_is_filled_looks_up_when_it_is_asked_to_stop():
    """Millions of transitions take a minute to read; a launcher kills what has not ended after some seconds."""
    stop = Stop()

    class Source:
        def restore(self, counts, on_progress):
            on_progress()
            stop.set()
            on_progress()
            raise AssertionError("read on")

    source: Any = Source()
    with pytest.raises(Stopped, match="what the replay server at host:1 holds"):
        _restore_replay(source, {}, Cluster("host:1", "host:1"), stop)


@pytest.fixture
def board(serve):
    """The address of a version board, and `say(**values)`, which puts a row there."""
    address = f"localhost:{serve([messages.make_board(VERSION_TABLE, VERSION_SIGNATURE)]).port}"

    def say(**values):
        row = {**dict.fromkeys(VERSION_SIGNATURE, 0), **values}
        messages.Sender(address).put(VERSION_TABLE, {name: np.int64(value) for name, value in row.items()}, 30)

    return address, say


def test_one_row_does_not_pass_for_another_learner(board):
    """Whoever reaches the port would refuse every start of the run with it."""
    address, say = board
    say(learner=7, heartbeat=1)

    class Meanwhile(Stop):
        num_looks = 0

        def wait(self, secs):
            self.num_looks += 1
            say(learner=8, heartbeat=self.num_looks % 2)  # rows of other learners and none that goes on
            return super().wait(0.01)

    meanwhile = Meanwhile()
    assert _refuse_second_learner(Cluster(address, address), [], 100, meanwhile, watch_secs=1.0) is None
    assert meanwhile.num_looks > 3


def test_a_learner_whose_heartbeat_goes_on_is_another_learner(serve):
    """Two learners on one container would take turns at the actors' weights."""
    variables = [tf.Variable(0.0)]
    address = f"localhost:{serve(variable_container.make_tables(variables)).port}"
    publisher = Publisher(address, learner=3, heartbeat_secs=0.1)
    publisher.publish(5, variables)
    with pytest.raises(RoleError, match="another learner publishes") as raised:
        _refuse_second_learner(Cluster(address, address), [], 100, Stop())
    assert raised.value.exit_code == ExitCode.OCCUPIED
    publisher.close()


def test_weights_from_a_train_step_that_the_run_never_reached_are_not_waited_for(board, tmp_path):
    """The learner publishes nothing older than its last life did: a stranger's row would silence it to the end."""
    address, say = board
    directory = RunDirectory(tmp_path)
    assert _furthest_step(directory, 10**6) == 10**6
    directory.write_json(directory.status, {"train_step": 500, "train_steps_per_sec": 20.0})
    furthest = _furthest_step(directory, 10**6)
    assert furthest == 500 + UNKNOWN_STEPS
    for step, is_believed in ((510, True), (10**6, False)):
        say(learner=3, train_step=step, phase=Phase.TRAINING)
        published = _refuse_second_learner(Cluster(address, address), [3], furthest, Stop())
        assert (published is not None) is is_believed
