"""Boards and queues, on real Reverb servers."""

from __future__ import annotations

import gc
import time

import numpy as np
import portpicker
import pytest
import reverb
import tensorflow as tf
import tree

from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.runtime.messages import Unreachable
from tests.memory import bytes_in_use

SIGNATURE = {"number": tf.TensorSpec((), tf.int64), "values": [tf.TensorSpec((2,), tf.float32)]}


def row(number):
    return {"number": np.int64(number), "values": [np.full(2, number, np.float32)]}


def numbers(rows):
    return [int(row["number"]) for row in rows]


@pytest.fixture
def address(serve):
    tables = [messages.make_board("board", SIGNATURE), messages.make_queue("queue", 3, SIGNATURE)]
    return f"localhost:{serve(tables).port}"


def test_a_board_shows_what_was_put_last_to_everybody(address):
    """A reader that takes the row away would leave the next one without weights."""
    assert messages.read(address, "board", SIGNATURE) is None
    sender = messages.Sender(address)
    for number in (1, 2):
        sender.put("board", row(number), 30)
    for _ in range(2):
        found = messages.read(address, "board", SIGNATURE)
        assert int(found["number"]) == 2
        np.testing.assert_array_equal(found["values"][0], [2, 2])


strays = pytest.mark.parametrize(
    "stray",
    [
        {"number": np.int64(1)},
        {"number": np.int64(1), "values": [np.zeros(3, np.float32)]},
        {"number": np.float32(1), "values": [np.zeros(2, np.float32)]},
    ],
    ids=["leaves", "shape", "type"],
)


@strays
def test_a_strangers_row_on_a_board_is_passed_over_until_the_next_is_put(address, stray):
    """One insert by mistake must not end every role that looks at the board."""
    reader = messages.BoardReader(address, "board", SIGNATURE)
    messages.Sender(address).put("board", stray, 30)
    with pytest.raises(Unreachable, match="'board'"):
        reader.read()
    messages.Sender(address).put("board", row(2), 30)
    assert int(reader.read()["number"]) == 2


def test_a_board_is_read_again_only_when_something_was_put_there(address):
    """Actors look twenty times a second; a reading costs the environment three milliseconds."""
    sender, reader = messages.Sender(address), messages.BoardReader(address, "board", SIGNATURE)
    assert reader.read_newer() is None
    for number in (1, 1, 2):  # the same row again is news as well: a heartbeat
        sender.put("board", row(number), 30)
        assert int(reader.read_newer()["number"]) == number
        assert reader.read_newer() is None
    assert int(reader.read()["number"]) == 2


@pytest.mark.parametrize("take", [messages.take, messages.take_current])
def test_a_queue_hands_out_each_row_once_oldest_first(address, take):
    """A report taken twice would count its steps twice."""
    sender = messages.Sender(address)
    for number in (1, 2, 3):
        sender.put("queue", row(number), 30)
    assert numbers(take(address, "queue", SIGNATURE, max_rows=2)) == [1, 2]
    assert numbers(take(address, "queue", SIGNATURE, max_rows=10)) == [3]
    assert numbers(take(address, "queue", SIGNATURE, max_rows=1)) == []


@strays
def test_a_strangers_row_in_a_queue_is_left_out_and_the_others_arrive(address, stray, caplog):
    """Reports come by the hundred in one reading; one insert by mistake must not cost the others."""
    for line in (row(1), stray, row(2)):
        messages.Sender(address).put("queue", line, 30)
    assert numbers(messages.take_current(address, "queue", SIGNATURE, max_rows=10)) == [1, 2]
    assert "held a row that does not fit" in caplog.text


def test_sixty_strangers_rows_at_the_head_of_a_queue_are_passed_over_in_one_look(serve, caplog):
    """Each cost an eval actor a look, half a second and more: evaluations were silent for a minute."""
    address = f"localhost:{serve([messages.make_queue('queue', 100, SIGNATURE)]).port}"
    sender = messages.Sender(address)
    for _ in range(30):
        sender.put("queue", {"number": np.int64(1), "values": [np.full(2, np.nan, np.float32)]}, 30)
        messages.Sender(address).put("queue", {"number": np.float32(1), "values": [np.zeros(2, np.float32)]}, 30)
    for number in (7, 8):
        sender.put("queue", row(number), 30)
    assert numbers(messages.take(address, "queue", SIGNATURE)) == [7]
    assert numbers(messages.take(address, "queue", SIGNATURE)) == [8], "not one that others may want is lost"
    assert len(caplog.messages) == 2, "each kind once"


@pytest.mark.parametrize("take", [messages.take, messages.take_current])
def test_a_row_that_cannot_be_true_is_left_out_of_a_queue(address, take, caplog):
    """A NaN in one report would make every sum of them a NaN."""
    sender = messages.Sender(address)
    for line in (row(1), {"number": np.int64(5), "values": [np.full(2, np.inf, np.float32)]}, row(3)):
        sender.put("queue", line, 30)
    assert numbers(take(address, "queue", SIGNATURE, max_rows=10)) == [1, 3]
    assert "values/0 = inf" in caplog.text


@pytest.mark.parametrize("steps", [-1, slice(-2, None)], ids=["no step", "two steps"])
def test_an_item_that_is_no_row_is_left_out_and_the_others_arrive(address, steps, caplog):
    """A client that leaves out the time dimension, or writes sequences, is a stranger too."""
    messages.Sender(address).put("queue", row(1), 30)
    with reverb.Client(address).trajectory_writer(num_keep_alive_refs=2, validate_items=False) as writer:
        for number in (2, 3):
            writer.append(row(number))
        writer.create_item("queue", 1.0, tree.map_structure(lambda column: column[steps], writer.history))
    messages.Sender(address).put("queue", row(4), 30)
    assert numbers(messages.take_current(address, "queue", SIGNATURE, max_rows=10)) == [1, 4]
    assert "held a row that does not fit" in caplog.text


def test_rows_taken_every_second_for_weeks_leave_nothing_in_the_process(address):
    """A dataset for each reading leaves about 1 KB: 200 MB a day for two reports a second."""
    sender = messages.Sender(address)

    def take_many():
        for _ in range(300):
            sender.put("queue", row(1), 30)
            assert len(messages.take_current(address, "queue", SIGNATURE, max_rows=10)) == 1
        gc.collect()
        return bytes_in_use()

    take_many()
    before = take_many()
    assert (take_many() - before) / 300 < 200


def test_a_full_queue_is_unreachable_within_the_deadline(address):
    """A writer blocked for good would never look at its stop signal."""
    sender = messages.Sender(address)
    for number in (1, 2, 3):
        sender.put("queue", row(number), 30)
    start = time.monotonic()
    with pytest.raises(Unreachable, match="table 'queue'"):
        sender.put("queue", row(4), 0.3)
    assert time.monotonic() - start < 20
    messages.take(address, "queue", SIGNATURE, max_rows=3)
    sender.put("queue", row(5), 30)  # a writer keeps its first error for ever; the sender does not


def test_a_server_that_is_away_is_unreachable_within_the_deadline(unused_address):
    """Reverb's clients retry for ever."""
    start = time.monotonic()
    for take in (messages.take, messages.take_current):
        with pytest.raises(Unreachable, match=unused_address):
            take(unused_address, "queue", SIGNATURE, max_rows=1, timeout_secs=1)
    with pytest.raises(Unreachable, match=unused_address):
        messages.Sender(unused_address).put("queue", row(1), 0.3)
    assert time.monotonic() - start < 30


def test_a_missing_table_is_unreachable_and_says_what_there_is(address):
    """Sampling a table that is not there ends in an error that does not list the others."""
    for take in (messages.take, messages.take_current):
        with pytest.raises(Unreachable, match="no table 'chair'; it has board, queue"):
            take(address, "chair", SIGNATURE, max_rows=1)


def test_a_sender_goes_on_when_its_server_comes_back(serve, eventually):
    """A restarted server must not make its clients restart."""
    port = portpicker.pick_unused_port()
    tables = [messages.make_board("board", SIGNATURE)]
    sender = messages.Sender(f"localhost:{port}")
    server = serve(tables, port)
    sender.put("board", row(1), 30)
    server.stop()
    with pytest.raises(Unreachable):
        sender.put("board", row(2), 0.3)
    serve([messages.make_board("board", SIGNATURE)], port)

    def put():
        try:
            sender.put("board", row(3), 5)
        except Unreachable:
            return False
        return True

    eventually(put, secs=60)
    assert int(messages.read(f"localhost:{port}", "board", SIGNATURE)["number"]) == 3


def test_waiting_for_a_server_names_it_when_the_deadline_passes(unused_address):
    """A user with a wrong port must read the port, not a gRPC status."""
    with pytest.raises(RoleError, match=f"the replay server at {unused_address}.*--peer_patience_secs") as raised:
        messages.await_server("the replay server", unused_address, stop=Stop(), deadline_secs=0.1)
    assert raised.value.exit_code == ExitCode.UNAVAILABLE


def test_an_answering_server_is_awaited_no_longer(address):
    """The tables' signatures come with the answer: no second round trip."""
    tables = messages.await_server("the replay server", address, stop=Stop(), deadline_secs=30)
    messages.check_signature("table 'board'", address, tables["board"].signature, SIGNATURE)


def test_each_difference_between_signatures_is_listed(address):
    """Reverb's own message prints two whole signatures and leaves the difference to the reader."""
    table = messages.read_server_info(address, 30)["board"]
    other = {
        "number": tf.TensorSpec((), tf.int32),
        "values": [tf.TensorSpec((3,), tf.float32)],
        "new": SIGNATURE["number"],
    }
    with pytest.raises(RoleError) as raised:
        messages.check_signature("table 'board'", address, table.signature, other)
    assert raised.value.exit_code == ExitCode.DATA
    message = str(raised.value)
    assert f"table 'board' at {address} belongs to another experiment" in message
    assert "new: the server has nothing, this experiment int64[]" in message
    assert "number: the server has int64[], this experiment int32[]" in message
    assert "values/0: the server has float32[2], this experiment float32[3]" in message
