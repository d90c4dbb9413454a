"""Transitions per second from four writers through 1, 2 and 4 replay servers into one learner's mirror.

Writers, servers and the reader are processes of their own, with the sinks, tables and source of resident_replay, and
run as fast as they can; nothing trains and nothing is collected. Two servers can only use what one leaves of the
machine: on two cores, which five processes share already, expect little.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from actorlearner.runtime.processes import die_with_parent
from benchmarks.measuring import Figures, Measure, Settings, Side, alternate, run_program
from benchmarks.results import Row

NUM_SERVERS = (1, 2, 4)
NUM_WRITERS = 4
NUM_ENVIRONMENTS = 4  # of each writer
START_SECS = 240.0
STEPS = {"small": "28 numbers, as Minitaur's", "images": "84 x 84 x 4 bytes"}
PROGRAM = ("replay_servers", "through")
BAR = 1.0  # several must not be slower than one


def compare(settings: Settings, kinds: Sequence[str] = tuple(STEPS)) -> Sequence[Row]:
    """Returns a row for each size of step and each number of servers above one."""
    rows = []
    for kind in kinds:
        sides = [
            functools.partial(Side, f"replay-servers-{kind}-{number}", settings, (*PROGRAM, kind, number))
            for number in map(str, NUM_SERVERS)
        ]
        found = dict(zip(NUM_SERVERS, alternate(settings, sides, window_secs=settings.window(8.0))))
        rates = {number: [turn["transitions_per_sec"] for turn in turns] for number, turns in found.items()}
        rows += [
            Row(
                f"replay-servers-{kind}-{number}",
                f"replay through {number} servers, {NUM_WRITERS} writers, steps of {STEPS[kind]}",
                "one server",
                "transitions/s",
                BAR,
                rates[number],
                rates[1],
                details={"ours": found[number], "theirs": found[1]},
            )
            for number in NUM_SERVERS[1:]
        ]
    return rows


@contextlib.contextmanager
def through(kind: str, num_servers: str) -> Iterator[Measure]:
    """Servers and writers as processes; this process reads as the learner does."""
    from actorlearner.runtime.ports import find_free_ports

    ports = [str(port) for port in find_free_ports(int(num_servers))]
    children = [_start("serve", kind, port) for port in ports]
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    children += [_start("write", kind, addresses, str(task)) for task in range(NUM_WRITERS)]
    try:
        import tensorflow as tf

        from actorlearner.replay.servers import ReplayServers
        from actorlearner.runtime.lifecycle import Stop

        spec = _make_spec(kind)
        servers = ReplayServers(addresses.split(","))
        servers.await_tables({}, stop=Stop(), deadline_secs=START_SECS)
        source = _make_replay(kind).make_source(servers, spec, _make_sampling(), tf.distribute.get_strategy())
        source.restore({})
        bytes_per_step = sum(leaf.dtype.size * leaf.shape.num_elements() for leaf in tf.nest.flatten(spec))

        def take_in(secs: float) -> Figures:
            began_at, before = time.monotonic(), source.counts()["inserts"]
            while (elapsed := time.monotonic() - began_at) < secs:
                source.is_ready()  # reads what has arrived
                source.await_data(secs=0.05)
            rate = (source.counts()["inserts"] - before) / elapsed
            return {"transitions_per_sec": rate, "mb_per_sec": rate * bytes_per_step / 1e6}

        deadline = time.monotonic() + START_SECS
        while len(list(Path().glob("writer-*"))) < NUM_WRITERS:
            take_in(0.1)
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all writers started within {START_SECS:g} s")
        take_in(2.0)  # warm
        yield lambda window_secs: take_in(window_secs)
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.replay_servers", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=die_with_parent,
    )


def serve(kind: str, port: str) -> None:
    """Serves the tables of one replay server until it is killed."""
    import reverb

    tables = _make_replay(kind).make_tables(_make_spec(kind), _make_sampling())
    server = reverb.Server(tables, port=int(port))
    server.wait()


def write(kind: str, addresses: str, task: str) -> None:
    """Writes the same steps of noise as fast as they are accepted, until it is killed."""
    import numpy as np
    import tensorflow as tf
    from tf_agents.trajectories import StepType

    from actorlearner.replay.servers import ReplayServers
    from actorlearner.runtime.devices import hold_to_one_thread

    hold_to_one_thread()
    servers = ReplayServers(addresses.split(","), int(task))
    sink = _make_replay(kind).make_sink(servers, _make_sampling())
    rng = np.random.default_rng(int(task))

    def noise(spec: Any) -> Any:
        shape, dtype = [NUM_ENVIRONMENTS, *spec.shape], spec.dtype.as_numpy_dtype
        if spec.dtype.is_floating:
            return rng.uniform(-1, 1, shape).astype(dtype)
        return rng.integers(0, 256 if dtype == np.uint8 else 2, shape, dtype)

    middle = np.full(NUM_ENVIRONMENTS, StepType.MID, np.int32)
    step = tf.nest.map_structure(noise, _make_spec(kind))._replace(step_type=middle, next_step_type=middle)
    crashed = np.zeros(NUM_ENVIRONMENTS, bool)
    while True:
        num_chunks = sink.num_chunks
        sink.append(step, 0, crashed)
        while sink.is_blocked():
            pass
        if sink.num_chunks > num_chunks == 0:
            Path(f"writer-{task}").touch()


def _make_spec(kind: str) -> Any:
    import tensorflow as tf
    from tf_agents.trajectories import trajectory

    observation = {"small": tf.TensorSpec((28,), tf.float32), "images": tf.TensorSpec((84, 84, 4), tf.uint8)}[kind]
    number, truth = tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.int32)
    return trajectory.Trajectory(truth, observation, tf.TensorSpec((8,), tf.float32), (), truth, number, number)


def _make_replay(kind: str) -> Any:
    from actorlearner.replay.resident import ResidentReplay

    return ResidentReplay(replay_buffer_capacity={"small": 50_000, "images": 5_000}[kind], error_buffer=1e15)


def _make_sampling() -> Any:
    from actorlearner.replay.base import Sampling

    return Sampling(
        num_steps=2,
        batch_size=256,
        num_updates_per_call=50,
        num_environments=NUM_ENVIRONMENTS,
        initial_collect_steps=0,
        samples_per_insert=1.0,
    )


if __name__ == "__main__":
    if sys.argv[1] == "through":
        run_program(through=through)
    children: dict[str, Callable[..., None]] = {"serve": serve, "write": write}
    children[sys.argv[1]](*sys.argv[2:])
