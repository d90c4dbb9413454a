"""Server-sampled replay: an actor's side of it."""

from __future__ import annotations

import threading

import numpy as np

from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.uniform import UniformReplay
from tests.replay.episodes import RANDOM, columns, episode, sample

NUM_ENVIRONMENTS = 3


def test_an_actor_ends_though_its_server_takes_nothing_more(serve, spec):
    """Training is over and nobody samples: it would wait for the rate limiter for ever."""
    replay = UniformReplay(error_buffer=8.0)
    address = f"localhost:{serve(replay.make_tables(spec, sample())).port}"
    sink = replay.make_sink(ReplayServers([address]), sample(num_environments=NUM_ENVIRONMENTS))
    for step in episode(0, 60):
        sink.append(columns(*[step] * NUM_ENVIRONMENTS), RANDOM, np.zeros(NUM_ENVIRONMENTS, bool))
    assert sink.is_blocked()
    closing = threading.Thread(target=sink.close, args=(0.5,), daemon=True)
    closing.start()
    closing.join(timeout=30.0)
    assert not closing.is_alive()
