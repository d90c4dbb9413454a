"""Train variants with several seeds and compare them.

variants x seeds --> trials (several at once) --> run directories --> one table, one picture

Each trial is a real `actorlearner train` in <root_dir>/<variant>/seed-<S>. What has ended is not repeated and what has
not goes on, so the same command, given again, continues whatever was interrupted. Here are the arguments; what runs is
in sweeping/run.py. Imports nothing heavy before it reports or races.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actorlearner.launcher import train
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.lifecycle import ExitCode
from actorlearner.tools.sweeping.grid import (
    AnotherSweep,
    Grid,
    describe_changes,
    describe_differences,
    find_settings,
    make_variants,
    parse_seeds,
    read_asked,
)
from actorlearner.tools.sweeping.run import Sweep, count_cores

_TRIAL_BYTES = 3 * 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sweep's arguments."""
    parser.usage = "actorlearner sweep EXPERIMENT [options] [-- TRAIN_FLAG ...] | actorlearner sweep --report DIR"
    parser.epilog = "Flags of `actorlearner train`, such as --num_collect_actors=2, follow -- and go to every trial."
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help="a shipped experiment or a gin file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=V1,V2,...",
        help="values of a gin binding, e.g. 'sac.n_step_update=1,3,5'; commas inside brackets and quotes are part of a "
        "value; may be repeated: every combination is a variant",
    )  # fmt: skip
    parser.add_argument(
        "--variant", action="append", default=[], metavar="'NAME: BINDING; ...'",
        help="one more variant, besides those of --set, with these bindings; 'NAME:' changes nothing; may be repeated",
    )  # fmt: skip
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="BINDING", help="of all")
    parser.add_argument(
        "--seeds", default="3", metavar="N", help="5: seeds 0 to 4; 3,7,9: these; 7,: only this one (default: 3)"
    )
    parser.add_argument(
        "--root_dir", type=Path, help="the sweep's folder (default: runs/sweep-<experiment>); given again, it continues"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help="trials at once (default: one for every two cores and 3 GiB of memory, at least 1)",
    )  # fmt: skip
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="lower the trials' priority by N (default: 0)")
    parser.add_argument(
        "--at", default="", metavar="STEP,...", help="also compare at these steps of --clock (default: only the end)"
    )
    parser.add_argument(
        "--clock", choices=("environment_steps", "train_step"),
        help="what --at and the picture's x axis count (default: environment_steps, or as before)",
    )  # fmt: skip
    parser.add_argument(
        "--race", action="store_true",
        help="stop variants that are beaten with confidence, after three seeds (without it a beaten one continues)",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the trials and their commands; start nothing")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a sweep's present table and picture")
    parser.set_defaults(behind_dashes=[])  # the flags of `actorlearner train`


def run(arguments: argparse.Namespace) -> int:
    """Runs the sweep, or reports on one; returns its exit status."""
    try:
        steps = [int(word) for word in arguments.at.split(",") if word.strip()]
    except ValueError:
        return _refuse(f"--at={arguments.at}: expected steps separated by commas, such as 50000,100000", ExitCode.USAGE)
    if arguments.report:
        if arguments.experiment:
            return _refuse("EXPERIMENT and --report: give only one of them", ExitCode.USAGE)
        from actorlearner.tools.sweeping.report import report_sweep

        return report_sweep(arguments.report, arguments.clock, steps)
    try:
        _check_train_flags(arguments.behind_dashes)
        grid = _read_grid(arguments)
        root = arguments.root_dir or Path("runs") / f"sweep-{Path(grid.experiment).stem}"
        held: dict[str, Any] = {}
        if (root / "sweep.json").exists():
            held = RunDirectory(root).read_json(root / "sweep.json")
            _require_same(root, describe_differences(read_asked(root, held), grid))
        settings = find_settings(grid)
        _require_same(root, describe_changes(held.get("settings", {}), settings))
    except AnotherSweep as error:
        return _refuse(str(error), ExitCode.DATA)
    except ValueError as error:
        return _refuse(str(error), ExitCode.USAGE)
    sweep = Sweep(
        root,
        grid,
        settings,
        held,
        clock=arguments.clock or held.get("clock", "environment_steps"),
        steps=steps or held.get("at", []),
        jobs=_bound_jobs() if arguments.jobs is None else arguments.jobs,
        nice=arguments.nice,
        race=arguments.race,
    )
    if arguments.dry_run:
        sweep.print_plan()
        return 0
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".sweep.lock", "w")  # noqa: SIM115  (held until the process ends)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"another sweep is running in --root_dir={root}. Stop it, or give another directory."
        return _refuse(message, ExitCode.OCCUPIED)
    except OSError as error:
        message = f"--root_dir={root} cannot be written: {error.strerror} ({error.filename})"
        return _refuse(message, ExitCode.CANNOT_CREATE)
    with lock:
        return sweep.run()


def _refuse(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _require_same(root: Path, differences: Sequence[str]) -> None:
    """Raises `AnotherSweep` if there are differences."""
    if differences:
        raise AnotherSweep(
            f"--root_dir={root} holds another sweep:\n  "
            + "\n  ".join(differences)
            + "\nGive another directory; nothing in this one was changed."
        )


def _check_train_flags(train_flags: Sequence[str]) -> None:
    """Raises `ValueError` if a flag after -- is the sweep's own, or would make every trial fail.

    A flag that `actorlearner train` itself refuses ends the process now instead of every trial.
    """
    parser = argparse.ArgumentParser(prog="actorlearner train")
    train.add_arguments(parser)
    given = parser.parse_args(["EXPERIMENT", *train_flags])
    for name, instead in (
        ("seed", "--seeds"),
        ("root_dir", "the sweep's --root_dir"),
        ("gin_bindings", "--gin_bindings"),
    ):
        if getattr(given, name) not in (None, []):
            raise ValueError(f"--{name} after --: each trial has its own; give {instead} before --")
    if given.fresh:
        raise ValueError("--fresh behind --: a sweep continues what is there; give it another --root_dir instead")
    for name in ("num_collect_actors", "num_eval_actors", "num_replay_servers"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name}={getattr(given, name)} after --: expected 1 or more")


def _read_grid(arguments: argparse.Namespace) -> Grid:
    """Returns the grid that the arguments describe. Raises `ValueError`."""
    if not arguments.experiment:
        raise ValueError("EXPERIMENT is missing: expected a shipped experiment or a gin file, or --report DIR")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs={arguments.jobs}: expected 1 or more")
    if not 0 <= arguments.nice <= 19:
        raise ValueError(f"--nice={arguments.nice}: expected 0 to 19")
    return Grid(
        experiment=arguments.experiment,
        gin_bindings=tuple(arguments.gin_bindings),
        variants=make_variants(arguments.set, arguments.variant),
        seeds=parse_seeds(arguments.seeds),
        train_flags=tuple(arguments.behind_dashes),
    )


def _bound_jobs() -> int:
    """Returns how many trials the machine can run at once; each has four processes, which take turns."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(count_cores() // 2, memory // _TRIAL_BYTES))
