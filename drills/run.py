"""Inject faults into a small run and report which promises held.

Network faults come last, when the other roles reach the replay server through the drill's own TCP proxy. Imports
nothing heavy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from rich.console import Console
from rich.table import Table

from actorlearner.flags import non_negative, positive
from actorlearner.runtime.lifecycle import ExitCode
from drills.deaths import kill_role
from drills.drilled_run import EVAL_INTERVAL, MANY_ITERATIONS, ROLES, Hang, Run, await_
from drills.faults import FAULTS, NETWORK_FAULTS, await_end
from drills.judging import Outcome
from drills.wire import Wire

MEDIAN_SECS = 15.0  # promised median over many kills
SECS_PER_KILL = 20.0  # of training per kill, so that training lasts until the last kill
MEASURE_SECS = 8.0
EVALUATION_SECS = 5.0  # of training between two evaluations; three long episodes take one or two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the drill's arguments."""
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a shipped experiment or a gin file")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="NAME",
        help="such as kill-learner; may be repeated; an unknown name lists all (default: all, about 15 minutes)",
    )  # fmt: skip
    parser.add_argument(
        "--kills", type=non_negative, default=0, metavar="N",
        help="instead: send SIGKILL to random roles of one run, N times",
    )  # fmt: skip
    parser.add_argument(
        "--random", type=non_negative, default=0, metavar="N", help="instead: N faults drawn at random"
    )
    parser.add_argument(
        "--num_iterations", type=positive, metavar="N",
        help="train steps of the run with --kills (default: enough for 20 s per kill)",
    )  # fmt: skip
    parser.add_argument("--seed", type=non_negative, default=0, help="seed of the run and the faults (default: 0)")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="BINDING", help="may be repeated")
    parser.add_argument("--root_dir", type=Path, help="keep the run in this directory (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes to this file")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if every promise held, 1 if one did not, 64 if the arguments contradict each other."""
    unknown = [name for name in arguments.fault if name not in FAULTS]
    if unknown:
        print(f"error: --fault={unknown[0]}: expected one of {', '.join(FAULTS)}", file=sys.stderr)
        return ExitCode.USAGE
    if sum(map(bool, (arguments.fault, arguments.kills, arguments.random))) > 1:
        print("error: give only one of --fault, --kills and --random", file=sys.stderr)
        return ExitCode.USAGE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.TERMINATED))  # ends what it started
    drawn = random.Random(arguments.seed).sample(tuple(FAULTS), min(arguments.random, len(FAULTS)))
    return run_drill(
        arguments.experiment,
        faults=arguments.fault or drawn,
        num_kills=arguments.kills,
        num_iterations=arguments.num_iterations,
        seed=arguments.seed,
        gin_bindings=arguments.gin_bindings,
        folder=arguments.root_dir,
        json_path=arguments.json,
    )


def run_drill(
    experiment: str,
    *,
    faults: Sequence[str],
    num_kills: int,
    num_iterations: Optional[int] = None,
    seed: int,
    gin_bindings: Sequence[str] = (),
    folder: Optional[Path] = None,
    json_path: Optional[Path] = None,
) -> int:
    """Runs the drill and prints a table; returns 0 if every promise held, else 1.

    Blocks for about half a minute per fault on two cores, and a minute and a half for network faults.

    Args:
      experiment: A shipped experiment or a gin file.
      faults: Names from `FAULTS`, run in this order with network faults last; empty for all, unless `num_kills` is
        given.
      num_kills: Number of SIGKILLs to random roles during one run, which then must end by itself.
      num_iterations: Train steps of the run with kills; by default as many as it makes in `SECS_PER_KILL` per kill, at
        the speed of its first seconds.
      seed: Seed of the run and of the choice of roles and times.
      gin_bindings: Applied after the drill's own.
      folder: Keeps the run there; by default it is in a temporary directory, removed if every promise held.
      json_path: Also writes the outcomes there.
    """
    place = folder or Path(tempfile.mkdtemp(prefix="drill-"))
    run = Run(experiment, place / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}", gin_bindings, seed)
    console = Console(width=None if sys.stdout.isatty() else 150)
    outcomes: list[Outcome] = []
    try:
        if num_kills:
            steps = _kill_at_random(run, num_kills, num_iterations, seed)
        else:
            steps = _inject(run, faults or tuple(FAULTS))
        for outcome in steps:
            outcomes.append(outcome)
            console.print(_describe(outcome), highlight=False)
    except Hang as hang:
        outcomes.append(Outcome("hang", broken=[str(hang)]))
    finally:
        run.kill_processes()
        if sys.exc_info()[0]:
            console.print(f"the run is in {run.folder}")
    recoveries = [o.recovery_secs for o in outcomes if o.recovery_secs is not None]
    median_secs = statistics.median(recoveries) if recoveries else 0.0
    if num_kills and median_secs > MEDIAN_SECS:
        outcomes[-1].broken.append(f"recovered after {median_secs:.0f} s in the median, promised {MEDIAN_SECS:.0f} s")
    console.print(make_table(outcomes))
    if recoveries:
        console.print(
            f"time to recover: median {median_secs:.1f} s, longest {max(recoveries):.1f} s, of {len(recoveries)}"
        )
    not_done = [outcome.fault for outcome in outcomes if outcome.not_done]
    if not_done:
        console.print(f"not tested here: {', '.join(not_done)}")
    held = all(not outcome.broken for outcome in outcomes)
    if json_path:
        content = {
            "experiment": experiment,
            "seed": seed,
            "held": held,
            "outcomes": [{**dataclasses.asdict(outcome), "verdict": outcome.verdict} for outcome in outcomes],
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    if held and folder is None:
        shutil.rmtree(place, ignore_errors=True)
    else:
        console.print(f"the run is in {run.folder}")
    return 0 if held else 1


def _inject(run: Run, faults: Sequence[str]) -> Iterator[Outcome]:
    for on_a_wire in (False, True):
        chosen = [name for name in faults if (name in NETWORK_FAULTS) == on_a_wire]
        if chosen:
            with contextlib.ExitStack() as stack:
                run.wire = stack.enter_context(Wire(run.port)) if on_a_wire else None
                started_at = time.time()
                run.start(MANY_ITERATIONS)
                run.await_training(started_at)
                for name in chosen:
                    run.await_steps(1_000)
                    if name == "kill-eval-actor":
                        await_(lambda: run.status().get("pending_evaluations"), "evaluation under way")
                    yield FAULTS[name](run)
                run.stop()
    run.wire = None
    # Let the run end soon: the same run with few train steps left.
    num_iterations = (int(run.status()["train_step"]) // 1_000 + 2) * 1_000
    run.start(num_iterations)
    yield await_end(run, num_iterations)


def _kill_at_random(run: Run, num_kills: int, num_iterations: Optional[int], seed: int) -> Iterator[Outcome]:
    chance = random.Random(seed)
    num_iterations = num_iterations or _fit_to_machine(run, SECS_PER_KILL * (num_kills + 1))
    started_at = time.time()
    run.start(num_iterations)
    run.await_training(started_at)
    for number in range(num_kills):
        time.sleep(chance.uniform(0.5, 4.0))
        if run.status().get("phase") not in ("training", "waiting"):
            yield Outcome("end of training", broken=[f"it ended before {num_kills - number} of the kills"])
            break
        yield kill_role(run, chance.choice(ROLES))
    yield await_end(run, num_iterations)


def _fit_to_machine(run: Run, secs: float) -> int:
    """Returns how many train steps take about `secs` seconds on this machine, and adapts the evaluation interval.

    It starts the run, and stops it again.
    """
    started_at = time.time()
    run.start(MANY_ITERATIONS)
    first, since = run.await_training(started_at)["train_step"], time.monotonic()
    time.sleep(MEASURE_SECS)
    last, until = run.status()["train_step"], time.monotonic()
    run.stop()
    steps_per_sec = (last - first) / (until - since)
    # Multiples of it were evaluated in this short run too.
    run.evaluate_every(EVAL_INTERVAL * max(1, math.ceil(EVALUATION_SECS * steps_per_sec / EVAL_INTERVAL)))
    return 1_000 * math.ceil((last + secs * steps_per_sec) / 1_000)


def _describe(outcome: Outcome) -> str:
    secs = "" if outcome.recovery_secs is None else f" after {outcome.recovery_secs:.1f} s"
    steps = f"train step {outcome.train_step_before} -> {outcome.train_step_after}"
    remarks = f" ({outcome.remarks})" if outcome.remarks else ""
    return f"{outcome.fault}: {steps}{secs}: {outcome.verdict}{remarks}"


def make_table(outcomes: Sequence[Outcome]) -> Table:
    """Returns the outcomes as a table."""
    table = Table("fault", "recovered", "transitions lost", "evaluations lost", "train step", "ratio error", "verdict")
    for outcome in outcomes:
        table.add_row(
            outcome.fault,
            "" if outcome.recovery_secs is None else f"{outcome.recovery_secs:.1f} s",
            "" if outcome.transitions_lost is None else f"{outcome.transitions_lost:,}",
            "" if outcome.evaluations_lost is None else f"{outcome.evaluations_lost:,}",
            f"{outcome.train_step_before} -> {outcome.train_step_after}",
            "" if outcome.ratio_error is None else f"{outcome.ratio_error:.2%}",
            f"{outcome.verdict}, {outcome.remarks}" if outcome.remarks else outcome.verdict,
        )
    return table
