"""What a learner finds at its start: a full replay, other learners, strangers' rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from actorlearner import variable_container
from actorlearner.cluster import Cluster
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, Stopped
from actorlearner.training.takeover import UNKNOWN_STEPS, furthest_step, refuse_second_learner, restore_replay
from actorlearner.variable_container import VERSION_SIGNATURE, VERSION_TABLE, Phase, Publisher


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
    with pytest.raises(Stopped, match="reading the replay server at host:1"):
        restore_replay(source, {}, Cluster("host:1", "host:1"), stop)


@pytest.fixture
def board(serve):
    """The address of a version board, and `say(**values)`, which puts a row there."""
    address = f"localhost:{serve([messages.make_board(VERSION_TABLE, VERSION_SIGNATURE)]).port}"

    def say(**values):
        row = {**dict.fromkeys(VERSION_SIGNATURE, 0), **values}
        messages.Sender(address).put(VERSION_TABLE, {name: np.int64(value) for name, value in row.items()}, 30)

    return address, say


def test_one_row_does_not_pass_for_another_learner(board):
    """Any client at the port could block every start of the run with it."""
    address, say = board
    say(learner=7, heartbeat=1)

    class Meanwhile(Stop):
        num_looks = 0

        def wait(self, secs):
            self.num_looks += 1
            say(learner=8, heartbeat=self.num_looks % 2)  # rows of other learners and none that goes on
            return super().wait(0.01)

    meanwhile = Meanwhile()
    assert refuse_second_learner(Cluster(address, address), [], 100, meanwhile, watch_secs=1.0) is None
    assert meanwhile.num_looks > 3


def test_a_learner_whose_heartbeat_goes_on_is_another_learner(serve):
    """Two learners on one container would take turns at the actors' weights."""
    variables = [tf.Variable(0.0)]
    address = f"localhost:{serve(variable_container.make_tables(variables)).port}"
    publisher = Publisher(address, learner=3, heartbeat_secs=0.1)
    publisher.publish(5, variables)
    with pytest.raises(RoleError, match="another learner publishes") as raised:
        refuse_second_learner(Cluster(address, address), [], 100, Stop())
    assert raised.value.exit_code == ExitCode.OCCUPIED
    publisher.close()


def test_weights_from_a_train_step_that_the_run_never_reached_are_not_waited_for(board, tmp_path):
    """The learner publishes nothing older than its predecessor did, so a forged row would silence it to the end."""
    address, say = board
    directory = RunDirectory(tmp_path)
    assert furthest_step(directory, 10**6) == 10**6
    directory.write_json(directory.status, {"train_step": 500, "train_steps_per_sec": 20.0})
    furthest = furthest_step(directory, 10**6)
    assert furthest == 500 + UNKNOWN_STEPS
    for step, is_believed in ((510, True), (10**6, False)):
        say(learner=3, train_step=step, phase=Phase.TRAINING)
        published = refuse_second_learner(Cluster(address, address), [3], furthest, Stop())
        assert (published is not None) is is_believed
