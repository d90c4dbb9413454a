"""WHAT: one frozen object, bound by gin, from which every role derives what it needs; roles exchange nothing to start.

experiment = environment + agent + replay + schedule
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import gin
import numpy as np
import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.environments import py_environment
from tf_agents.train.utils import spec_utils, train_utils

from actorlearner.agents.base import AgentFactory, check_action_bounds
from actorlearner.agents.policies import Policies
from actorlearner.environments.actions import correct_starts, from_zero
from actorlearner.environments.base import EnvironmentFactory, PyLane
from actorlearner.environments.batch import EnvironmentBatch
from actorlearner.replay.base import Replay, Sampling
from actorlearner.replay.pace import Pace
from actorlearner.runtime.configuration import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    parse_strictly,
    split_bindings,
)
from actorlearner.runtime.lifecycle import ExitCode, RoleError


@gin.configurable("train", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, how often and how much; names are those of the TF-Agents tutorials.

    Attributes:
      num_iterations: Train steps until training ends.
      initial_collect_steps: Items the replay must hold before training; until then a random policy acts.
      collect_steps_per_iteration: Environment steps per train step; with `batch_size` it gives samples per insert.
        Inserts are windows. An episode of N steps has N of them; with n-step returns and an algorithm whose windows may
        not end early (dqn), N + 1 - n.
      batch_size: Windows in one train step, over all replicas together.
      log_interval: Train steps between two log lines, and between two points in TensorBoard.
      num_eval_episodes: Episodes of one evaluation.
      num_final_eval_episodes: Episodes of the delivered policy's evaluation at the end; None takes `num_eval_episodes`.
      eval_interval: Train steps between two evaluations; 0 evaluates nothing.
      policy_save_interval: Train steps between two numbered policy checkpoints.
      random_action_repeat: Environment steps for which each random action of the warm-up is held: a held action moves a
        robot whose motors would only shake if it changed at every step.
      num_environments: Environments that one collect actor steps as a batch.
      num_updates_per_call: Train steps in one call of the compiled loop; signals are handled between calls.
      lock_step: One collect actor and the learner take turns: a chunk of steps, the train steps it allows, the next
        chunk with the new weights. With TensorFlow's deterministic ops, two new runs of one seed have equal weights,
        bit for bit. For tests and comparisons: it is slow, because one side always waits.
    """

    num_iterations: PositiveInt
    initial_collect_steps: NonNegativeInt = 1_000
    collect_steps_per_iteration: PositiveFloat = 1.0
    batch_size: PositiveInt = 64
    log_interval: PositiveInt = 1_000
    num_eval_episodes: PositiveInt = 10
    num_final_eval_episodes: Optional[PositiveInt] = None
    eval_interval: NonNegativeInt = 1_000
    policy_save_interval: PositiveInt = 5_000
    random_action_repeat: PositiveInt = 1
    num_environments: PositiveInt = 1
    num_updates_per_call: PositiveInt = 50
    lock_step: bool = False

    @property
    def samples_per_insert(self) -> float:
        return self.batch_size / self.collect_steps_per_iteration


@gin.configurable("experiment", module="actorlearner", denylist=["name", "seed", "schedule"])
@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to run: read only, and the same in every role.

    Attributes:
      name: The gin file's name without `.gin`.
      seed: Every role's seeds derive from it.
      schedule: How long and how often.
      environment, agent, replay: Bound in gin, e.g. `experiment.agent = @sac()`.
    """

    name: str
    seed: int
    schedule: Schedule
    environment: EnvironmentFactory
    agent: AgentFactory
    replay: Replay

    def __post_init__(self) -> None:
        self.replay.check(initial_collect_steps=self.schedule.initial_collect_steps)
        self.replay.pace(self.schedule.lock_step)  # raises if the replay cannot do that

    @property
    def pace(self) -> Pace:
        """The pace of collect actors and learner."""
        return self.replay.pace(self.schedule.lock_step)

    def sampling(self, agent: tf_agent.TFAgent) -> Sampling:
        """Returns the schedule's sampling settings for the replay, with the windows that `agent` trains on.

        Raises:
          RoleError: Neither agent nor replay defines the length of a window (USAGE).
        """
        try:
            window = self.replay.window(agent)
        except ValueError as error:
            raise RoleError(str(error), ExitCode.USAGE) from error
        return Sampling(
            num_steps=window.num_steps,
            windows_may_end_early=window.may_end_early,
            batch_size=self.schedule.batch_size,
            num_updates_per_call=self.schedule.num_updates_per_call,
            num_environments=self.schedule.num_environments,
            initial_collect_steps=self.replay.warm_up_steps(self.schedule.initial_collect_steps),
            samples_per_insert=self.schedule.samples_per_insert,
            pace=self.pace,
        )

    def derive_seed(self, *path: Any) -> int:
        """Returns a seed below 2**31 for a path such as `("collect-actor", 3)`; always the same one."""
        return int(np.random.SeedSequence([self.seed, zlib.crc32(repr(path).encode())]).generate_state(1)[0]) % 2**31

    def seed_process(self, *path: Any) -> None:
        """Seeds Python's, numpy's and TensorFlow's global generators; some environments draw from them."""
        seed = self.derive_seed(*path)
        random.seed(seed)
        np.random.seed(seed)
        tf.random.set_seed(seed)
        if self.pace.is_repeatable:
            tf.config.experimental.enable_op_determinism()

    @functools.cached_property
    def _specs(self) -> tuple[Any, Any, float]:
        environment = self.make_environment(self.derive_seed("specs"))
        _, action_spec, time_step_spec = spec_utils.get_tensor_specs(environment)
        steps_per_second = self.environment.real_steps_per_second(environment)
        try:
            environment.close()
        except Exception as error:  # its specs have been read, so an error on closing does not matter
            logging.warning("the environment did not close: %s: %s", type(error).__name__, error)
        return time_step_spec, action_spec, steps_per_second

    @property
    def time_step_spec(self) -> Any:
        return self._specs[0]

    @property
    def action_spec(self) -> Any:
        """Spec of the agent's actions; discrete ones count from 0."""
        return from_zero(self._specs[1])

    @property
    def environment_action_spec(self) -> Any:
        """Spec of the environment's actions; discrete ones start where its space does."""
        return self._specs[1]

    @property
    def steps_per_second(self) -> float:
        """Environment steps in one second of the task's own time."""
        return self._specs[2]

    def make_environment(self, seed: int) -> py_environment.PyEnvironment:
        """Returns a new environment.

        Raises:
          RoleError: The environment is unknown (USAGE).
        """
        try:
            environment = self.environment.make_environment(seed)
        except ValueError as error:
            raise RoleError(str(error), ExitCode.USAGE) from error
        correct_starts(environment)
        return environment

    def make_environments(self, num_environments: int, *seed_path: Any) -> EnvironmentBatch:
        """Returns a batch of environments whose seeds derive from `seed_path`."""
        seeds = (self.derive_seed(*seed_path, number) for number in itertools.count())
        make_lane = getattr(self.environment, "make_lane", PyLane)
        return EnvironmentBatch(self.make_environment, num_environments, seeds, make_lane)

    def make_agent(self) -> tuple[tf_agent.TFAgent, tf.Variable]:
        """Returns the agent and its train step, initialised; call it under the learner's strategy scope.

        Raises:
          RoleError: The algorithm cannot act in this environment (USAGE).
        """
        train_step = train_utils.create_train_step()
        try:
            check_action_bounds(self.action_spec)
            agent = self.agent.make_agent(self.time_step_spec, self.action_spec, train_step)
        except ValueError as error:
            raise RoleError(str(error), ExitCode.USAGE) from error
        return agent, train_step

    def policies(self) -> Policies:
        """Returns the policies of a new agent. See `make_agent`."""
        return Policies(*self.make_agent(), num_random_repeats=self.schedule.random_action_repeat)


def shipped_experiments_folder() -> Path:
    """Returns the folder of the shipped gin files: inside a wheel, or in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parents[1] / "gin"


def find_experiment(name_or_path: str) -> Path:
    """Returns the gin file of an experiment, given its name or a path to a file.

    Raises:
      RoleError: There is none (USAGE); the message lists the shipped ones.
    """
    shipped = shipped_experiments_folder()
    for path in (Path(name_or_path), shipped / f"{name_or_path}.gin"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in shipped.glob("*.gin") if path.stem != "base")
    raise RoleError(
        f"there is no experiment '{name_or_path}': it is neither a gin file nor one of {', '.join(names)} "
        f"in {shipped}.",
        ExitCode.USAGE,
    )


def load_experiment(name_or_path: str, gin_bindings: Sequence[str] = (), seed: int = 0) -> Experiment:
    """Returns the experiment of a gin file with `gin_bindings` applied, checked.

    Args:
      name_or_path: A shipped experiment's name, or a path to a gin file.
      gin_bindings: Lines such as "train.num_iterations = 100"; each may hold several, separated by ; or new lines.
      seed: Every role's seeds derive from it.

    Raises:
      RoleError: The file or a binding is wrong (USAGE).
    """
    path = find_experiment(name_or_path)
    lines = [line for text in gin_bindings for line in split_bindings(text)]
    parse_strictly(path, lines, [shipped_experiments_folder()])
    try:
        # gin binds the other arguments.
        return Experiment(name=path.stem, seed=seed, schedule=Schedule())  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        # gin appends its own call path.
        reason = str(error).split("\n  In call to configurable")[0]
        raise RoleError(f"{path}: {reason}", ExitCode.USAGE) from error
