"""Collect actor: steps its environments and writes their trajectories to the replay.

variable container --weights--> [collect actor] --trajectories--> replay
"""

from __future__ import annotations

import logging
from pathlib import Path

import gin

from actorlearner import variable_container
from actorlearner.cluster import Cluster
from actorlearner.collecting.collector import Collector
from actorlearner.collecting.policy import ActorPolicy
from actorlearner.collecting.progress import Progress
from actorlearner.experiment import Experiment
from actorlearner.replay.servers import ReplayServers, refuse_several
from actorlearner.reports import NewestReport
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.configuration import PositiveFloat
from actorlearner.runtime.lifecycle import ExitCode, Stop, wait_until
from actorlearner.runtime.telemetry import Events
from actorlearner.variable_container import Subscriber


@gin.configurable("collect_actor", module="actorlearner", denylist=["experiment", "cluster", "root_dir", "stop"])
def run_collect_actor(
    experiment: Experiment,
    cluster: Cluster,
    root_dir: Path,
    stop: Stop,
    *,
    refresh_interval_secs: PositiveFloat = 1.0,
    report_interval_secs: PositiveFloat = 2.0,
    events_interval_secs: PositiveFloat = 20.0,
) -> ExitCode:
    """Collects trajectories until training ends or `stop` is set.

    Args:
      experiment: What to run; read only.
      cluster: Where the replay server and the variable container listen.
      root_dir: Where TensorBoard's events go, under collect/.
      stop: Set on SIGTERM; checked between steps.
      refresh_interval_secs: Time between two checks for newer weights, in seconds.
      report_interval_secs: Time between two reports to the learner, in seconds.
      events_interval_secs: Time between two TensorBoard points, in seconds.

    Raises:
      RoleError: A peer is unreachable past the deadline (UNAVAILABLE), the server's tables are those of another
        experiment (DATA), or `root_dir` cannot be written (CANNOT_CREATE).
    """
    refuse_several(experiment.replay, cluster.replay_addresses)
    experiment.pace.check_actor(cluster.task)
    experiment.seed_process("collect-actor", cluster.task)
    events_folder = RunDirectory(root_dir).make_collect_events(cluster.task)
    life = len(list(events_folder.glob("events*")))  # number of earlier processes of this task, by their files
    events = Events(events_folder)
    policies = experiment.policies()
    agent, train_step, variables = policies.agent, policies.train_step, policies.variables
    servers = ReplayServers(cluster.replay_addresses, cluster.task)
    signatures = experiment.replay.table_signatures(agent.collect_data_spec)
    servers.await_tables(signatures, stop=stop, deadline_secs=cluster.peer_patience_secs)
    variable_container.await_container(
        cluster.variables_address, variables, stop=stop, deadline_secs=cluster.peer_patience_secs
    )
    servers.watch(cluster.variables_address)
    weights = Subscriber(cluster.variables_address, variables, refresh_interval_secs=refresh_interval_secs)
    wait_until(  # a restarted actor must learn the phase first, or it would act at random again
        weights.has_looked,
        lambda: f"the variable container at {cluster.variables_address} to report the phase of training",
        stop=stop,
        deadline_secs=cluster.peer_patience_secs,
        setting="--peer_patience_secs",
        every_secs=0.05,
    )
    if life or weights.num_chunks():
        experiment.pace.note_restart("a run with a restarted actor")
    sampling = experiment.sampling(agent)
    collector = Collector(experiment, cluster, servers, tuple(signatures), sampling, life)
    turn = experiment.pace.make_actors_turn(collector.sink, weights, cluster.peer_patience_secs)
    policy = ActorPolicy(
        policies,
        experiment.replay,
        servers,
        sampling,
        weights,
        turn,
        seed=experiment.derive_seed("collect-actor", cluster.task, "random-actions"),
        patience_secs=cluster.peer_patience_secs,
    )
    progress = Progress(cluster, NewestReport(cluster.variables_address), events)

    while not stop.is_set() and policy.refresh(stop):
        collector.step(policy.acting, policy.acted_at)
        collector.await_server(weights, stop)
        collector.await_answer(turn, stop)
        if progress.is_due(report_interval_secs):
            progress.report(collector, int(train_step), events_interval_secs)

    progress.report(collector, int(train_step), events_interval_secs=0.0)
    progress.await_sent(timeout_secs=5.0)
    collector.close()
    weights.close()
    servers.close()
    logging.info("collected %d steps in %d episodes", collector.environment_steps, collector.episodes)
    return stop.exit_code if stop.is_set() else ExitCode.DONE
