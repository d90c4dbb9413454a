"""Our side: the processes that `actorlearner train` starts, and ways to measure them.

The learner is measured by its metrics.jsonl, actors by their reports, as any user could.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actorlearner.launcher.command import REPLAY_SERVER, role_command, role_environment
from actorlearner.runtime.ports import find_free_port
from actorlearner.runtime.processes import die_with_parent
from benchmarks.measuring import Figures

if TYPE_CHECKING:
    from actorlearner.experiment import Experiment

START_SECS = 240.0
"""Longest wait for roles to start working, in seconds."""

FOREVER = (
    "train.num_iterations = 1_000_000_000",
    "train.eval_interval = 0",
)
"""Bindings of a run that does not end by itself."""

UNLIMITED = ("resident_replay.error_buffer = 1e15",)
"""Bindings that let learner and actors run at their own speed, without samples per insert."""


AS_THE_TUTORIAL = "sac_minitaur_tutorial"
"""The experiment with the numbers of the tutorial's own pieces, the reference."""

OURS = (
    "train.num_environments = 8",
    "replay_buffer_capacity = 1_000_000",
    "train.num_updates_per_call = 36",
    "learner.publish_interval = 108",
    "learner.publish_interval_secs = 0.1",
    "collect_actor.refresh_interval_secs = 0.05",
)
"""Bindings that run it as `sac_minitaur` is run; none changes the work of an update or an environment step."""


class Roles:
    """The roles of one run as children of this process; all are killed when the `with` block ends."""

    def __init__(self, experiment: str, bindings: Sequence[str] = (), root_dir: Path = Path("run")):
        """Args:
        experiment: A shipped experiment or a gin file.
        bindings: gin bindings, the same for every role.
        root_dir: The run directory.
        """
        self.experiment, self.bindings = experiment, tuple(bindings)
        self.root_dir = root_dir
        self.port = find_free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Roles:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()

    def start(self, kind: str, task: int = 0) -> None:
        """Starts one role, as `actorlearner train` does; its output goes to stderr."""
        flags = (f"--port={self.port}", "--local_only") if kind == REPLAY_SERVER else ()
        self.processes[f"{kind} {task}"] = subprocess.Popen(
            role_command(
                kind,
                self.experiment,
                replay_addresses=[self.address],
                root_dir=self.root_dir,
                task=task,
                seed=1,
                gin_bindings=self.bindings,
                flags=flags,
            ),
            env=role_environment(kind, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            preexec_fn=die_with_parent,
        )

    def count(self, kind: str) -> int:
        """Returns how many roles of a kind were started."""
        return sum(name.startswith(kind) for name in self.processes)

    def check(self) -> None:
        """Raises `RuntimeError` if a role has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"the {name} ended with exit status {process.returncode}")

    def follow_training(self, secs: float, deadline_secs: float = START_SECS) -> Sequence[Figures]:
        """Returns the training points written from now on that span at least `secs` seconds.

        Each has `time`, `train_step` and `environment_steps`; the first marks the start of the window.
        """
        path = self.root_dir / "metrics.jsonl"
        offset = path.stat().st_size if path.is_file() else 0
        deadline = time.monotonic() + secs + deadline_secs
        points: list[Figures] = []
        while len(points) < 2 or points[-1]["time"] - points[0]["time"] < secs:
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"the learner wrote {len(points)} points within {secs + deadline_secs:.0f} s")
            time.sleep(0.05)
            if path.is_file():
                with open(path, "rb") as file:
                    file.seek(offset)
                    for line in file:
                        if line.endswith(b"\n"):
                            offset += len(line)
                            points += [point for point in (json.loads(line),) if point["kind"] == "train"]
        return points

    def measure_training(self, window_secs: float) -> Figures:
        """Returns train steps and environment steps per second, between two of the learner's points."""
        points = self.follow_training(window_secs)
        secs = points[-1]["time"] - points[0]["time"]
        return {
            f"{name}s_per_sec": (points[-1][key] - points[0][key]) / secs
            for name, key in (("train_step", "train_step"), ("environment_step", "environment_steps"))
        }


@contextlib.contextmanager
def standing_in_for_learner(experiment: Experiment, address: str, zero_weights: bool = False) -> Iterator[None]:
    """Publishes weights every second and reads all that actors send, but trains nothing.

    So actors work as they do with a learner, and share the processor only with each other.

    Args:
      experiment: The experiment of the roles.
      address: Address of the replay server.
      zero_weights: Publishes zeros instead of the agent's initial weights.
    """
    import secrets

    import tensorflow as tf
    from tf_agents.specs import tensor_spec

    from actorlearner import variable_container
    from actorlearner.replay.servers import ReplayServers
    from actorlearner.runtime.lifecycle import Stop
    from actorlearner.variable_container import Phase, Publisher

    agent, _ = experiment.make_agent()
    variables = agent.collect_policy.variables()
    if zero_weights:
        for variable in variables:
            variable.assign(tf.zeros_like(variable))
    signatures = experiment.replay.table_signatures(agent.collect_data_spec)
    servers = ReplayServers([address])
    servers.await_tables(signatures, stop=Stop(), deadline_secs=START_SECS)
    variable_container.await_container(address, variables, stop=Stop(), deadline_secs=START_SECS)
    source = experiment.replay.make_source(
        servers,
        tensor_spec.from_spec(agent.collect_data_spec),
        experiment.sampling(agent),
        tf.distribute.get_strategy(),
    )
    source.restore({})
    publisher = Publisher(address, secrets.randbits(62))
    publisher.publish(0, variables)
    publisher.announce(Phase.TRAINING)
    closing = threading.Event()

    def stand_in() -> None:
        train_step, published_at = 0, time.monotonic()
        while not closing.wait(0.02):  # a call of train steps takes about as long
            source.is_ready()  # reads what has arrived
            if time.monotonic() - published_at >= 1.0:
                train_step, published_at = train_step + 1, time.monotonic()
                publisher.take_snapshot(train_step, variables)

    thread = threading.Thread(target=stand_in, name="stand-in", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(10)
        publisher.close()
        source.close()


def measure_collecting(
    roles: Roles, window_secs: float, num_actors: int = 1, poll_secs: float = 0.05, deadline_secs: float = START_SECS
) -> Figures:
    """Returns environment steps per second of `num_actors` collect actors together, by their own reports.

    Each actor's window starts and ends with a report and is at least `window_secs` long.
    """
    from actorlearner import reports

    reports.take_collect_reports(roles.address)  # discard earlier reports
    seen: dict[int, list[tuple[float, Any]]] = {}
    deadline = time.monotonic() + window_secs + deadline_secs
    while sum(found[-1][0] - found[0][0] >= window_secs for found in seen.values()) < num_actors:
        roles.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(seen)} of {num_actors} actors reported for {window_secs:g} s before the deadline")
        time.sleep(poll_secs)
        for report in reports.take_collect_reports(roles.address):
            seen.setdefault(report.actor, []).append((time.monotonic(), report))
    rate = blocked = episodes = 0.0
    for (begin, first), *_, (end, last) in seen.values():
        rate += (last.environment_steps - first.environment_steps) / (end - begin)
        blocked += (last.blocked_secs - first.blocked_secs) / (end - begin) / len(seen)
        episodes += last.episodes - first.episodes
    return {"environment_steps_per_sec": rate, "blocked_share": blocked, "episodes": episodes}


class Feeder:
    """Writes an episode repeatedly to the replay through the experiment's own sink; `with` ends its thread."""

    def __init__(self, experiment: Experiment, address: str):
        import numpy as np
        import tensorflow as tf

        from actorlearner.replay.servers import ReplayServers

        agent, _ = experiment.make_agent()
        self._episode = [
            tf.nest.map_structure(lambda leaf: np.asarray(leaf)[None], step)  # a batch of one environment
            for step in make_noise_episode(agent.collect_data_spec)
        ]
        sampling = dataclasses.replace(experiment.sampling(agent), num_environments=1)
        self._sink = experiment.replay.make_sink(ReplayServers([address]), sampling)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_steps = 0

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread:
            self._thread.join(10)
        self._sink.close(timeout_secs=1.0)

    def fill(self, num_steps: int, deadline_secs: float = START_SECS) -> None:
        """Writes `num_steps` steps and blocks until they are accepted; a learner must be reading."""
        deadline = time.monotonic() + deadline_secs
        for _ in range(num_steps):
            self._feed(deadline)

    def feed_in_background(self, steps_per_sec: float) -> None:
        """Continues at this rate from a thread."""

        def feed() -> None:
            start, count = time.monotonic(), 0
            while not self._closing.wait(0.01):
                now = time.monotonic()
                if now - start - count / steps_per_sec > 1.0:  # it was blocked: do not catch up
                    start, count = now, 0
                while count < (now - start) * steps_per_sec and not self._closing.is_set():
                    self._feed(now + START_SECS)
                    count += 1

        self._thread = threading.Thread(target=feed, name="feeder", daemon=True)
        self._thread.start()

    def _feed(self, deadline: float) -> None:
        import numpy as np

        from actorlearner.replay.base import RANDOM_POLICY

        self._sink.append(self._episode[self.num_steps % len(self._episode)], RANDOM_POLICY, np.array([False]))
        self.num_steps += 1
        while self._sink.is_blocked():
            if time.monotonic() > deadline:
                raise RuntimeError("the replay server accepts no more: no process reads")


def make_noise_episode(data_spec: Any, num_steps: int = 1_000) -> Sequence[Any]:
    """Returns an episode of `num_steps` trajectory steps and its boundary step, filled with noise in -1 to 1."""
    import numpy as np
    import tensorflow as tf
    from tf_agents.trajectories import StepType

    rng = np.random.default_rng(0)

    def noise(spec: Any) -> Any:
        dtype, shape = spec.dtype.as_numpy_dtype, spec.shape
        return rng.uniform(-1, 1, shape).astype(dtype) if spec.dtype.is_floating else np.zeros(shape, dtype)

    kinds = [StepType.FIRST, *[StepType.MID] * (num_steps - 1), StepType.LAST, StepType.FIRST]
    return [
        tf.nest.map_structure(noise, data_spec)._replace(
            step_type=np.asarray(kind, np.int32),
            next_step_type=np.asarray(kind_after, np.int32),
            discount=np.float32(1),
        )
        for kind, kind_after in zip(kinds, kinds[1:])
    ]
