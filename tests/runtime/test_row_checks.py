"""What the rows of every table may say."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tree

from actorlearner.evaluations.queue import Purpose
from actorlearner.experiment import load_experiment
from actorlearner.replay.servers import JOINED_TABLE
from actorlearner.reports import EXIT_REASONS_TABLE
from actorlearner.roles import replay_server
from actorlearner.runtime.row_checks import LIMITS, find_misfit, keep_plausible, say_left_out
from actorlearner.variable_container import Phase
from drills.strangers import hostile_rows


@pytest.fixture(scope="module")
def tables():
    """The signatures of all tables but the replay's, by name."""
    _, others = replay_server._make_tables(load_experiment("dqn_cartpole"), ["localhost:1"])
    return {table.name: table.info.signature for table in others}


def test_every_table_has_limits_for_every_field(tables):
    """What a new table says would be believed, whatever it is."""
    assert set(LIMITS) == set(tables)
    for name, signature in tables.items():
        assert set(LIMITS[name]) == set(signature), name


@pytest.mark.parametrize("name", sorted(set(LIMITS) - {EXIT_REASONS_TABLE, JOINED_TABLE}))
def test_each_number_of_a_row_that_cannot_be_true_is_found(tables, name):
    """One that is passed on stays in a checkpoint, ends a role, or is acted on for ever."""
    found = [(row, find_misfit(name, row)) for row in hostile_rows(name, tables[name])]
    assert found
    for row in (row for row, why in found if not why):
        ((path, number),) = [(path, leaf) for path, leaf in tree.flatten_with_path(row) if np.any(leaf != 0)]
        is_identity = path[0] in ("actor", "learner") and number == 2**61
        is_before_the_first_episode = path[0] == "average_return" and np.isnan(number)
        assert is_identity or is_before_the_first_episode, row


def test_the_numbers_with_a_meaning_are_those_of_their_enumerations():
    """A phase that is added here alone would be left out by everybody."""
    for limit, numbers in (
        (LIMITS["variables_version"]["phase"], Phase),
        (LIMITS["evaluations_due"]["purpose"], Purpose),
        (LIMITS["evaluations_done"]["purpose"], Purpose),
        (LIMITS["evaluations_progress"]["purpose"], Purpose),
    ):
        assert sorted(map(int, numbers)) == list(range(int(limit.least), int(limit.most) + 1))


def test_a_count_that_takes_longer_than_it_says_is_found(tables):
    """A count of 10^12 is in range, but no actor makes so many environment steps in a second."""
    row = {name: np.zeros((), spec.dtype.as_numpy_dtype) for name, spec in tables["collect_reports"].items()}
    assert find_misfit("collect_reports", row) is None
    assert "environment_steps" in str(find_misfit("collect_reports", {**row, "environment_steps": np.int64(10**12)}))


def test_what_a_checkpoint_has_that_cannot_be_true_is_dropped():
    """A forged count in a checkpoint would come back with every resume."""
    assert keep_plausible({"1": 5, "2": 2**62, "3": -1, "4": 10**9}) == {"1": 5, "4": 10**9}


def test_numbers_of_any_shape_and_none_are_looked_at():
    """An empty array has no least number; a flag has no range."""
    assert find_misfit("new", {"a": np.zeros((0, 3), np.float32), "b": np.array([True]), "c": np.int64(2)}) is None
    assert "a/1" in str(find_misfit("new", {"a": [np.ones(2), np.array([[1.0, np.nan]])]}))
    assert find_misfit("new", tf.nest.map_structure(np.float32, {"a": 1e38})) is None


def test_a_kind_is_said_once(caplog):
    """A foreign client's loop would fill the log and the disk."""
    for value in range(100):
        say_left_out("host:1", "table", f"field = {value}, expected 0 to 1")
    say_left_out("host:1", "table", "other = 5, expected 0 to 1")
    assert [message.partition(" = ")[0].rpartition(" ")[2] for message in caplog.messages] == ["field", "other"]
