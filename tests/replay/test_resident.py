"""The learner's own replay: which windows it holds, how it draws them, and how it keeps samples per insert."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import logging
import pickle
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import reverb
import tensorflow as tf
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils
from tf_agents.specs import tensor_spec

from actorlearner.replay import account, durable_table, giving_back, resident, resident_source
from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.giving_back import ChunkWriter, LossDetector
from actorlearner.replay.mirror import Mirror, find_starts
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.lifecycle import RoleError, Stopped
from actorlearner.runtime.messages import Unreachable
from tests.e2e.processes import START_SECS, Processes
from tests.replay.episodes import RANDOM, as_chunk, columns, episode, flush, held_windows, sample


def write(sink, *lanes, acted_at=RANDOM, crashes=()):
    """Writes runs of steps of equal length, one for each environment; `crashes` are (row, environment)."""
    for row, steps in enumerate(zip(*lanes)):
        crashed = np.array([(row, index) in crashes for index in range(len(lanes))])
        sink.append(columns(*steps), acted_at, crashed)
        assert not sink.is_blocked()


@pytest.fixture
def replay():
    return ResidentReplay(replay_buffer_capacity=1_000, chunk_length=8, stream_length=4)


@pytest.fixture
def address(serve, replay, spec):
    return f"localhost:{serve(replay.make_tables(spec, sample())).port}"


def make_source(replay, address, spec, **changes):
    return replay.make_source(ReplayServers([address]), spec, sample(**changes), tf.distribute.get_strategy())


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_mirror_holds_the_windows_that_a_stock_table_holds_as_items(
    serve, replay, address, spec, eventually, num_steps
):
    """A window lost or doubled at a chunk's edge, or over an episode's end, would train on what nobody saw."""
    # Two environments: a long episode beside short ones.
    lanes = [episode(100, 3), episode(200, 25), episode(300, 1), episode(400, 8)], [episode(500, 40)]
    plan = {"num_steps": num_steps, "num_environments": 2, "initial_collect_steps": 1, "num_updates_per_call": 1_000}
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    source = make_source(replay, address, spec, **plan)
    source.restore({})
    table = reverb.Table(
        "stock",
        sampler=reverb.selectors.Fifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1_000,
        max_times_sampled=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=tensor_spec.add_outer_dim(spec),
    )
    stock_address = f"localhost:{serve([table]).port}"
    observer = reverb_utils.ReverbAddTrajectoryObserver(
        reverb.Client(stock_address), "stock", sequence_length=num_steps
    )
    for steps in [steps for lane in lanes for steps in lane]:
        for step in steps:
            observer(step)
        observer.reset()
    observer.close()
    write(sink, *([step for steps in lane for step in steps] for lane in lanes))
    flush(sink)

    num_items = reverb.Client(stock_address).server_info(timeout=5)["stock"].current_size
    buffer = reverb_replay_buffer.ReverbReplayBuffer(spec, "stock", num_steps, server_address=stock_address)
    items = iter(buffer.as_dataset(num_steps=num_steps, single_deterministic_pass=True))
    expected = {tuple(next(items)[0].observation.numpy()[:, 0]) for _ in range(num_items)}
    assert len(expected) == num_items
    eventually(lambda: source.is_ready() and source.account()["held"] == num_items)
    assert held_windows(source._mirrors[0]) == expected
    source.close()


def test_a_chunk_that_no_mirror_can_hold_ends_training_with_a_word(replay, address, spec, eventually):
    """It is found by a thread; a thread's error alone would leave the learner waiting for data."""
    too_long = dataclasses.replace(replay, chunk_length=2_000, chunk_secs=1_000.0)
    sink = too_long.make_sink(ReplayServers([address]), sample(num_environments=1))
    source = make_source(too_long, address, spec)
    source.restore({})
    write(sink, episode(0, 1_900))
    flush(sink)

    def says_so():
        try:
            source.is_ready()
        except ValueError as error:
            return "replay_buffer_capacity" in str(error)
        return False

    eventually(says_so)
    source.close()


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


def test_a_restarted_learner_gets_its_replay_back_from_the_server(replay, address, spec, eventually):
    """Others lose their replay on resume (tensorflow/agents#475, open since 2020)."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    first = make_source(replay, address, spec, samples_per_insert=1.0, num_updates_per_call=100)
    first.restore({})
    for number in range(20):
        write(sink, episode(100 * number, 12))
        first.is_ready()
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["held"] == 240)
    first.note_updates(10)
    first.close()

    second = make_source(replay, address, spec, samples_per_insert=1.0, num_updates_per_call=100)
    second.restore(first.counts())
    assert second.is_ready()
    assert held_windows(second._mirrors[0], 20_000) == held_windows(first._mirrors[0], 20_000)
    assert second.account() == first.account()
    assert (second.account()["inserts"], second.account()["samples"]) == (240, 40)
    oldest = second._mirrors[0].gather(tf.constant([0], tf.int64))[0]
    assert oldest.observation.numpy()[0, 0, 0] == 0, "what is oldest must be the first to leave, also from now on"
    second.close()


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


def test_of_a_durable_table_that_overflows_exactly_the_newest_come_back(serve, spec, eventually):
    """Were any to leave but the oldest, a restarted learner would train on another replay than before."""
    replay = ResidentReplay(replay_buffer_capacity=28, chunk_length=8, stream_length=4)  # 8 chunks of 7 on a server
    address = f"localhost:{serve(replay.make_tables(spec, sample())).port}"
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    first = make_source(replay, address, spec, **plan)
    first.restore({})
    write(replay.make_sink(ReplayServers([address]), sample()), episode(0, 4 * 56))
    eventually(lambda: first.is_ready() and first.account()["inserts"] == 224)
    saved = first.counts()
    first.close()

    chunks = read_chunks(address, silent_secs=10).values()
    assert sorted(int(chunk["step"].observation[0, 0, 0]) for chunk in chunks) == list(range(168, 224, 7))
    second = make_source(replay, address, spec, **plan)
    second.restore(saved)
    assert held_windows(second._mirrors[0]) == {(number, number + 1) for number in range(196, 224)}
    second.close()


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
    eventually(lambda: "nothing came for a while. Trying again in 1 s" in caplog.text)
    eventually(lambda: len(read_chunks(address, silent_secs=10)) == sink.num_chunks)
    source.close()


def test_a_learner_that_is_stopped_while_it_is_filled_stops(replay, address, spec):
    """Millions of transitions take a minute to read, and a launcher kills what has not ended after some seconds."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 12))
    flush(sink)

    def stop():
        raise Stopped("now")

    source = make_source(replay, address, spec)
    with pytest.raises(Stopped):
        source.restore({}, stop)
    source.close()


@pytest.mark.parametrize("length", [3, 40])
def test_a_slow_environments_chunks_are_at_least_half_full(serve, replay, spec, length):
    """The durable table has room for twice the replay: of emptier chunks it would not hold all that the mirror does."""
    slow = dataclasses.replace(replay, chunk_length=20, chunk_secs=1e-9, stream_length=1_000)
    address = f"localhost:{serve(slow.make_tables(spec, sample())).port}"
    sink = slow.make_sink(ReplayServers([address]), sample())
    write(sink, [step for number in range(30) for step in episode(100 * number, length)])
    chunks = read_chunks(address, silent_secs=10).values()
    num_windows = [find_starts(chunk["ends_run"][:, : chunk["length"]], 2).sum() for chunk in chunks]
    assert 2 * min(num_windows) >= 19
    assert length < 20 or max(num_windows) < 19, "none was sent before it was full"


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


SERVE_WHEN_TOLD = """
import base64, pickle, sys
import reverb
signatures = pickle.loads(base64.b64decode(sys.argv[1]))
port = int(sys.stdin.readline()) or None
table = reverb.Table("experience", reverb.selectors.Uniform(), reverb.selectors.Fifo(), 2_000,
                     reverb.rate_limiters.MinSize(1), signature=signatures["experience"])
server = reverb.Server([table, reverb.Table.queue("stream", 1_000, signature=signatures["stream"])], port=port)
print(server.port, flush=True)
server.wait()
"""


@pytest.fixture
def lives(replay, spec):
    """Two servers' processes; `serve_in(life, port)` has one serve, on any port that is free by default."""
    signatures = base64.b64encode(pickle.dumps(replay.table_signatures(spec))).decode()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SERVE_WHEN_TOLD, signatures],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    ]

    def kill():
        for process in processes:
            process.kill()

    deadline = threading.Timer(120.0, kill)
    deadline.start()
    yield processes
    deadline.cancel()
    kill()
    for process in processes:
        process.communicate()


def serve_in(life, port=0):
    print(port, file=life.stdin, flush=True)
    line = life.stdout.readline()
    assert line, "the server did not start"
    return int(line)


def fill(address, numbers):
    """Writes a chunk of one window for each number."""
    chunks = ({"chunk": np.int64(number), **as_chunk(episode(number, 1))} for number in numbers)
    with contextlib.closing(ChunkWriter(address)) as writer:
        while some := list(itertools.islice(chunks, 100)):  # Reverb warns of more
            writer.write(some, timeout_secs=30.0)


OLD, NEW = set(range(500)), set(range(500, 1_001))  # more than before: only its age tells that a server began anew


@pytest.fixture
def served(lives, monkeypatch):
    """A server's address, and what restarts it with other chunks the first time it is called."""
    monkeypatch.setattr(durable_table, "CLOCK_SLACK_SECS", 0.5)
    port = serve_in(lives[0])
    address, began_by = f"127.0.0.1:{port}", time.monotonic()
    fill(address, OLD)
    assert read_chunks(address, silent_secs=30).keys() == OLD
    time.sleep(max(0.0, began_by + 2.0 - time.monotonic()))  # its life

    def restart():
        if lives[0].poll() is None:
            lives[0].kill()
            lives[0].wait()
            serve_in(lives[1], port)
            fill(address, NEW)

    return address, restart


def test_a_server_that_is_restarted_while_its_table_is_read_is_read_again_and_what_was_read_is_kept(served):
    """Reverb's sampler goes on with the next server: what the dead one held seems to be there, and would be lost."""
    address, restart = served
    chunks: dict[int, Any] = {}
    with pytest.raises(Unreachable, match="was restarted while 'experience' was read"):
        read_chunks(address, silent_secs=30, on_chunk=restart, into=chunks)
    had = chunks.keys() & OLD
    assert had
    assert read_chunks(address, silent_secs=30, into=chunks).keys() == had | NEW
    assert read_chunks(address, silent_secs=30, has_data=False).keys() == NEW


def test_a_learner_keeps_what_it_read_of_a_server_that_was_restarted_while_it_was_filled(served, spec, monkeypatch):
    """It may be the only copy: the next server holds its last checkpoint, and the learner before this one is dead."""
    monkeypatch.setattr(resident_source, "RESTORE_SILENT_SECS", 30)
    address, restart = served
    source = make_source(ResidentReplay(replay_buffer_capacity=2_000, chunk_length=2), address, spec)
    with pytest.raises(Unreachable, match="was restarted while 'experience' was read"):
        source.restore({}, restart)
    source.restore({})
    kept, came = source._giving_back._places.keys() & OLD, source._giving_back._places.keys() & NEW
    assert kept and came == NEW
    assert len(held_windows(source._mirrors[0], 40_000)) == source.account()["held"] == len(kept) + len(NEW)
    source.close()


def test_a_table_is_read_to_its_end_though_actors_write_on(serve, spec):
    """Else a table that fills quickly is read until it is full, and a learner that dies before is not given back to."""
    replay = ResidentReplay(replay_buffer_capacity=100_000, chunk_length=8)
    address = f"localhost:{serve(replay.make_tables(spec, sample())).port}"
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 8))
    flush(sink)
    first = next(iter(read_chunks(address, silent_secs=10).values()))
    numbers = itertools.count(1)
    with contextlib.closing(ChunkWriter(address)) as writer:

        def append():
            writer.write([{**first, "chunk": np.int64(next(numbers))}], timeout_secs=10)

        for _ in range(50):
            append()
        size = len(read_chunks(address, silent_secs=10))
        samples = itertools.count(1)

        def append_seldom():
            if next(samples) % 4 == 0:
                append()

        assert len(read_chunks(address, silent_secs=10, on_chunk=append_seldom)) >= size
    assert next(numbers) < 1_000


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
    """A learner that says too early that all was given back may be killed with the only copy."""
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
    eventually(lambda: "Trying again in 1 s" in caplog.text)
    eventually(lambda: "were given back" in caplog.text)
    first, second, *_ = (message for message in caplog.messages if "began anew" in message)
    assert "Trying again" in first
    assert f"{len(sent)} chunks that it had lost were given back" in second
    assert read_chunks(address, silent_secs=10).keys() == sent.keys()
    source.close()
    looking.join(30)


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


def test_a_queue_that_runs_dry_is_read_again_at_once(replay, address, spec):
    """tf.data's thread that tunes an iterator held up its end for half a minute: an actor's death stopped training."""
    source = make_source(replay, address, spec)
    assert source._read_queue(address).options().autotune.enabled is False


def test_several_replicas_each_hold_a_share(replay, address, spec, eventually):
    """Two whole copies would halve what fits; a share that stays empty would train on nothing."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec, num_updates_per_call=100)
    source._mirrors = [Mirror(spec, 2, 500) for _ in range(2)]
    source.restore({})
    write(sink, episode(0, 30))
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 30)
    shares = [held_windows(mirror) for mirror in source._mirrors]
    assert min(map(len, shares)) >= 8
    assert not shares[0] & shares[1]
    assert len(shares[0] | shares[1]) == 30
    source.close()


def test_images_reach_the_batch_as_they_were_seen(serve, replay, spec, eventually):
    """A cast on the way would quadruple what is sent and held, or train on other images than the policy acted on."""
    image_spec = spec._replace(observation=tf.TensorSpec((84, 84, 4), tf.uint8))
    images = np.random.default_rng(0).integers(0, 256, (41, 84, 84, 4), np.uint8)
    steps = [step._replace(observation=image) for step, image in zip(episode(0, 40), images)]
    plan = {"batch_size": 1_000, "num_updates_per_call": 100}
    address = f"localhost:{serve(replay.make_tables(image_spec, sample(**plan))).port}"
    source = make_source(replay, address, image_spec, **plan)
    source.restore({})
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    write(sink, steps)
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 40)
    batch = source.unpack(*source.draw(source.handle)).experience
    assert batch.observation.dtype == tf.uint8
    assert batch.observation.shape == (1_000, 2, 84, 84, 4)
    number_of = {image.tobytes(): number for number, image in enumerate(images)}
    drawn = {tuple(number_of.get(image.tobytes()) for image in window) for window in batch.observation.numpy()}
    assert drawn == {(number, number + 1) for number in range(40)}
    source.close()


# Devices are split before TensorFlow computes anything, so this needs a process of its own.
DRAW_BY_TWO_REPLICAS = """
import base64, json, pickle, sys
import tensorflow as tf
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.devices import make_strategy
address, spec, sampling = pickle.loads(base64.b64decode(sys.argv[1]))
strategy = make_strategy("mirrored", num_logical_cpus=2)
source = ResidentReplay(replay_buffer_capacity=1_000).make_source(ReplayServers([address]), spec, sampling, strategy)
source.restore({})
assert source.is_ready()

def draw():
    batch = source.unpack()
    return batch.experience, batch.acted_at

@tf.function
def train(num_updates):  # as the learner's loop draws
    parts = strategy.run(draw)
    for _ in tf.range(num_updates - 1):
        parts = strategy.run(draw)
    return parts

batches, _ = train(tf.constant(2))
batches = strategy.experimental_local_results(batches.observation)
print("RESULT", json.dumps([batch[..., 0].numpy().tolist() for batch in batches]))
source.close()
"""


def test_each_of_two_replicas_draws_its_part_of_the_batch_from_a_share_of_its_own(replay, address, spec, tmp_path):
    """Were all to draw from the first share, half of what was collected would never be trained on, without a word."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 28))
    flush(sink)
    task = base64.b64encode(pickle.dumps((address, spec, sample(batch_size=1_000)))).decode()
    program = tmp_path / "draw.py"  # a file: the loop is compiled from its source
    program.write_text(DRAW_BY_TWO_REPLICAS)
    with Processes(tmp_path) as processes:
        script = processes.start_python(program, task)
        batches = json.loads(script.await_line("^RESULT (.*)").group(1))
        assert script.wait(START_SECS) == 0, script.output
    assert [len(batch) for batch in batches] == [500, 500]
    one, other = ({tuple(window) for window in batch} for batch in batches)
    assert not one & other
    assert len(one) == len(other) == 14
    assert one | other == {(number, number + 1) for number in range(28)}


def test_a_replica_that_does_not_know_which_it_is_draws_nothing(replay, address, spec):
    """Were it to draw from the first share, the others would be held, paid for and never trained on."""
    source = make_source(replay, address, spec)
    source._mirrors = [Mirror(spec, 2, 500) for _ in range(2)]

    @tf.function(autograph=False)
    def draw(replica):  # known only when it runs, as on a TPU
        with tf.distribute.ReplicaContext(tf.distribute.get_strategy(), replica):
            return source.unpack()

    with pytest.raises(AssertionError, match="which of the 2 shares"):
        draw(tf.constant(0))


def test_a_replay_larger_than_the_memory_is_refused_with_the_numbers(address, spec):
    """The operating system would end the learner an hour later, without a word."""
    replay = ResidentReplay(replay_buffer_capacity=10**12)
    with pytest.raises(RoleError, match=r"replay_buffer_capacity = 1,000,000,000,000 takes [\d.]+ GB .*GB\. Lower it"):
        make_source(replay, address, spec)


def test_a_device_that_is_too_small_is_named_with_what_was_asked_of_it(address, spec, monkeypatch):
    """A GPU's memory is known only when it runs out; TensorFlow's own error names a tensor, and no setting."""
    monkeypatch.setattr(resident, "free_host_bytes", lambda: 10**18)  # here the device is the host
    replay = ResidentReplay(replay_buffer_capacity=10**15)  # more than a process can address: none is ever taken
    # Takes ten seconds of TensorFlow's, which tries again meanwhile.
    with pytest.raises(RoleError, match=r"capacity = 1,000,000,000,000,000 takes [\d.]+ GB of .* on /cpu:0\. Lower it"):
        make_source(replay, address, spec)


def test_a_learner_says_at_its_start_how_many_transitions_and_bytes_its_replay_takes(address, spec, caplog):
    """Who chooses a capacity, or a machine for it, needs both; what is said must be what is taken."""
    caplog.set_level(logging.INFO)
    (mirror,) = make_source(ResidentReplay(replay_buffer_capacity=1_000_000), address, spec)._mirrors
    num_bytes = sum(variable.numpy().nbytes for variable in (*mirror._rows, mirror._starts))
    (line,) = (message for message in caplog.messages if "beside the learner" in message)
    assert line == (
        "the replay holds 1,000,000 transitions (windows of 2 steps) beside the learner: "
        f"{num_bytes / 1e6:.1f} MB on each of /cpu:0"
    )


def test_both_tables_hold_each_chunk(replay, address, spec):
    """What reached the learner alone could not come back from the server."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 20))
    flush(sink)
    info = reverb.Client(address).server_info(timeout=5)
    assert info[EXPERIENCE_TABLE].current_size == info[STREAM_TABLE].current_size == 3


def test_a_crashed_episode_gives_no_window_over_the_crash(replay, address, spec, eventually):
    """A step from before the crash followed by one of the fresh environment is a transition that never was."""
    plan = {"num_environments": 2, "initial_collect_steps": 1, "num_updates_per_call": 100}
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    source = make_source(replay, address, spec, **plan)
    source.restore({})
    junk = episode(-1, 0)
    crashing = [*episode(0, 30)[:11], *junk, *episode(500, 4)]
    write(sink, crashing, episode(1_000, 16), crashes={(11, 0)})
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 10 + 4 + 16)
    windows = held_windows(source._mirrors[0])
    assert len(windows) == 30
    assert all(second == start + 1 for start, second in windows)
    assert not [start for start, _ in windows if start < 0]
    source.close()


def test_a_capacity_below_the_warm_up_is_refused():
    """Training would wait for ever."""
    with pytest.raises(ValueError, match=r"replay_buffer_capacity = 10 .*initial_collect_steps = 20"):
        ResidentReplay(replay_buffer_capacity=10).check(initial_collect_steps=20)


def test_a_strangers_item_is_left_out_and_harms_nobody(replay, address, spec, eventually):
    """Reverb's server takes any item; sampled from the durable table, one would end every restarted learner."""
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 100}
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec, **plan)
    source.restore({})
    write(sink, episode(0, 12))
    flush(sink)
    with reverb.Client(address).trajectory_writer(num_keep_alive_refs=1, validate_items=False) as stranger:
        stranger.append({"nothing": np.zeros(3, np.float32)})
        for table in (EXPERIENCE_TABLE, STREAM_TABLE):
            stranger.create_item(table, 1.0, {"nothing": stranger.history["nothing"][-1:]})
        stranger.flush(timeout_ms=5_000)
    write(sink, episode(100, 12))
    flush(sink)
    again = make_source(replay, address, spec, **plan)
    eventually(lambda: reverb.Client(address).server_info(timeout=5)[STREAM_TABLE].current_size == 0)
    source.close()
    again.restore({})
    assert again.counts()["inserts"] == 24
    again.close()


def test_each_observation_is_counted_once_though_a_checkpoint_comes_in_between(replay, address, spec, eventually):
    """A run that was stopped in its warm-up would normalise by the few observations after it, or by some twice."""
    plan = {"num_environments": 1, "num_steps": 3, "windows_may_end_early": True, "initial_collect_steps": 1_000}
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    source = make_source(replay, address, spec, **plan)
    source.count_observations()
    source.restore({})
    write(sink, episode(0, 30))
    eventually(lambda: source.account()["inserts"] > 0)
    with source.standing_still():
        counts, before = source.counts(), source.take_moments()
    source.close()

    flush(sink)
    resumed = make_source(replay, address, spec, **plan)
    resumed.count_observations()
    resumed.restore(counts)
    write(sink, episode(100, 20))
    flush(sink)
    eventually(lambda: resumed.account()["inserts"] == 49)  # the last one comes with the next chunk
    moments = [*before, *resumed.take_moments()]
    assert sum(one.count for one in moments) == 49
    total = sum(one.count * one.mean for one in moments)
    np.testing.assert_allclose(total, [sum(range(30)) + sum(range(100, 119))])
    resumed.close()
