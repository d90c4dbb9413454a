"""A role's command line and environment, for every launcher that is written in Python."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = (sys.executable, "-m", "actorlearner")
"""The program to which a subcommand and its arguments are appended."""

REPLAY_SERVER = "replay-server"
LEARNER = "learner"
EVAL_ACTOR = "eval-actor"
COLLECT_ACTOR = "collect-actor"
ACTORS = (EVAL_ACTOR, COLLECT_ACTOR)


def role_command(
    kind: str,
    experiment: str,
    *,
    replay_addresses: Sequence[str],
    root_dir: Path,
    task: int = 0,
    seed: int | None = None,
    gin_bindings: Sequence[str] = (),
    flags: Sequence[str] = (),
    program: Sequence[str] = PROGRAM,
) -> list[str]:
    """Returns the command line of one role.

    Args:
      kind: `REPLAY_SERVER`, `LEARNER`, `EVAL_ACTOR` or `COLLECT_ACTOR`.
      experiment: A shipped experiment or a gin file.
      replay_addresses: "HOST:PORT" of each replay server, by its task number; the first is also the variable container.
      root_dir: The run directory.
      task: The role's task number.
      seed: The role's seeds derive from it; None leaves it to the role.
      gin_bindings: Applied after the gin file.
      flags: Further flags.
      program: The program to which all this is appended.
    """
    own = (f"--replay_address={','.join(replay_addresses)}", f"--variables_address={replay_addresses[0]}")
    return [
        *(*program, kind, experiment, *own, f"--task={task}"),
        *run_flags(root_dir, seed, gin_bindings),
        *flags,
    ]


def train_command(
    experiment: str,
    *,
    root_dir: Path,
    seed: int,
    gin_bindings: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> list[str]:
    """Returns the command line of a whole run on this machine; the arguments are those of `role_command`."""
    return [*PROGRAM, "train", experiment, *run_flags(root_dir, seed, gin_bindings), *flags]


def run_flags(root_dir: Path, seed: int | None, gin_bindings: Sequence[str]) -> list[str]:
    """Returns the flags that all processes of one run share."""
    seeds = [] if seed is None else [f"--seed={seed}"]
    return [f"--root_dir={root_dir}", *seeds, *(f"--gin_bindings={binding}" for binding in gin_bindings)]


def role_environment(kind: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns `environ` with a role's settings: headless, unbuffered, no TLS, and GPUs only for the learner."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **environ, "SDL_VIDEODRIVER": "dummy", "PYTHONUNBUFFERED": "1"}
    environment.pop("ACTORLEARNER_TLS_DIR", None)
    if kind != LEARNER:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    return environment
