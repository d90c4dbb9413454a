"""The flags that several subcommands share, and the types of their values."""

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
    """Adds the flags of the experiment and of its deadlines."""
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a shipped experiment (sac_minitaur, dqn_cartpole) or a gin file"
    )
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="BINDING",
        help="overrides the gin file, e.g. 'train.num_iterations = 100'; may be repeated, or hold several (with ;)",
    )
    parser.add_argument(
        "--seed",
        type=non_negative,
        default=None,
        help="every role's seeds derive from it (default: that of the run's first start in --root_dir; for a new run "
        "0, for `train` a random one)",
    )
    parser.add_argument(
        "--peer_patience_secs", type=float, default=300.0, metavar="SECS",
        help="how long to wait for an unreachable peer (default: 300)",
    )  # fmt: skip
    parser.add_argument(
        "--hang_secs", type=seconds, default=os.environ.get("ACTORLEARNER_HANG_SECS") or HANG_SECS, metavar="SECS",
        help="a role without progress (environment step, train step, answered request) for so long, that does not wait "
        "for a peer, has hung: it writes the stacks of its threads and exits, to be restarted; far more than a start "
        f"takes, or 0: never (default: the environment's ACTORLEARNER_HANG_SECS, else {HANG_SECS:g})",
    )  # fmt: skip


def add_peer_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for a role's peers, and for its supervisor."""
    parser.add_argument(
        "--replay_address",
        default="localhost:8008",
        metavar="HOST:PORT[,...]",
        help="address of the replay server, or of several in order of their task numbers (default: localhost:8008)",
    )
    parser.add_argument(
        "--variables_address",
        metavar="HOST:PORT",
        help="address of the variable container (default: the first replay server)",
    )
    parser.add_argument(
        "--task", type=task, default=0, metavar="N",
        help="number of this process among its kind; auto: the first free one in --root_dir (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--tls_dir", default=os.environ.get("ACTORLEARNER_TLS_DIR", ""), metavar="DIR",
        help="mutual TLS with the certificates from `actorlearner certs DIR` "
        "(default: the environment variable ACTORLEARNER_TLS_DIR, else no TLS)",
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
    """Adds the flag for the run directory."""
    parser.add_argument(
        "--root_dir", type=Path, default=Path("runs/current"), help="run directory of this role (default: runs/current)"
    )


def add_learner_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the learner's flags: its devices, and its videos at the end."""
    parser.add_argument(
        "--strategy", choices=("default", "mirrored", "tpu"), default="default",
        help="default: one device; mirrored: every visible GPU; tpu: a TPU (default: default)",
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
        raise argparse.ArgumentTypeError(f"'{text}': expected 0 or more, or auto") from None


def positive(text: str) -> int:
    """Returns a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


def non_negative(text: str) -> int:
    """Returns a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: expected 0 or more")
    return number


def seconds(text: str) -> float:
    """Returns a number of seconds, from 0 to the longest that the system can wait."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < threading.TIMEOUT_MAX:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}': expected seconds, 0 or more")


def load_chosen_experiment(arguments: argparse.Namespace) -> Experiment:
    """Returns the experiment of the flags; raises as `load_experiment`."""
    from actorlearner.experiment import load_experiment

    seed = choose_seed(arguments.seed, arguments.root_dir, default=0)
    return load_experiment(arguments.experiment, arguments.gin_bindings, seed=seed)


def choose_seed(given: Optional[int], root_dir: Optional[Path], *, default: int) -> int:
    """Returns the given seed, else the one of the first start of the run in `root_dir`, else the default."""
    from actorlearner.run.directory import RunDirectory

    if given is not None:
        return given
    own = RunDirectory(root_dir).read_seed() if root_dir else None
    return default if own is None else own
