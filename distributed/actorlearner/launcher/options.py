"""The settings of one run on this machine, and each role's command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from actorlearner.launcher.command import LEARNER, PROGRAM, REPLAY_SERVER, role_command
from actorlearner.launcher.restarts import Timing


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """The settings of one local run.

    Attributes:
      experiment: Name of a shipped experiment or path of a gin file; the roles look it up.
      root_dir: The run directory; made if missing, resumed if it holds this run's checkpoints.
      num_collect_actors: At least 1.
      num_eval_actors: At least 0.
      num_replay_servers: At least 1; the first is also the variable container.
      seed: Every role's seeds derive from it; None leaves it to the roles.
      gin_bindings: Passed to every role, in this order.
      learner_flags: Further flags of the learner only, such as `--strategy=mirrored`.
      role_flags: Further flags of every role.
      via: "HOST:PORT" of a proxy in front of the one replay server, through which the other roles reach it; "" for
        none.
      command: The command to which a role's arguments are appended.
      timing: The launcher's times.
    """

    experiment: str
    root_dir: Path
    num_collect_actors: int = 1
    num_eval_actors: int = 1
    num_replay_servers: int = 1
    seed: int | None = None
    gin_bindings: tuple[str, ...] = ()
    learner_flags: tuple[str, ...] = ()
    role_flags: tuple[str, ...] = ()
    via: str = ""
    command: tuple[str, ...] = PROGRAM
    timing: Timing = Timing()

    def __post_init__(self) -> None:
        if self.num_collect_actors < 1:
            raise ValueError(f"num_collect_actors is {self.num_collect_actors}; training needs at least 1")
        if self.num_eval_actors < 0:
            raise ValueError(f"num_eval_actors is {self.num_eval_actors}; it must be 0 or more")
        if self.num_replay_servers < 1:
            raise ValueError(f"num_replay_servers is {self.num_replay_servers}; training needs at least 1")
        if self.via and self.num_replay_servers > 1:
            raise ValueError(
                f"via is {self.via}, a proxy in front of one replay server, but num_replay_servers is "
                f"{self.num_replay_servers}; give one of the two"
            )


def make_command(options: LocalOptions, kind: str, task: int, ports: Sequence[int]) -> list[str]:
    """Returns the command line of one role of a local run.

    Each replay server listens on one of `ports`; the other roles connect there, or to `options.via`.
    """
    flags = [*options.role_flags]
    if kind == REPLAY_SERVER:
        flags += [f"--port={ports[task]}", "--local_only"]
    if kind == LEARNER:
        flags += options.learner_flags
    goes_by_proxy = options.via and kind != REPLAY_SERVER
    return role_command(
        kind,
        options.experiment,
        replay_addresses=[options.via] if goes_by_proxy else [f"127.0.0.1:{port}" for port in ports],
        root_dir=options.root_dir,
        task=task,
        seed=options.seed,
        gin_bindings=options.gin_bindings,
        flags=flags,
        program=options.command,
    )
