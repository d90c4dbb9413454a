"""Eval actor: evaluates the greedy policy of each snapshot that is due and reports the returns.

variable container --due snapshots--> [eval actor] --results--> learner
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import gin
import numpy as np
from tf_agents.trajectories import StepType

from actorlearner import variable_container
from actorlearner.cluster import Cluster
from actorlearner.environments.batch import EnvironmentBatch
from actorlearner.environments.checks import UnfitData
from actorlearner.evaluations.queue import (
    EVALUATIONS_TABLE,
    EvaluationHeartbeat,
    EvaluationProgress,
    EvaluationRequest,
    EvaluationResult,
    Purpose,
    take_evaluation,
)
from actorlearner.experiment import Experiment
from actorlearner.runtime.configuration import PositiveFloat, PositiveInt
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, RoleError, Stop, Stopped, wait_until
from actorlearner.runtime.messages import Unreachable
from actorlearner.runtime.rows import Reporter
from actorlearner.variable_container import Belief, Phase


@gin.configurable("eval_actor", module="actorlearner", denylist=["experiment", "cluster", "stop"])
def run_eval_actor(
    experiment: Experiment,
    cluster: Cluster,
    stop: Stop,
    *,
    max_environments: PositiveInt = 20,
    poll_interval_secs: PositiveFloat = 0.5,
) -> ExitCode:
    """Evaluates until training is over or `stop` is set.

    Args:
      experiment: What to run; read only.
      cluster: Where the variable container listens.
      stop: Set on SIGTERM; checked between steps.
      max_environments: Largest number of episodes run side by side, with one policy call for all.
      poll_interval_secs: Time between two checks for a due snapshot, in seconds.

    Raises:
      RoleError: The container is unreachable past the deadline (UNAVAILABLE) or belongs to another experiment, or an
        environment returned what its spec does not allow (DATA).
    """
    experiment.seed_process("eval-actor", cluster.task)
    policies = experiment.policies()
    variables = policies.variables
    variable_container.await_container(
        cluster.variables_address, variables, stop=stop, deadline_secs=cluster.peer_patience_secs
    )
    make_acting = functools.cache(policies.make_greedy)  # compiled once per batch size
    make_acting(min(_num_episodes(experiment, Purpose.PERIODIC), max_environments))
    reporter = Reporter(cluster.variables_address)
    belief = Belief()
    answered_at = said_at = time.monotonic()
    logging.info("ready to evaluate")

    while not stop.is_set():
        beat()
        try:
            request = take_evaluation(cluster.variables_address, variables)
            over = request is None and _is_over(cluster, belief)
            answered_at = said_at = time.monotonic()
        except Unreachable as error:
            now = time.monotonic()
            if now - said_at > SAY_EVERY_SECS:
                said_at = now
                logging.info(
                    "waiting for the variable container at %s to send an evaluation, in its table '%s' (%.0f s): %s",
                    cluster.variables_address,
                    EVALUATIONS_TABLE,
                    now - answered_at,
                    error,
                )
            if now - answered_at > cluster.peer_patience_secs:
                raise RoleError(
                    f"{error}, for longer than --peer_patience_secs = {cluster.peer_patience_secs:g}. "
                    "Start the replay server, or correct --variables_address.",
                    ExitCode.UNAVAILABLE,
                ) from error
            request, over = None, False
        if over:
            return ExitCode.DONE
        if request is None:
            stop.wait(poll_interval_secs)
            continue
        progress = EvaluationProgress(request.snapshot.train_step, int(request.purpose), cluster.task)
        # otherwise the learner takes this process for dead
        with EvaluationHeartbeat(cluster.variables_address, progress):
            request.snapshot.assign_to(variables)
            num_episodes = _num_episodes(experiment, request.purpose)
            num_environments = min(num_episodes, max_environments)
            environments = experiment.make_environments(
                num_environments, "eval-actor", request.snapshot.train_step, int(request.purpose)
            )
            try:
                result = evaluate(
                    make_acting(num_environments), environments, num_episodes, request, cluster.task, stop
                )
            except UnfitData as error:
                raise RoleError(
                    f"evaluating train step {request.snapshot.train_step:,}, {error}: the return of such an episode is "
                    "meaningless. Fix the environment, then start again with the same --root_dir.",
                    ExitCode.DATA,
                ) from error
            environments.close()
            del environments  # free them before the next ones are made: twenty Minitaurs take 0.8 GB
            _report(reporter, result, cluster, stop)
    return stop.exit_code


def _num_episodes(experiment: Experiment, purpose: Purpose) -> int:
    schedule = experiment.schedule
    if purpose is Purpose.DELIVERED and schedule.num_final_eval_episodes:
        return schedule.num_final_eval_episodes
    return schedule.num_eval_episodes


def evaluate(
    acting: Any, environments: EnvironmentBatch, num_episodes: int, request: EvaluationRequest, task: int, stop: Stop
) -> EvaluationResult:
    """Returns the result of `num_episodes` whole episodes.

    The number of episodes per environment is fixed beforehand: taking the first to finish would favour short episodes.
    An episode whose environment crashes is repeated.

    Raises:
      Stopped: `stop` was set before the end.
      UnfitData: An environment returned a NaN, or what its spec does not allow.
    """
    start = time.monotonic()
    num_environments = len(environments)
    episodes_left = [len(range(index, num_episodes, num_environments)) for index in range(num_environments)]
    time_step = environments.reset()
    returns = np.zeros(num_environments)
    lengths = np.zeros(num_environments, int)
    all_returns: list[float] = []
    all_lengths: list[int] = []
    num_truncated = 0
    playing = list(range(num_environments))
    while playing:
        if stop.is_set():
            raise Stopped(f"stopped while evaluating train step {request.snapshot.train_step}")
        time_step = environments.step(acting.act(time_step).action, playing)
        returns += time_step.reward
        lengths += 1
        has_begun = time_step.step_type == StepType.FIRST  # a new episode, after a last step or a crash
        returns[has_begun], lengths[has_begun] = 0.0, 0
        for index in [index for index in playing if time_step.step_type[index] == StepType.LAST]:
            all_returns.append(float(returns[index]))
            all_lengths.append(int(lengths[index]))
            num_truncated += bool(time_step.discount[index] > 0.0)
            episodes_left[index] -= 1
            if not episodes_left[index]:
                playing.remove(index)
    return EvaluationResult(
        train_step=request.snapshot.train_step,
        version=request.snapshot.version,
        purpose=int(request.purpose),
        average_return=float(np.mean(all_returns)),
        return_std=float(np.std(all_returns, ddof=1)) if len(all_returns) > 1 else 0.0,
        average_episode_length=float(np.mean(all_lengths)),
        min_episode_length=min(all_lengths),
        num_truncated=num_truncated,
        num_episodes=len(all_returns),
        wall_secs=time.monotonic() - start,
        task=task,
    )


def _is_over(cluster: Cluster, belief: Belief) -> bool:
    version = variable_container.read_version(cluster.variables_address)
    return version is not None and belief.holds(version) and version.phase == Phase.OVER


def _report(reporter: Reporter, result: EvaluationResult, cluster: Cluster, stop: Stop) -> None:
    """Blocks until the learner's queue has the result."""
    wait_until(
        lambda: reporter.send(result),
        lambda: f"the variable container at {cluster.variables_address} to accept an evaluation's result",
        stop=stop,
        deadline_secs=cluster.peer_patience_secs,
        setting="--peer_patience_secs",
    )
    logging.info(
        "train step %d: average return %.2f, average length %.1f, shortest %d, %d episodes, %.1f s",
        result.train_step,
        result.average_return,
        result.average_episode_length,
        result.min_episode_length,
        result.num_episodes,
        result.wall_secs,
    )
