"""Record videos of a run's policy and of a random one."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actorlearner.flags import non_negative
from actorlearner.run.status import has_ended
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, run_to_exit
from actorlearner.runtime.telemetry import set_up_logging

if TYPE_CHECKING:
    from actorlearner.experiment import Experiment
    from actorlearner.tools.recording.episodes import Act, Environment, VideoInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run directory, and the number of episodes."""
    parser.add_argument("root_dir", type=Path, metavar="ROOT_DIR", help="directory of a run")
    parser.add_argument("--num_episodes", type=int, default=3, metavar="N", help="episodes in each video (default: 3)")
    parser.add_argument("--seed", type=non_negative, default=0, help="seed of the episodes (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Records the videos and ends the process with its exit code; never returns."""
    set_up_logging()

    def record(_stop: Stop) -> ExitCode:
        from actorlearner.experiment import load_experiment
        from actorlearner.runtime.devices import hold_to_one_thread
        from actorlearner.runtime.eager_tensors import stop_leak

        config = arguments.root_dir / "operative_config.gin"
        if not config.is_file():
            raise RoleError(f"'{arguments.root_dir}' is not a run directory: {config} is missing.", ExitCode.USAGE)
        stop_leak()
        hold_to_one_thread()
        experiment = load_experiment(str(config), seed=arguments.seed)
        record_videos(experiment, arguments.root_dir, arguments.num_episodes)
        return ExitCode.DONE

    run_to_exit(record)


def record_videos(experiment: Experiment, root_dir: Path, num_episodes: int) -> None:
    """Records both videos of a run of this experiment. Raises as `record_run`."""
    seed = experiment.derive_seed("video")
    logging.info("recording %d episodes of the run's policy and of a random one", num_episodes)
    videos = record_run(
        root_dir,
        lambda: experiment.make_environment(seed),
        experiment.steps_per_second,
        num_episodes=num_episodes,
        seed=seed,
    )
    for info in videos.values():
        logging.info("%s: %s, %.1f s at %g frames/s", info.path, info.title, info.seconds, info.fps)


def record_run(
    root_dir: Path,
    make_environment: Callable[[], Environment],
    steps_per_second: float,
    *,
    num_episodes: int = 3,
    seed: int = 0,
    max_steps: int | None = None,
    names: Sequence[str] = ("trained_policy", "random_policy"),
) -> dict[str, VideoInfo]:
    """Records a run's greedy policy and a random policy, and returns the recorded videos by name.

    Writes `videos/trained_policy.mp4` and `videos/random_policy.mp4` into the run directory. The first one's title has
    the policy's train step. Both environments get the same seed, so both policies start from the same states.

    Records one after the other in this process, because TensorFlow does not survive a fork, and gin's bindings and
    `make_environment` may not survive a spawn. Rendering uses one core; a caller with two cores can start two
    processes, each with one of the `names`.

    Args:
      root_dir: The run directory; the trained policy is its `policies/greedy_policy`: the newest one during training,
        the delivered one afterwards.
      make_environment: Called once per video; this function closes the environment.
      steps_per_second: Control rate of the task.
      num_episodes: Episodes in each video.
      seed: For the environments and the random policy.
      max_steps: As for `record_episodes`.
      names: Which of the two to record.

    Raises:
      ValueError: The run directory has no trained policy that can be loaded; a name is unknown; and as
        `record_episodes`.
      OSError: As `record_episodes`.
    """
    from actorlearner.tools.recording.episodes import record_episodes
    from actorlearner.tools.recording.policies import random_act

    root_dir = Path(root_dir)
    make_act: dict[str, Callable[[Environment], tuple[Act, str]]] = {
        "trained_policy": lambda _: _trained_act(root_dir),
        "random_policy": lambda environment: (random_act(environment, seed=seed), "a random policy"),
    }
    unknown = sorted(set(names) - set(make_act))
    if unknown:
        raise ValueError(f"There is no video named {unknown[0]!r}; names may hold {', '.join(make_act)}.")
    recorded = {}
    for name in names:
        environment = make_environment()
        try:
            with contextlib.suppress(NotImplementedError):  # raised by TF-Agents if the environment takes no seed
                environment.seed(seed)
            act, title = make_act[name](environment)
            recorded[name] = record_episodes(
                environment,
                act,
                root_dir / "videos" / f"{name}.mp4",
                num_episodes=num_episodes,
                steps_per_second=steps_per_second,
                max_steps=max_steps,
                title=title,
            )
        finally:
            environment.close()
    return recorded


def _trained_act(root_dir: Path) -> tuple[Act, str]:
    """Returns an act function for the run's greedy policy, and a description of the policy."""
    from actorlearner.tools.recording.policies import load_saved_policy

    act, train_step = load_saved_policy(root_dir / "policies" / "greedy_policy")
    is_over = has_ended(root_dir / "summary.json")
    if not train_step and not is_over:
        raise ValueError(
            f"No trained policy in {root_dir} yet: it has that of train step 0. A run writes its newest policy into"
            " policies/ with each checkpoint."
        )
    of = "of a run that has ended" if is_over else "of a run that has not ended"
    return act, f"the policy of train step {train_step:,} {of}"


