"""Several replay servers: which actor writes where, what the learner reads, and what it counts."""

from __future__ import annotations

import functools
import threading

import numpy as np
import portpicker
import pytest
import reverb
import tensorflow as tf

from actorlearner.replay import servers as servers_module
from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import Announcement, ReplayServers, make_tables, refuse_several
from actorlearner.replay.uniform import UniformReplay
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.runtime.messages import read_server_info
from tests.replay.episodes import as_chunk, columns, episode, flush, sample

PLAN = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
REPLAY = ResidentReplay(replay_buffer_capacity=1_000, chunk_length=8, stream_length=4)


@pytest.fixture
def quick(monkeypatch):
    """Looks often, and waits for nobody long."""
    monkeypatch.setattr(servers_module, "LOOK_EVERY_SECS", 0.1)
    monkeypatch.setattr(servers_module, "AWAY_SECS", 0.5)
    monkeypatch.setattr(servers_module, "SOME_ARE_ENOUGH_SECS", 0.5)


@pytest.fixture
def addresses(serve, spec):  # noqa: F811
    """Two replay servers; the first is the variable container as well."""
    first = serve([*REPLAY.make_tables(spec, sample()), *make_tables()])
    return [f"localhost:{server.port}" for server in (first, serve(REPLAY.make_tables(spec, sample())))]


def make_source(servers, spec, **changes):  # noqa: F811
    return REPLAY.make_source(servers, spec, sample(**changes), tf.distribute.get_strategy())


def append(sink, step):
    sink.append(columns(step), -1, np.array([False]))


def write(sink, steps):
    """Writes the steps of one environment, however long the server takes them."""
    for step in steps:
        append(sink, step)
        while sink.is_blocked():
            pass


def num_items(address, table=EXPERIENCE_TABLE):
    return read_server_info(address, timeout_secs=5)[table].current_size


def test_actors_are_spread_by_task_over_the_servers_that_answer(quick, addresses, unused_address, spec):  # noqa: F811
    """All on one server would leave the others idle; one bound to a dead server would never collect."""
    listed = [*addresses, unused_address]
    spread = [ReplayServers(listed, task) for task in range(6)]
    assert [servers.mine() for servers in spread] == 2 * listed
    signatures = REPLAY.table_signatures(spec)
    for servers, expected in zip(spread[:3], (addresses[0], addresses[1], addresses[0])):
        servers.await_tables(signatures, stop=Stop(), deadline_secs=30)
        assert servers.mine() == expected
        assert list(servers.away()) == [unused_address]
        assert f"no answer from {unused_address} for " in servers.describe()


def test_without_any_server_the_wait_ends_and_names_them(quick, unused_address):
    """A learner that waits for ever looks like one that trains."""
    servers = ReplayServers([unused_address, "localhost:2"])
    with pytest.raises(RoleError, match=f"the replay servers at {unused_address}, localhost:2, longer than") as raised:
        servers.await_tables({}, stop=Stop(), deadline_secs=1.0)
    assert raised.value.exit_code == ExitCode.UNAVAILABLE


def test_all_that_join_are_heard_of_and_again_after_the_board_was_lost(quick, serve, spec, eventually):
    """Whoever pushed another off the board, or lost it with its server, would leave a part of the replay unread."""
    port = portpicker.pick_unused_port()
    first, second = f"localhost:{port}", f"localhost:{serve(REPLAY.make_tables(spec, sample())).port}"
    third = f"localhost:{serve(REPLAY.make_tables(spec, sample())).port}"
    board = reverb.Server(make_tables([second, third]), port=port)
    joining = [Announcement(first, address) for address in (second, third)]

    def hear_of_all():
        servers = ReplayServers([first], task=1)
        heard: list[str] = []
        servers.for_each(heard.append)
        servers.watch(first)
        assert servers.mine() == first or len(heard) > 1
        for announcement in joining:
            announcement.renew()
        eventually(lambda: heard == [first, second, third])
        eventually(lambda: servers.mine() == second)
        servers.close()

    hear_of_all()
    board.stop()
    board = reverb.Server(make_tables([second, third]), port=port)
    hear_of_all()
    board.stop()


def test_a_server_that_the_first_does_not_list_does_not_join(quick, serve, spec, unused_address):
    """Any client that writes one row could send learner and actors to an address of its own."""
    listed = f"localhost:{serve(make_tables([unused_address])).port}"
    for first, who in (
        (listed, unused_address),
        (f"localhost:{serve(REPLAY.make_tables(spec, sample())).port}", "no server"),
    ):
        with pytest.raises(RoleError, match=f"--advertise = 'host:7': .* admits {who}\\..*--may_join=host:7") as raised:
            Announcement(first, "host:7").renew()
        assert raised.value.exit_code == ExitCode.USAGE


def test_a_listed_address_that_serves_something_else_or_is_silent_is_not_written_to(quick, serve, spec, caplog):
    """An actor would write to it, and the learner end at its tables."""
    foreign = f"localhost:{serve([reverb.Table.queue('somebody_elses', max_size=10)]).port}"
    first = f"localhost:{serve([*REPLAY.make_tables(spec, sample()), *make_tables([foreign, 'localhost:1'])]).port}"
    for address in (foreign, "localhost:1"):
        Announcement(first, address).renew()
    servers = ReplayServers([first], task=1)
    servers.await_tables(REPLAY.table_signatures(spec), stop=Stop(), deadline_secs=30)
    servers.watch(first)
    servers.close()
    assert servers.all() == (first,)
    assert f"{foreign} has no table" in caplog.text


def test_no_more_servers_join_than_a_run_takes():
    """Over TLS each role starts a process for each of them."""
    with pytest.raises(RoleError, match=r"--may_join = .* lists 16 replay servers: expected fewer than 16"):
        make_tables([f"host:{port}" for port in range(1, 17)])


def test_a_sampled_replay_refuses_several_servers():
    """Each server's limiter would keep the ratio of its own table, and the warm-up would be over at a part of it."""
    refuse_several(UniformReplay(), ["a:1"])
    refuse_several(ResidentReplay(), ["a:1", "b:2"])
    with pytest.raises(RoleError, match=r"--replay_address = 'a:1,b:2': .* Give one address, or .*@resident_replay"):
        refuse_several(UniformReplay(), ["a:1", "b:2"])


def test_the_learner_reads_all_servers_and_is_never_ahead_by_more_than_one_chunk(addresses, spec, eventually):  # noqa: F811
    """Readers that each look before any has counted would overshoot by a chunk for every server."""
    servers = ReplayServers(addresses)
    source = make_source(servers, spec)  # ten windows of warm-up, and four samples for each after that
    sinks = [REPLAY.make_sink(ReplayServers(addresses, task), sample()) for task in range(2)]
    for task, sink in enumerate(sinks):
        write(sink, episode(1_000 * task, 28))  # four chunks: more than may be taken in
    assert [num_items(address, STREAM_TABLE) for address in addresses] == [4, 4]
    source.restore({})
    taken = source.account()["inserts"]
    assert taken == 56, "what the tables held is taken in at once"
    source.close()

    fresh = make_source(servers, spec, num_updates_per_call=1)
    fresh.restore({})
    fresh.note_updates(46)
    for sink in sinks:
        while not sink.is_blocked():
            append(sink, episode(0, 9)[1])
    eventually(lambda: fresh.is_ready() and fresh.account()["inserts"] > 56)
    account = fresh.account()
    assert 0 < account["ahead"] <= account["error_buffer"] + 4 * 8
    fresh.close()


def test_a_chunk_that_two_servers_hold_counts_once(quick, addresses, spec, eventually):  # noqa: F811
    """An actor whose server goes away sends its chunk to another too; the first may have taken it all the same."""
    replay = ResidentReplay(replay_buffer_capacity=1_000, chunk_length=8, stream_length=4)
    servers = ReplayServers(addresses)
    sink = replay.make_sink(servers, sample())
    write(sink, episode(0, 28))
    steps = iter(episode(100, 20))
    while not sink.is_blocked():  # the queue is full: what comes next reaches the durable table alone
        append(sink, next(steps))
    eventually(lambda: num_items(addresses[0]) == 5)
    servers._mute.add(addresses[0])
    servers._heard_at[addresses[0]] -= 10
    servers._note_away()
    assert servers.mine() == addresses[1]
    while sink.is_blocked():
        pass
    assert num_items(addresses[1]) == 1

    source = make_source(ReplayServers(addresses), spec, **PLAN)
    source.restore({})
    expected = source.account()["inserts"]
    assert expected == 28 + 7
    eventually(lambda: [num_items(address, STREAM_TABLE) for address in addresses] == [0, 0])
    assert source.is_ready()
    assert source.account()["inserts"] == source.account()["held"] == expected
    source.close()


def test_two_readers_that_have_the_same_chunk_in_hand_count_it_once(addresses, spec, eventually):  # noqa: F811
    """Both have seen that it is new; it would be drawn, and paid for with samples, twice."""
    source = make_source(ReplayServers(addresses), spec, **PLAN)
    source.restore({})
    chunk = {**as_chunk(episode(0, 12)), "chunk": np.int64(1)}
    stage = functools.partial(source._stage, chunk, addresses[0], make_room=source._await_reveal)
    threads = [threading.Thread(target=stage) for _ in range(2)]
    with source._writing:
        for thread in threads:
            thread.start()
        eventually(lambda: repr(source._turns) == "count(2)")
    for thread in threads:
        thread.join(10)
    assert source.is_ready()
    assert source.account()["inserts"] == source.account()["held"] == 12
    source.close()


def test_what_a_server_held_that_was_away_comes_when_it_is_back_and_is_counted_once(
    quick,
    serve,
    spec,
    tmp_path,
    eventually,  # noqa: F811
):
    """A learner that waits for a dead server does not train; one that counts its chunks again breaks the ratio."""
    port = portpicker.pick_unused_port()

    def serve_second():
        checkpointer = reverb.checkpointers.DefaultCheckpointer(str(tmp_path))
        return reverb.Server(REPLAY.make_tables(spec, sample()), port=port, checkpointer=checkpointer)

    first = serve([*REPLAY.make_tables(spec, sample()), *make_tables()])
    second = serve_second()
    addresses = [f"localhost:{first.port}", f"localhost:{port}"]
    sinks = [REPLAY.make_sink(ReplayServers(addresses, task), sample()) for task in range(2)]
    source = make_source(ReplayServers(addresses), spec, **PLAN)
    source.restore({})
    for task, sink in enumerate(sinks):
        write(sink, episode(1_000 * task, 30))
        flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 60)
    saved = source.counts()
    source.close()
    sink = REPLAY.make_sink(ReplayServers(addresses, 1), sample())
    write(sink, episode(2_000, 12))  # in no checkpoint of the learner's
    flush(sink)
    reverb.Client(addresses[1]).checkpoint()
    second.stop()

    servers = ReplayServers(addresses)
    servers.await_tables({}, stop=Stop(), deadline_secs=30)
    again = make_source(servers, spec, **PLAN)
    again.restore(saved)
    assert again.is_ready()
    assert (again.account()["inserts"], again.account()["held"]) == (60, 30)
    assert again.account()["servers"] == {addresses[0]: True, addresses[1]: False}
    # Its chunks stay known through another restart.
    third = make_source(servers, spec, **PLAN)
    third.restore(again.counts())
    again.close()
    second = serve_second()
    eventually(lambda: third.is_ready() and third.account()["held"] == 72)
    assert third.account()["inserts"] == 72
    third.close()
    second.stop()
