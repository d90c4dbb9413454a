"""The account of samples per insert: kept in both directions, and exact over restarts."""

from __future__ import annotations

import time

import numpy as np
import pytest
import reverb
import tensorflow as tf

from actorlearner.replay import account
from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from tests.replay.episodes import RANDOM, columns, episode, flush, held_windows, make_source, sample, write


def test_the_learner_waits_for_actors_when_it_is_ahead(replay, address, spec, eventually):
    """With too many updates per step a replay is overfitted; ml-agents and sheeprl both had the ratio wrong."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec)
    source.restore({})
    assert source.allow(50) == 0
    write(sink, episode(0, 20))
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 20)
    assert source.allow(50) == 15  # 20 - 10 windows, and one call of five
    source.note_updates(15)
    assert source.allow(50) == 0
    write(sink, episode(100, 5))
    flush(sink)
    eventually(lambda: source.allow(50) == 5)
    source.close()


def test_actors_wait_for_the_learner_when_they_are_ahead(replay, address, spec, eventually):
    """Without back-pressure actors flood the server, and samples per insert means nothing."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec)
    source.restore({})
    num_steps = None
    for number, step in enumerate(episode(0, 400)):
        sink.append(columns(step), RANDOM, np.array([False]))
        if sink.is_blocked():
            num_steps = number
            break
        source.is_ready()
    # Ten of warm-up and one call's five are taken in; then the queue's four chunks of eight, and a few on their way.
    assert num_steps is not None and num_steps < 100
    source.note_updates(100)
    eventually(lambda: source.is_ready() and not sink.is_blocked())
    source.close()


def test_whoever_is_faster_the_ratio_is_kept_to_within_one_call(replay, address, spec):
    """A ratio that is only aimed at drifts with the machine's load, and a run cannot be compared with another."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec)
    source.restore({})
    steps = (step for number in range(200) for step in episode(1_000 * number, 9))
    worst = 0.0
    for turn in range(160):
        for _ in range(2 if turn % 80 < 30 else 1):  # now the actor is the faster, now the learner
            if not sink.is_blocked():
                sink.append(columns(next(steps)), RANDOM, np.array([False]))
        allowed = source.allow(1 if turn % 80 < 30 else 5)
        source.note_updates(allowed)
        counts = source.counts()
        if counts["samples"]:
            worst = max(worst, abs((counts["inserts"] - 10) * 4.0 - counts["samples"]))
    assert counts["samples"] > 200
    assert worst <= 5 * 4 + 8 * 4  # one call, and a chunk that cannot be taken by halves
    source.close()


def test_what_came_after_the_checkpoint_is_an_insert_too(replay, address, spec, eventually):
    """Counted by the checkpoint alone, each restart would let the learner sample less for ever (ml-agents PR#4038)."""
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 100}
    sink = replay.make_sink(ReplayServers([address]), sample())
    first = make_source(replay, address, spec, **plan)
    first.restore({})
    write(sink, episode(0, 12))
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["held"] == 12)
    saved = first.counts()
    write(sink, episode(100, 12))  # taken in, but in no checkpoint
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["held"] == 24)
    first.close()
    sink_of_another = replay.make_sink(ReplayServers([address]), sample())
    write(sink_of_another, episode(200, 12))  # in the queue, taken in by nobody
    flush(sink_of_another)

    second = make_source(replay, address, spec, **plan)
    second.restore(saved)
    assert second.counts()["inserts"] == 36
    eventually(lambda: reverb.Client(address).server_info(timeout=5)[STREAM_TABLE].current_size == 0)
    assert second.is_ready()
    assert (second.counts()["inserts"], len(held_windows(second._mirrors[0]))) == (36, 36), "counted twice"
    second.close()


@pytest.mark.parametrize("max_known", [account.MAX_KNOWN_CHUNKS, 8])  # 8: as of a replay of millions
def test_what_a_server_that_had_died_brings_back_is_counted_once(serve, spec, eventually, monkeypatch, max_known):
    """Chunks from before the many it lost look new to a restarted learner, which then trains without actors."""
    monkeypatch.setattr(account, "MAX_KNOWN_CHUNKS", max_known)
    replay = ResidentReplay(replay_buffer_capacity=28, chunk_length=8, stream_length=4)  # 8 chunks on a server
    addresses = [f"localhost:{serve(replay.make_tables(spec, sample())).port}" for _ in range(2)]
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    sink = replay.make_sink(ReplayServers([addresses[0]]), sample())
    first = make_source(replay, addresses[0], spec, **plan)
    first.restore({})
    write(sink, episode(0, 28))
    eventually(lambda: first.is_ready() and first.account()["inserts"] >= 21)
    saved_by_the_server = read_chunks(addresses[0], silent_secs=10)
    write(sink, episode(100, 100))  # which died with the server
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["inserts"] == 128)
    for chunk in saved_by_the_server.values():  # as a server that was away hands them out
        first._stage(chunk, addresses[1], make_room=first._ingest)
    assert first.is_ready()
    assert first.account()["inserts"] == 128
    first.close()

    client = reverb.Client(addresses[1])
    for chunk in saved_by_the_server.values():
        with client.trajectory_writer(num_keep_alive_refs=1) as writer:
            writer.append(chunk)
            item = tf.nest.map_structure(lambda column: column[-1], writer.history)
            writer.create_item(EXPERIENCE_TABLE, priority=1.0, trajectory=item)
            writer.flush()
    second = make_source(replay, addresses[1], spec, **plan)
    second.restore(first.counts())
    assert second.is_ready()
    assert second.account()["held"] > 20
    assert second.account()["inserts"] == 128
    assert second.counts()["counted_before"] >= first.counts()["counted_before"] > 0
    second.close()


def test_an_actor_whose_clock_is_behind_is_counted_by_a_restarted_learner(replay, address, spec, eventually):
    """Its steps would not count, and the learner wait for steps that are there, for as long as the clocks differ."""
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    source = make_source(replay, address, spec, **plan)
    source.restore({"inserts": 100, "samples": 0, "counted_before": time.time_ns() + 3_600 * 10**9})
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 12))
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 12)
    assert source.account()["inserts"] == 112
    source.close()
