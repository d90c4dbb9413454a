"""Weights on their way from a learner to actors, through real Reverb servers."""

from __future__ import annotations

import dataclasses

import numpy as np
import portpicker
import pytest
import tensorflow as tf

from actorlearner import variable_container
from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.variable_container import UNCONTRADICTED_SECS, Belief, Phase, Publisher, Subscriber, Version


def make_variables(value=0.0):
    return [tf.Variable([value, value], name="weights"), tf.Variable(value, name="bias")]


VARIABLES = make_variables()


@pytest.fixture
def port(serve):
    port = portpicker.pick_unused_port()
    serve(variable_container.make_tables(VARIABLES), port)
    return port


@pytest.fixture
def address(port):
    return f"localhost:{port}"


@pytest.fixture
def publish():
    """`publish(address, learner=1, **options)` makes a publisher that is closed after the test."""
    made = []

    def make(address, learner=1, **options):
        made.append(Publisher(address, learner, **{"heartbeat_secs": 0.1, **options}))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


@pytest.fixture
def subscriber(address):
    subscriber = Subscriber(address, VARIABLES, refresh_interval_secs=0.02)
    yield subscriber
    subscriber.close()


def num_pulls(address):
    table = messages.read_server_info(address, 30)[variable_container.VARIABLES_TABLE]
    return table.rate_limiter_info.sample_stats.completed


def test_published_weights_reach_a_subscriber_whole(address, publish, subscriber, eventually):
    """Weights of one version under the number of another would stamp the data wrongly."""
    assert subscriber.latest() is None
    assert subscriber.phase() is Phase.WARMING_UP
    publish(address, first_version=7).publish(30, make_variables(1.5))
    eventually(subscriber.latest)
    snapshot = subscriber.latest()
    assert (snapshot.version, snapshot.train_step) == (7, 30)
    mine = make_variables()
    snapshot.assign_to(mine)
    assert mine[0].numpy().tolist() == [1.5, 1.5]
    assert float(mine[1]) == 1.5


def test_nothing_is_pulled_while_nothing_is_newer(address, publish, subscriber, eventually):
    """The stock actor pulls all weights after every environment step."""
    publisher = publish(address)
    publisher.publish(0, VARIABLES)
    eventually(subscriber.latest)
    first = variable_container.read_version(address).heartbeat
    eventually(lambda: variable_container.read_version(address).heartbeat > first + 5)
    assert num_pulls(address) == 1
    publisher.publish(1, VARIABLES)
    eventually(lambda: subscriber.latest().version == 1)
    assert num_pulls(address) == 2


def test_a_snapshot_taken_is_published_by_the_next_heartbeat(address, publish, eventually):
    """Training never waits for the network."""
    publisher = publish(address)
    publisher.publish(0, VARIABLES)
    assert publisher.take_snapshot(5, VARIABLES).version == 1
    eventually(lambda: variable_container.read_version(address).train_step == 5)


def test_later_updates_do_not_change_a_snapshot(address, publish):
    """On a CPU a variable's array may share its memory: an evaluation would be of weights trained since."""
    variables = make_variables(1.0)
    snapshot = publish(address).take_snapshot(0, variables)
    for variable in variables:
        variable.assign_add(tf.ones_like(variable))
    assert snapshot.variables[0].tolist() == [1.0, 1.0]
    assert snapshot.variables[1] == 1.0


def test_a_server_that_comes_back_empty_is_filled_again(serve, publish, eventually):
    """Actors would wait for weights that the learner believes it has published: a deadlock."""
    port = portpicker.pick_unused_port()
    address = f"localhost:{port}"
    server = serve(variable_container.make_tables(VARIABLES), port)
    publisher = publish(address)
    publisher.publish(3, make_variables(2.5))
    server.stop()
    serve(variable_container.make_tables(VARIABLES), port)
    subscriber = Subscriber(address, VARIABLES, refresh_interval_secs=0.02)
    eventually(subscriber.latest, secs=90)
    subscriber.close()
    assert subscriber.latest().train_step == 3
    assert subscriber.latest().variables[0].tolist() == [2.5, 2.5]


def test_a_publisher_outlives_a_server_that_is_away(unused_address, publish):
    """The learner continues training while the server restarts."""
    snapshot = publish(unused_address).publish(1, VARIABLES, timeout_secs=0.2)
    assert snapshot.train_step == 1


def test_the_phase_reaches_every_subscriber(address, publish, subscriber, eventually):
    """With a rate limiter, actors block for ever if they do not learn that the learner is gone."""
    publisher = publish(address)
    publisher.publish(0, VARIABLES)
    for phase in (Phase.EVALUATING, Phase.OVER):
        publisher.announce(phase)
        eventually(lambda phase=phase: subscriber.phase() is phase)


def test_the_end_reaches_a_subscriber_that_could_not_pull_the_weights_at_once(address, eventually):
    """An actor that forgets the end because of an error would keep collecting for no one."""
    messages.Sender(address).put(variable_container.VARIABLES_TABLE, {"stray": np.zeros(5, np.float32)}, 30)
    sender = messages.Sender(address)
    news = {"version": 9, "train_step": 3, "phase": Phase.OVER, "learner": 4, "heartbeat": 1, "num_chunks": 0}
    sender.put(variable_container.VERSION_TABLE, {name: np.int64(value) for name, value in news.items()}, 30)
    subscriber = Subscriber(address, VARIABLES, refresh_interval_secs=0.02)
    eventually(lambda: num_pulls(address) >= 3)
    assert not subscriber.has_looked()
    weights = {"policy_variables": [np.ones(2, np.float32), np.float32(1)], "train_step": np.int64(3)}
    sender.put(variable_container.VARIABLES_TABLE, weights, 30)
    eventually(lambda: subscriber.phase() is Phase.OVER)
    subscriber.close()
    assert subscriber.latest().variables[0].tolist() == [1.0, 1.0]


def test_a_living_learner_is_heard_and_a_silent_one_is_not(address, publish, subscriber, eventually):
    """Actors tell a slow learner from a dead one by it."""
    publisher = publish(address)
    publisher.publish(0, VARIABLES)
    eventually(subscriber.latest)
    eventually(lambda: subscriber.learner_silent_secs() < 0.5)
    publisher.close()
    eventually(lambda: subscriber.learner_silent_secs() > 1.0)


def test_weights_of_a_restarted_learner_are_pulled_though_its_versions_begin_lower(
    address, publish, subscriber, eventually
):
    """A learner that lost its checkpoint counts from 0 again: its actors would act on the old weights for ever."""
    first = publish(address, learner=1, first_version=50)
    first.publish(1_000, VARIABLES)
    eventually(subscriber.latest)
    first.close()
    publish(address, learner=2).publish(0, make_variables(4.0))
    eventually(lambda: subscriber.latest().train_step == 0)
    assert subscriber.latest().variables[0].tolist() == [4.0, 4.0]


def test_a_restarted_learner_publishes_nothing_older_than_what_was_published(address, publish, eventually):
    """Restored from a checkpoint of a minute ago, it would send every actor back by a minute."""
    first = publish(address, learner=1)
    first.publish(100, make_variables(1.0))
    first.close()
    published = variable_container.read_version(address)
    again = publish(address, learner=2, published=published)
    again.publish(80, make_variables(0.8))
    now = variable_container.read_version(address)
    assert (now.learner, now.train_step, now.version) == (2, 100, published.version), "its heartbeat, not its weights"
    again.publish(101, make_variables(1.01))
    now = variable_container.read_version(address)
    assert now.train_step == 101 and now.version > published.version


def board_row(**values):
    news = {"version": 0, "train_step": 0, "phase": Phase.TRAINING, "learner": 1, "heartbeat": 0, "num_chunks": 0}
    return {name: np.int64(value) for name, value in {**news, **values}.items()}


@pytest.mark.parametrize("stranger", [{"version": 10**9}, {"version": 2**61}, {"version": 10**9, "learner": 7}])
def test_weights_of_a_version_far_ahead_do_not_stay(address, publish, subscriber, eventually, stranger):
    """The learner's own versions are lower for ever: its actors would keep the foreign weights."""
    publisher, variables = publish(address), make_variables(1.0)
    publisher.announce(Phase.TRAINING)
    publisher.publish(5, variables)
    eventually(lambda: subscriber.latest() and subscriber.latest().train_step == 5)
    sender = messages.Sender(address)
    weights = {"policy_variables": [np.full(2, 9, np.float32), np.float32(9)], "train_step": np.int64(6)}
    sender.put(variable_container.VARIABLES_TABLE, weights, 30)
    sender.put(variable_container.VERSION_TABLE, board_row(**{"heartbeat": 10**6, **stranger}), 30)
    for variable in variables:
        variable.assign(2.0 * variable)
    publisher.publish(7, variables)
    eventually(lambda: subscriber.latest().train_step == 7)
    assert subscriber.latest().variables[0].tolist() == [2.0, 2.0]


def test_weights_that_are_not_finite_are_never_acted_on_and_are_put_right(address, publish, subscriber, eventually):
    """A NaN in the weights makes each action one; nothing newer need come while nothing is trained."""
    publisher = publish(address)
    publisher.publish(5, make_variables(1.0))
    eventually(lambda: subscriber.latest() and publisher._num_puts > 0)
    weights = {"policy_variables": [np.full(2, np.nan, np.float32), np.float32(1)], "train_step": np.int64(6)}
    messages.Sender(address).put(variable_container.VARIABLES_TABLE, weights, 30)
    eventually(lambda: subscriber.latest().version > 0)
    assert (subscriber.latest().train_step, subscriber.latest().variables[0].tolist()) == (5, [1.0, 1.0])
    late = Subscriber(address, VARIABLES, refresh_interval_secs=0.02)
    eventually(late.latest)
    late.close()
    assert late.latest().variables[0].tolist() == [1.0, 1.0]


def test_one_row_does_not_end_training(address, publish, subscriber, eventually):
    """An actor that exits with 0 is not restarted; on other hosts the run would stop."""
    publisher = publish(address)
    publisher.announce(Phase.TRAINING)
    publisher.publish(5, VARIABLES)
    eventually(subscriber.latest)
    belief = Belief()
    assert subscriber.phase() is Phase.TRAINING
    for learner in (1, 99):
        claim = board_row(phase=Phase.OVER, learner=learner, heartbeat=10**6)
        messages.Sender(address).put(variable_container.VERSION_TABLE, claim, 30)
        version = variable_container.read_version(address)
        assert version is not None and not (belief.holds(version) and version.phase is Phase.OVER)
        heard = variable_container.read_version(address).heartbeat
        eventually(lambda heard=heard: variable_container.read_version(address).heartbeat != heard)
        assert subscriber.phase() is Phase.TRAINING
    publisher.announce(Phase.OVER)
    eventually(lambda: subscriber.phase() is Phase.OVER)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_whom_the_board_is_believed():
    """A forged row is replaced within a second; the last row of a learner that has ended stays."""
    clock = Clock()
    belief = Belief(clock)
    first = Version(0, 0, Phase.TRAINING, learner=1, heartbeat=5)
    assert not belief.holds(first)
    assert belief.holds(dataclasses.replace(first, heartbeat=6)), "its next heartbeat"
    assert belief.holds(dataclasses.replace(first, version=3, heartbeat=7)), "known: at once"
    over = dataclasses.replace(first, phase=Phase.OVER, heartbeat=900)
    assert not belief.holds(over)
    assert belief.holds(dataclasses.replace(first, heartbeat=8)), "the true one goes on"
    clock.now += 2 * UNCONTRADICTED_SECS
    assert not belief.holds(dataclasses.replace(over, heartbeat=901)), "what was contradicted does not count"
    clock.now += UNCONTRADICTED_SECS
    assert belief.holds(dataclasses.replace(over, heartbeat=901)), "nobody contradicts"
    assert belief.holds(dataclasses.replace(over, heartbeat=902))


def test_a_second_learner_shows_on_the_version_board(address, publish, eventually):
    """Two learners on one container would take turns at the actors' weights."""
    publish(address, learner=1).publish(0, VARIABLES)
    before = variable_container.read_version(address)
    assert before.learner == 1
    eventually(lambda: variable_container.read_version(address).heartbeat > before.heartbeat)
    publish(address, learner=2).publish(0, VARIABLES)
    eventually(lambda: variable_container.read_version(address).learner == 2)


def test_the_stock_container_pulls_and_updates_the_same_table(address, publish, subscriber, eventually):
    """Stock TF-Agents actors and learners must be able to join."""
    from tf_agents.experimental.distributed import reverb_variable_container as stock

    publish(address, heartbeat_secs=60).publish(12, make_variables(3.5))
    theirs = {stock.POLICY_KEY: make_variables(), stock.TRAIN_STEP_KEY: tf.Variable(0, dtype=tf.int64)}
    container = stock.ReverbVariableContainer(address, [variable_container.VARIABLES_TABLE])
    container.update(theirs)
    assert int(theirs[stock.TRAIN_STEP_KEY]) == 12
    assert theirs[stock.POLICY_KEY][0].numpy().tolist() == [3.5, 3.5]
    theirs[stock.TRAIN_STEP_KEY].assign(13)
    container.push(theirs)
    assert int(container.pull()[stock.TRAIN_STEP_KEY]) == 13


def make_arrays(value):
    return [np.full(2, value, np.float32), np.float32(value)]


def test_waiting_for_another_experiments_container_is_refused(address):
    """Weights of the wrong shape would fail in the middle of a pull, as a gRPC error."""
    others = [tf.Variable([0.0, 0.0, 0.0]), tf.Variable(0.0)]
    with pytest.raises(RoleError, match="the server has float32.2., this experiment float32.3.") as raised:
        variable_container.await_container(address, others, stop=Stop(), deadline_secs=30)
    assert raised.value.exit_code == ExitCode.DATA
    variable_container.await_container(address, VARIABLES, stop=Stop(), deadline_secs=30)


def test_a_server_without_the_containers_table_is_refused(serve):
    """With two addresses it is easy to give the wrong one."""
    server = serve([messages.make_board("board", {"x": tf.TensorSpec((), tf.int64)})])
    with pytest.raises(RoleError, match="not a variable container") as raised:
        variable_container.await_container(f"localhost:{server.port}", VARIABLES, stop=Stop(), deadline_secs=30)
    assert raised.value.exit_code == ExitCode.DATA
