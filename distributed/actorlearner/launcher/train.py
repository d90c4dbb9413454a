"""Train an experiment on this machine: start, watch and restart every role."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from actorlearner.cluster import check_address
from actorlearner.flags import add_experiment_flags, add_learner_flags, choose_seed
from actorlearner.launcher.options import LocalOptions
from actorlearner.runtime.lifecycle import ExitCode, RoleError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the experiment, the run directory and the number of roles."""
    add_experiment_flags(parser)
    parser.add_argument("--root_dir", type=Path, help="run directory (default: runs/<experiment>-<time>)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over: rename the existing --root_dir (the new name is printed)"
    )
    parser.add_argument("--num_collect_actors", type=int, default=1, metavar="N", help="collect actors (default: 1)")
    parser.add_argument("--num_eval_actors", type=int, default=1, metavar="N", help="eval actors (default: 1)")
    parser.add_argument("--num_replay_servers", type=int, default=1, metavar="N", help="replay servers (default: 1)")
    # the drill's TCP proxy in front of the replay server
    parser.add_argument("--via", default="", help=argparse.SUPPRESS)
    add_learner_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs every role until training ends, and returns the launcher's exit code."""
    from actorlearner.launcher import local

    name = Path(arguments.experiment).stem
    root_dir = arguments.root_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if arguments.fresh:
        from actorlearner.run.directory import RunDirectory

        try:
            aside = RunDirectory(root_dir).move_aside()
        except RoleError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return int(error.exit_code)
        if aside:
            print(f"--fresh: the run that was in {root_dir} is now in {aside}; nothing was deleted", flush=True)
    learner_flags = [
        f"--strategy={arguments.strategy}",
        f"--num_logical_cpus={arguments.num_logical_cpus}",
        f"--num_video_episodes={arguments.num_video_episodes}",
    ]
    if arguments.tpu:
        learner_flags.append(f"--tpu={arguments.tpu}")
    bindings = list(arguments.gin_bindings)
    if not arguments.num_eval_actors:
        bindings.append("train.eval_interval = 0")  # there is no eval actor to evaluate anything
    try:
        if arguments.via:
            check_address("via", arguments.via)
        options = LocalOptions(
            experiment=arguments.experiment,
            root_dir=root_dir,
            num_collect_actors=arguments.num_collect_actors,
            num_eval_actors=arguments.num_eval_actors,
            num_replay_servers=arguments.num_replay_servers,
            seed=choose_seed(arguments.seed, root_dir, default=int.from_bytes(os.urandom(3), "big")),
            gin_bindings=tuple(bindings),
            learner_flags=tuple(learner_flags),
            role_flags=(
                f"--peer_patience_secs={arguments.peer_patience_secs:g}",
                f"--hang_secs={arguments.hang_secs:g}",
            ),
            via=arguments.via,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    return local.run_local(options)
