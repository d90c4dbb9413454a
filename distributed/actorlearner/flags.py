"""The flags that several subcommands share, and what they hold."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from actorlearner.runtime.health import HANG_SECS

if TYPE_CHECKING:
    from actorlearner.experiment import Experiment


def add_experiment_flags(parser: argparse.ArgumentParser) -> None:
    """Adds which experiment, and how patient its roles are."""
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a shipped experiment (sac_minitaur, dqn_cartpole) or a gin file"
    )
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="BINDING",
        help="overrides the gin file, e.g. 'train.num_iterations = 100'; may be repeated, or hold several divided by ;",
    )
    parser.add_argument(
        "--seed",
        type=non_negative,
        default=None,
        help="every role's seeds derive from it (default: that of the run's first start in --root_dir; of a new run 0, "
        "train: a new one)",
    )
    parser.add_argument(
        "--peer_patience_secs", type=float, default=300.0, metavar="SECS",
        help="how long an unreachable peer is waited for (default: 300)",
    )  # fmt: skip
    parser.add_argument(
        "--hang_secs", type=seconds, default=os.environ.get("ACTORLEARNER_HANG_SECS") or HANG_SECS, metavar="SECS",
        help="a role without progress (environment step, train step, answered request) for so long, that does not wait "
        "for a peer, has hung: it writes the stacks of its threads and exits, to be restarted; far more than a start "
        f"takes, or 0: never (default: the environment's ACTORLEARNER_HANG_SECS, else {HANG_SECS:g})",
    )  # fmt: skip


def add_peer_flags(parser: argparse.ArgumentParser) -> None:
    """Adds where a role finds the others, and how whoever started it watches it."""
    parser.add_argument(
        "--replay_address",
        default="localhost:8008",
        metavar="HOST:PORT[,...]",
        help="of the replay server, or of several, by their task numbers (default: localhost:8008)",
    )
    parser.add_argument(
        "--variables_address",
        metavar="HOST:PORT",
        help="of the variable container (default: the first replay server's)",
    )
    parser.add_argument(
        "--task", type=task, default=0, metavar="N",
        help="which of its kind this process is; auto: the first that is free in --root_dir (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--tls_dir", default=os.environ.get("ACTORLEARNER_TLS_DIR", ""), metavar="DIR",
        help="mutual TLS with the certificates that `actorlearner certs DIR` made "
        "(default: the environment's ACTORLEARNER_TLS_DIR, else none)",
    )  # fmt: skip
    parser.add_argument(
        "--health_file", type=Path, metavar="FILE", help="touched while it makes progress; see actorlearner health"
    )
    parser.add_argument(
        "--final_code_file", type=Path, metavar="FILE",
        help="on an error that a restart does not help, write the exit code there and exit with 0: for supervisors "
        "that restart whatever fails",
    )  # fmt: skip


def add_run_directory_flag(parser: argparse.ArgumentParser) -> None:
    """Adds where a role that needs a run directory has it."""
    parser.add_argument(
        "--root_dir", type=Path, default=Path("runs/current"), help="where this role writes (default: runs/current)"
    )


def add_learner_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what the learner computes on, and what it leaves when training ends."""
    parser.add_argument(
        "--strategy", choices=("default", "mirrored", "tpu"), default="default",
        help="one device, every visible GPU, or a TPU (default: default)",
    )  # fmt: skip
    parser.add_argument("--tpu", metavar="NAME", help="the TPU's name or address, for --strategy=tpu")
    parser.add_argument(
        "--num_logical_cpus", type=int, default=1, metavar="N",
        help="split the CPU into N devices, to try --strategy=mirrored without GPUs (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--num_video_episodes",
        type=non_negative,
        default=3,
        metavar="N",
        help="episodes in each video, 0 for none (default: 3)",
    )


def task(text: str) -> Optional[int]:
    """Returns the number; None for "auto"."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number from 0, or auto") from None


def positive(text: str) -> int:
    """Returns the whole number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def non_negative(text: str) -> int:
    """Returns the whole number, at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative: expected 0 or more")
    return number


def seconds(text: str) -> float:
    """Returns the number, at least 0 and no more than the system can wait."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < threading.TIMEOUT_MAX:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}': expected seconds, from 0")


def load_chosen_experiment(arguments: argparse.Namespace) -> Experiment:
    """Returns the experiment that the flags name; raises as `load_experiment`."""
    from actorlearner.experiment import load_experiment

    seed = choose_seed(arguments.seed, arguments.root_dir, default=0)
    return load_experiment(arguments.experiment, arguments.gin_bindings, seed=seed)


def choose_seed(given: Optional[int], root_dir: Optional[Path], *, default: int) -> int:
    """Returns the seed given; else that of the first start of the run in `root_dir`; else the default."""
    from actorlearner.run.directory import RunDirectory

    if given is not None:
        return given
    own = RunDirectory(root_dir).read_seed() if root_dir else None
    return default if own is None else own
