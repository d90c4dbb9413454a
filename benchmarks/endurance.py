"""Hours of dqn_cartpole at full speed: does the learner slow down, and does a role's memory grow?

Not part of the default: `actorlearner bench --only endurance --minutes=120`. The reference is the second minute of the
same run, and for memory the end of its first quarter, when the replay is full. A shared machine may be slower or faster
two hours later, so the end of the run is also compared with the start of a run that starts right after it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import Figures, Measure, Settings, Side, run_program
from benchmarks.results import Row

SAMPLE_SECS = 5.0
NUM_WINDOWS = 5  # at the end of the run, and in the run after it


def compare(settings: Settings) -> Sequence[Row]:
    """Returns two rows for the learner's rate and one for each role's resident memory."""
    secs = 60.0 * settings.minutes
    minute, window = min(60.0, secs / 4), min(60.0, secs / (2 * NUM_WINDOWS))
    samples = _run("endurance", settings, secs)
    anew = _run("endurance-anew", settings, (NUM_WINDOWS + 1) * window)
    # On a shared machine, one minute differs from the next by a tenth.
    last = [rate_between(samples, secs - (n + 1) * window, secs - n * window) for n in range(NUM_WINDOWS)]
    measure = f"learner's rate in the last {NUM_WINDOWS * window / 60:g} minutes of {settings.minutes:g}"
    rate_row = Row(
        "endurance-rate",
        f"{measure}, CartPole at full speed",
        "its rate in minute 2",
        "updates/s",
        0.95,
        last,
        [rate_between(samples, minute, 2 * minute)],
        details={"samples": samples},
    )
    anew_row = Row(
        "endurance-rate-anew",
        measure,
        f"a run started right after, {NUM_WINDOWS * window / 60:g} minutes, its first {window:.0f} s left out",
        "updates/s",
        0.95,
        last,
        [rate_between(anew, (n + 1) * window, (n + 2) * window) for n in range(NUM_WINDOWS)],
        details={"samples": anew},
    )
    return [rate_row, anew_row, *(_memory_row(role, samples, secs) for role in samples[0]["resident_mb"])]


def _run(name: str, settings: Settings, secs: float) -> Sequence[Figures]:
    with contextlib.closing(Side(name, settings, ("endurance", "cartpole"))) as side:
        settings.say(f"{name}: {secs / 60:g} minutes of dqn_cartpole")
        side.await_ready()
        samples: Sequence[Figures] = side.measure(window_secs=secs)["samples"]
    return samples


def _memory_row(role: str, samples: Sequence[Figures], secs: float) -> Row:
    def resident(begin: float, end: float) -> Sequence[float]:
        found = [sample["resident_mb"][role] for sample in samples if begin * secs <= sample["secs"] <= end * secs]
        return [statistics.median(found)]

    return Row(
        f"endurance-memory-{role.replace(' ', '-')}",
        f"resident memory of the {role} at the end",
        "after a quarter of the time",
        "MB",
        1.05,
        resident(0.9, 1.1),
        resident(0.2, 0.3),
        is_at_most=True,
    )


def rate_between(samples: Sequence[Figures], begin: float, end: float) -> float:
    """Returns train steps per second between two moments of the run, in seconds from its first sample."""
    within = [sample for sample in samples if begin <= sample["secs"] <= end]
    first, last = within[0], within[-1]
    return (last["train_step"] - first["train_step"]) / (last["time"] - first["time"])


@contextlib.contextmanager
def cartpole() -> Iterator[Measure]:
    """Every role of dqn_cartpole as a process; this process observes."""
    from actorlearner.launcher.command import COLLECT_ACTOR, EVAL_ACTOR, LEARNER, REPLAY_SERVER
    from benchmarks.roles import FOREVER, Roles

    evaluations = (  # all evaluations cost the same: episodes do not get longer as the policy learns
        "train.eval_interval = 4_000",
        "gym_environment.max_episode_steps = 200",
    )
    with Roles("dqn_cartpole", [*FOREVER, *evaluations]) as roles:
        for kind in (REPLAY_SERVER, LEARNER, COLLECT_ACTOR, EVAL_ACTOR):
            roles.start(kind)
        roles.follow_training(secs=1.0)

        def measure(window_secs: float) -> Figures:
            samples: list[dict[str, Any]] = []
            start = time.monotonic()
            every_secs = min(SAMPLE_SECS, window_secs / 40)
            while not samples or samples[-1]["secs"] < window_secs:
                time.sleep(every_secs)
                roles.check()
                status = read_counts(roles.root_dir)
                memory = {name: read_resident_mb(process.pid) for name, process in roles.processes.items()}
                samples.append({"secs": time.monotonic() - start, **status, "resident_mb": memory})
            return {"samples": samples}

        yield measure


def read_counts(root_dir: Path) -> Figures:
    """Returns the train step in status.json, and when it was written."""
    from actorlearner.run.status import read_status

    status = read_status(root_dir / "status.json")
    assert status is not None, f"there is no status in {root_dir}"
    return {"time": status.time, "train_step": status.train_step, "environment_steps": status.environment_steps}


def read_resident_mb(pid: int) -> float:
    """Returns the resident memory of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    raise RuntimeError(f"process {pid} has no resident memory")


if __name__ == "__main__":
    run_program(cartpole=cartpole)
