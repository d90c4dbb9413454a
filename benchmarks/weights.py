"""Weights on their way to a collect actor: bytes per environment step, and the age of the acting weights.

Measured in a real run of sac_minitaur_tutorial. Bytes: the server's count of reads from the variable container's tables
(the version board's reads include the server's own two a second), times the size of one read. The reference is the
stock distributed example's: one full pull at every environment step, with the size of a real pull by TF-Agents' own
client from the same container.

Age: from the time the learner had these weights (its metrics have the time of each train step) to the time the actor
acts with them (its TensorBoard events have their train step).

The average has a bar, one second. The longest age is reported too, without a bar, because the design cannot promise
one: weights are published after so many train steps, however long a machine takes for them, and the replay server
answers no request while it writes a checkpoint; for a full replay that is half a minute.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measuring import Figures, Measure, Settings, Side, alternate, run_program
from benchmarks.results import Row


def compare(settings: Settings) -> Sequence[Row]:
    """Returns two rows: bytes, and age in seconds."""
    side = lambda: Side("weights", settings, ("weights", "real_run"))  # noqa: E731
    (found,) = alternate(settings, [side], window_secs=settings.window(20.0))
    return judge(found)


def judge(found: Sequence[Figures]) -> Sequence[Row]:
    """Returns the rows for these figures."""
    longest = [figures["longest_age_secs"] for figures in found]
    return [
        Row(
            "weights-bytes",
            "weight bytes per environment step, Minitaur",
            "a full pull at every step",
            "bytes",
            0.01,
            [figures["bytes_per_step"] for figures in found],
            [figures["bytes_of_full_pull"] for figures in found],
            is_at_most=True,
            details={"runs": found},
        ),
        Row(
            "weights-age",
            f"average age of the weights a collect actor acts with, Minitaur (the longest: {max(longest):.2g} s)",
            "one second",
            "s",
            1.0,
            [figures["average_age_secs"] for figures in found],
            [1.0],
            is_at_most=True,
            details={"longest_age_secs": longest},
        ),
    ]


@contextlib.contextmanager
def real_run() -> Iterator[Measure]:
    """Server, learner and collect actor of the tutorial's experiment as processes; this process observes."""
    from actorlearner.launcher.command import COLLECT_ACTOR, LEARNER, REPLAY_SERVER
    from benchmarks.roles import AS_THE_TUTORIAL, FOREVER, OURS, Roles

    bindings = [
        *FOREVER,
        *OURS,
        "train.initial_collect_steps = 1_000",
        "train.log_interval = 25",
        "collect_actor.report_interval_secs = 0.3",
        "collect_actor.events_interval_secs = 0.1",  # one event per report
    ]
    with Roles(AS_THE_TUTORIAL, bindings) as roles:
        for kind in (REPLAY_SERVER, LEARNER, COLLECT_ACTOR):
            roles.start(kind)
        import reverb
        from tf_agents.experimental.distributed import reverb_variable_container as stock

        from actorlearner import variable_container
        from actorlearner.runtime.devices import hold_to_one_thread

        hold_to_one_thread()
        roles.follow_training(secs=10.0)
        client = reverb.Client(roles.address)
        version_bytes = 8 * len(variable_container.VERSION_SIGNATURE)
        pulled = stock.ReverbVariableContainer(roles.address).pull()
        pull_bytes = count_bytes(pulled)

        def count_reads(table: str) -> int:
            return client.server_info(timeout=10)[table].rate_limiter_info.sample_stats.completed

        def measure(window_secs: float) -> Figures:
            tables = (variable_container.VARIABLES_TABLE, variable_container.VERSION_TABLE)
            began_at = time.time()
            before = [count_reads(table) for table in tables]
            points = roles.follow_training(window_secs)
            pulls, looks = (count_reads(table) - count for table, count in zip(tables, before))
            secs = points[-1]["time"] - points[0]["time"]
            steps_per_sec = (points[-1]["environment_steps"] - points[0]["environment_steps"]) / secs
            steps = steps_per_sec * (time.time() - began_at)
            ages = find_ages(roles.root_dir, points)
            return {
                "bytes_per_step": (pulls * pull_bytes + looks * version_bytes) / steps,
                "bytes_of_full_pull": pull_bytes,
                "pulls": pulls,
                "looks": looks,
                "environment_steps_per_sec": steps_per_sec,
                "average_age_secs": statistics.fmean(ages),
                "longest_age_secs": max(ages),
                "num_ages": len(ages),
            }

        yield measure


def count_bytes(values: object) -> int:
    """Returns the size of all arrays in a nest."""
    import numpy as np
    import tree

    return sum(np.asarray(leaf).nbytes for leaf in tree.flatten(values))


def find_ages(root_dir: Path, points: Sequence[Figures]) -> Sequence[float]:
    """Returns the age of the acting weights, in seconds, at each event of the collect actor within the window.

    Raises:
      RuntimeError: There was no event.
    """
    import numpy as np
    import tensorflow as tf

    begin, end = points[0]["time"], points[-1]["time"]
    history = read_history(root_dir)
    acting: dict[float, int] = {}
    for path in sorted((root_dir / "collect" / "0").glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            if event.HasField("summary") and begin <= event.wall_time <= end:
                acting[event.wall_time] = event.step
    if not acting:
        raise RuntimeError(f"the collect actor wrote no event within {end - begin:.0f} s")
    times, steps = zip(*history)
    return [moment - float(np.interp(step, steps, times)) for moment, step in acting.items()]


def read_history(root_dir: Path) -> Sequence[tuple[float, int]]:
    """Returns when the learner reached which train step."""
    import json

    lines = (root_dir / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines if '"train"' in line]
    return [(point["time"], point["train_step"]) for point in points]


if __name__ == "__main__":
    run_program(real_run=real_run)
