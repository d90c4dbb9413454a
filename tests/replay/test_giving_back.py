"""A replay server that lost chunks is given them back."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.replay import durable_table, giving_back
from actorlearner.replay.chunks import EXPERIENCE_TABLE
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.giving_back import LossDetector
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.messages import Unreachable
from tests.replay.episodes import RANDOM, columns, episode, flush, held_windows, make_source, sample, write


def test_a_server_that_lost_chunks_is_given_back_what_the_learner_got(serve, spec, eventually, monkeypatch):
    """A learner that dies after its server would come back with what that had saved, at worst with next to nothing."""
    monkeypatch.setattr(giving_back, "LOOK_FOR_LOSSES_SECS", 0.0)
    replay = ResidentReplay(replay_buffer_capacity=64, chunk_length=16, stream_length=4)
    plan = {"num_steps": 3, "num_environments": 2, "samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    address = f"localhost:{serve(replay.make_tables(spec, sample(**plan))).port}"
    first = make_source(replay, address, spec, **plan)
    first.restore({})
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    for number in range(4):
        write(sink, episode(200 * number, 24), episode(200 * number + 100, 24), acted_at=number, crashes=[(11, 1)])
    flush(sink)
    eventually(lambda: first.is_ready() and first.num_chunks == sink.num_chunks)
    sent = read_chunks(address, silent_secs=10)

    reverb.Client(address).reset(EXPERIENCE_TABLE)  # as a server does that begins anew from no checkpoint
    eventually(lambda: len(read_chunks(address, silent_secs=10)) == len(first._mirrors[0]._chunks))
    given_back = read_chunks(address, silent_secs=10)
    eventually(lambda: first.num_given_back == len(given_back))
    for number, chunk in given_back.items():
        valid = int(chunk["length"])
        assert valid == sent[number]["length"]
        for ours, theirs in zip(tf.nest.flatten(chunk["step"]), tf.nest.flatten(sent[number]["step"])):
            np.testing.assert_array_equal(ours[:, :valid], theirs[:, :valid])
        np.testing.assert_array_equal(chunk["acted_at"][:valid], sent[number]["acted_at"][:valid])
        np.testing.assert_array_equal(chunk["ends_run"], sent[number]["ends_run"])
    saved = first.counts()
    first.close()

    second = make_source(replay, address, spec, **plan)
    second.restore(saved)
    assert second.is_ready()
    assert held_windows(second._mirrors[0]) == held_windows(first._mirrors[0])
    assert second.account()["inserts"] == first.account()["inserts"]
    second.close()


def test_a_server_is_given_back_what_it_lost_while_actors_are_held_back(serve, spec, eventually, monkeypatch):
    """With actors faster than the learner a chunk always waits its turn; losses behind it would last for minutes."""
    monkeypatch.setattr(giving_back, "LOOK_FOR_LOSSES_SECS", 0.0)
    replay = ResidentReplay(replay_buffer_capacity=1_000, chunk_length=8, stream_length=4)
    address = f"localhost:{serve(replay.make_tables(spec, sample())).port}"
    source = make_source(replay, address, spec)
    source.restore({})
    sink = replay.make_sink(ReplayServers([address]), sample())
    steps = iter(episode(0, 400))
    while not sink.is_blocked():  # nobody trains: some chunks are taken in, the queue is full
        sink.append(columns(next(steps)), RANDOM, np.array([False]))
        source.is_ready()
    eventually(lambda: source._account.are_actors_ahead())
    held = set(source._giving_back._places)
    reverb.Client(address).reset(EXPERIENCE_TABLE)
    eventually(lambda: held <= read_chunks(address, silent_secs=10).keys())
    assert source._account.are_actors_ahead()
    source.close()


def test_what_cannot_be_given_back_is_said_and_tried_again(replay, address, spec, eventually, monkeypatch, caplog):
    """Silence would leave the next learner without its replay, and its user without a reason."""
    monkeypatch.setattr(giving_back, "LOOK_FOR_LOSSES_SECS", 0.0)
    source = make_source(replay, address, spec, num_updates_per_call=1_000)
    source.restore({})
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 28))
    flush(sink)
    eventually(lambda: source.is_ready() and source.num_chunks == sink.num_chunks)
    failures = [Unreachable("nothing came for a while")]

    def fail_once(*arguments, **settings):
        if failures:
            raise failures.pop()
        return read_chunks(*arguments, **settings)

    monkeypatch.setattr(giving_back, "read_chunks", fail_once)
    reverb.Client(address).reset(EXPERIENCE_TABLE)
    eventually(lambda: "nothing came for a while. Retrying in 1 s" in caplog.text)
    eventually(lambda: len(read_chunks(address, silent_secs=10)) == sink.num_chunks)
    source.close()


def test_a_server_that_began_anew_is_noticed_though_it_counts_more_inserts(serve, replay, spec, monkeypatch):
    """With a checkpoint of just before its death and quick actors it is soon ahead of what the learner saw last."""
    monkeypatch.setattr(durable_table, "CLOCK_SLACK_SECS", 0.5)
    server = serve(replay.make_tables(spec, sample()))
    address = f"localhost:{server.port}"
    losses = LossDetector(address)
    assert not losses.has_losses()
    time.sleep(2.0)  # its life
    server.stop()
    serve(replay.make_tables(spec, sample()), port=server.port)
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 28))
    flush(sink)
    assert losses.has_losses()
    losses.note_pass(0)
    assert not losses.has_losses()


def test_a_server_that_dies_again_is_looked_through_as_often_as_the_first_time(serve, replay, spec, monkeypatch):
    """Passes over its earlier life would count for this one, and chunks be missing that came in late."""
    monkeypatch.setattr(durable_table, "CLOCK_SLACK_SECS", 0.5)
    server = serve(replay.make_tables(spec, sample()))
    losses = LossDetector(f"localhost:{server.port}")
    assert not losses.has_losses()
    for num_passes in (giving_back.MAX_PASSES - 1, giving_back.MAX_PASSES):
        time.sleep(2.0)  # its life
        server.stop()
        server = serve(replay.make_tables(spec, sample()), port=server.port)
        for _ in range(num_passes):
            assert losses.has_losses()
            losses.note_pass(1)
    assert not losses.has_losses()


def test_what_was_given_to_a_server_that_died_meanwhile_is_given_again(
    serve, replay, spec, eventually, monkeypatch, caplog
):
    """A learner that reports a complete refill too early may be killed with the only copy."""
    monkeypatch.setattr(durable_table, "CLOCK_SLACK_SECS", 0.5)
    monkeypatch.setattr(giving_back, "LOOK_FOR_LOSSES_SECS", 0.0)
    caplog.set_level(logging.INFO)
    servers = [serve(replay.make_tables(spec, sample()))]
    port = servers[0].port
    address = f"localhost:{port}"
    source = make_source(replay, address, spec, num_updates_per_call=1_000)
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 28))
    flush(sink)
    sent = read_chunks(address, silent_secs=10)
    for number in sorted(sent):  # nobody else reads: Reverb dies when a server in the readers' own process stops
        source._stage(sent[number], address, make_room=source._ingest)
    give_back = source._giving_back._give_back

    def give_back_and_die(address):
        num_given = give_back(address)
        if len(servers) == 1:
            time.sleep(2.0)  # its life
            servers[0].stop()
            servers.append(serve(replay.make_tables(spec, sample()), port=port))
        return num_given

    monkeypatch.setattr(source._giving_back, "_give_back", give_back_and_die)
    assert not source._giving_back.losses_at(address).has_losses()
    reverb.Client(address).reset(EXPERIENCE_TABLE)
    look_after = source._giving_back.look_after
    looking = threading.Thread(target=look_after, args=(address,), name="ingest losses", daemon=True)
    looking.start()
    # It says that the server was restarted meanwhile, or on a busy machine that it is not back within 5 s.
    eventually(lambda: "Retrying in 1 s" in caplog.text)
    eventually(lambda: "restarted and was refilled" in caplog.text)
    first, second, *_ = (message for message in caplog.messages if "restarted and was" in message)
    assert "Retrying" in first
    assert f"refilled with {len(sent)} chunks that it had lost" in second
    assert read_chunks(address, silent_secs=10).keys() == sent.keys()
    source.close()
    looking.join(30)
