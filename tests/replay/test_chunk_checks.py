"""What a stranger writes into the tables of chunks, while a learner reads them and when the next one begins."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import reverb
import tensorflow as tf

from actorlearner.replay.chunk_checks import ChunkCheck
from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from drills.strangers import hostile_chunks, insert
from tests.replay.episodes import as_chunk, columns, episode, flush, sample

PLAN = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
REPLAY = ResidentReplay(replay_buffer_capacity=1_000, chunk_length=8, stream_length=4)


@pytest.fixture
def signature(spec):
    return REPLAY.table_signatures(spec)[STREAM_TABLE]


@pytest.fixture
def address(serve, spec):
    return f"localhost:{serve(REPLAY.make_tables(spec, sample())).port}"


def make_source(address, spec):
    return REPLAY.make_source(ReplayServers([address]), spec, sample(**PLAN), tf.distribute.get_strategy())


def write(address, steps):
    sink = REPLAY.make_sink(ReplayServers([address]), sample())
    for step in steps:
        sink.append(columns(step), -1, np.array([False]))
        while sink.is_blocked():
            pass
    flush(sink)


def num_queued(address):
    return reverb.Client(address).server_info(timeout=5)[STREAM_TABLE].current_size


def test_chunks_that_cannot_be_true_are_left_out_and_said_once_while_training_and_on_resume(
    address, spec, signature, eventually, caplog
):
    """One NaN, or one chunk that fits into no mirror, ended the run, and every resume of it."""
    source = make_source(address, spec)
    source.restore({})
    write(address, episode(0, 12))
    hostile = list(hostile_chunks(signature))
    assert len(hostile) > 20
    for chunk in hostile:
        for table in (EXPERIENCE_TABLE, STREAM_TABLE):
            insert(address, table, chunk)
    write(address, episode(100, 12))
    eventually(lambda: not num_queued(address) and source.is_ready() and source.account()["held"] >= 24)
    assert source.account()["inserts"] == source.account()["held"] == 24
    source.close()

    again = make_source(address, spec)
    again.restore(source.counts())
    assert again.is_ready()
    assert again.account()["inserts"] == again.account()["held"] == 24
    again.close()
    said = collections.Counter(message.partition(" = ")[0] for message in caplog.messages)
    assert len(said) > 10 and set(said.values()) == {1}, said


@pytest.mark.parametrize("number", [0, 1, 1_764_500_000_000_000_000])
def test_a_chunk_of_an_actor_is_one_whatever_its_clock_said_before(spec, signature, number):
    """A learner that leaves out its own actors' data trains on nothing, without an error."""
    chunk = {**as_chunk(episode(5, 7)), "chunk": np.int64(number)}
    assert ChunkCheck(spec, 8).find_misfit(tf.nest.flatten(chunk), signature) is None
