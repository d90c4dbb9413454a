"""What TLS costs: chunks inserted and sampled per second, and the latency of a table look-up.

clear      Reverb's client and server, over loopback
ours       the same through the relays that --tls_dir starts on both ends
stunnel    the same through two stunnels with the same certificates, if that is installed

A chunk is 100 steps of Minitaur, 15 KB of noise, which Reverb cannot compress. Client, server and both ends of the
tunnel share this machine's cores, so a figure measures their work rather than a network.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from actorlearner.runtime.processes import die_with_parent
from benchmarks.measuring import (
    Figures,
    Measure,
    Settings,
    Side,
    alternate,
    count_per_sec,
    run_program,
)
from benchmarks.results import Row

TABLE = "chunks"
NUM_STEPS, WIDTH = 100, 37
CAPACITY = 500
AT_ONCE = 20  # chunks per confirmation, and per request for samples

FIGURES = (
    ("insert", "chunks inserted", "chunks/s"),
    ("sample", "chunks sampled", "chunks/s"),
    ("look", "latency of a table look-up", "ms"),
)
BARS = {"clear": (0.3, 4.0), "stunnel": (0.75, 1.5)}  # smallest share of the throughput, largest factor of the latency


def compare(settings: Settings) -> Sequence[Row]:
    """Returns a row for each figure against a connection in the clear, and against stunnel."""
    references = {"clear": "in the clear", "stunnel": "through stunnel"}
    ways = ["ours", "clear", *(["stunnel"] if shutil.which("stunnel") else [])]
    sides = [functools.partial(Side, f"tls-{way}", settings, ("tls", "through", way)) for way in ways]
    found = dict(zip(ways, alternate(settings, sides, window_secs=settings.window(6.0))))
    rows = []
    for way, reference in references.items():
        for name, measure, unit in FIGURES:
            is_time = unit == "ms"
            rows.append(
                Row(
                    f"tls-{name}-{way}",
                    f"{measure}, through TLS",
                    reference,
                    unit,
                    BARS[way][is_time],
                    [figures[name] for figures in found["ours"]] if way in found else [],
                    [figures[name] for figures in found.get(way, ())],
                    is_at_most=is_time,
                    not_measured=None if way in found else "there is no stunnel here: apt-get install stunnel4",
                )
            )
    return rows


@contextlib.contextmanager
def through(way: str) -> Iterator[Measure]:
    """A server in a process of its own, reached in one of the three ways."""
    import numpy as np
    import reverb

    from actorlearner.runtime.messages import read_server_info

    with reach_server(way) as address:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                read_server_info(address, timeout_secs=2)
                break
        client = reverb.Client(address)
        writer = client.trajectory_writer(num_keep_alive_refs=1)
        rng = np.random.default_rng(0)
        chunks = [rng.standard_normal((NUM_STEPS, WIDTH), np.float32) for _ in range(AT_ONCE)]

        def insert() -> int:
            for chunk in chunks:
                writer.append([chunk])
                writer.create_item(TABLE, priority=1.0, trajectory=[writer.history[0][-1:]])
            writer.flush(timeout_ms=30_000)
            return AT_ONCE

        def sample() -> int:
            return sum(1 for _ in client.sample(TABLE, num_samples=AT_ONCE * 10, emit_timesteps=False))

        def look() -> float:
            begin = time.perf_counter()
            client.server_info(timeout=10)
            return 1_000 * (time.perf_counter() - begin)

        def measure(window_secs: float) -> Figures:
            end = time.perf_counter() + window_secs / 3
            looks = [look()]
            while time.perf_counter() < end:
                looks.append(look())
            return {
                "insert": count_per_sec(insert, window_secs / 3),
                "sample": count_per_sec(sample, window_secs / 3),
                "look": statistics.median(looks),
                "chunk_bytes": chunks[0].nbytes,
            }

        measure(3.0)  # warm, and the table full
        yield measure


@contextlib.contextmanager
def reach_server(way: str) -> Iterator[str]:
    """Starts a server and the tunnel between it and this process; yields the address for Reverb's client."""
    from actorlearner.runtime.ports import find_free_port
    from actorlearner.runtime.tls import tunnel as tls_tunnel
    from actorlearner.runtime.tls.authority import make_certificates
    from actorlearner.runtime.tls.relay import OWN_LOOPBACK_ADDRESS

    port, tls_port, local_port = find_free_port(), find_free_port(), find_free_port()
    certs = Path("certs").absolute()
    make_certificates(certs, [])
    with contextlib.ExitStack() as stack:

        def start(*command: str) -> None:
            process = subprocess.Popen(command, stdout=sys.stderr, preexec_fn=die_with_parent)
            stack.callback(process.wait)
            stack.callback(process.kill)

        start(sys.executable, "-m", "benchmarks.tls", "serve", str(port))
        if way == "clear":
            yield f"localhost:{port}"
        elif way == "ours":
            stack.callback(tls_tunnel.open_to_peers(tls_port, certs / "replay-server", port).close)
            tunnel = tls_tunnel.open_to_peer(f"localhost:{tls_port}", certs / "learner")
            stack.callback(tunnel.close)
            yield tunnel.address
        else:
            for role, accept, connect in (
                ("replay-server", str(tls_port), f"127.0.0.1:{port}\nlocal = {OWN_LOOPBACK_ADDRESS}"),
                ("learner", f"127.0.0.1:{local_port}", f"127.0.0.1:{tls_port}\nclient = yes\ncheckHost = localhost"),
            ):
                Path(role).write_text(
                    "foreground = yes\npid =\ndebug = warning\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
                    f"[reverb]\naccept = {accept}\nconnect = {connect}\nsslVersionMin = TLSv1.3\nverifyChain = yes\n"
                    f"CAfile = {certs}/ca.crt\ncert = {certs}/{role}/tls.crt\nkey = {certs}/{role}/tls.key\n"
                )
                start("stunnel", role)
            yield f"localhost:{local_port}"


def serve(port: int) -> None:
    """Serves one table of chunks until it is killed."""
    import reverb
    import tensorflow as tf

    table = reverb.Table(
        TABLE,
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=CAPACITY,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=[tf.TensorSpec([None, NUM_STEPS, WIDTH], tf.float32)],
    )
    reverb.Server([table], port=port).wait()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        run_program(through=through)
