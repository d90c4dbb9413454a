"""The durable table is read whole, also while servers die and actors write."""

from __future__ import annotations

import base64
import contextlib
import itertools
import pickle
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from actorlearner.replay import durable_table, resident_source
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.giving_back import ChunkWriter
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.messages import Unreachable
from tests.replay.episodes import as_chunk, episode, flush, held_windows, make_source, sample, write

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
    """Otherwise a table that fills quickly is read until it is full, and a learner that dies before is not refilled."""
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
