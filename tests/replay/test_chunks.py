"""What collect actors write as chunks."""

from __future__ import annotations

import dataclasses

import pytest
import reverb

from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.mirror import find_starts
from actorlearner.replay.servers import ReplayServers
from tests.replay.episodes import episode, flush, held_windows, make_source, sample, write


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
