"""Learner: trains the agent on the replay, publishes its weights and keeps the run's record.

replay --batches--> [learner] --weights--> variable container
                        ^ evaluation results, counts of collected steps
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import gin
import tensorflow as tf
from tf_agents.specs import tensor_spec

from actorlearner.cluster import Cluster
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.evaluations.queue import EvaluationRequests
from actorlearner.experiment import Experiment
from actorlearner.replay.checkpoint_requests import CheckpointRequests
from actorlearner.replay.servers import ReplayServers, refuse_several
from actorlearner.run.directory import RunDirectory
from actorlearner.run.policies import PolicyExport
from actorlearner.run.record import RunRecord
from actorlearner.run.starts import note_start
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.configuration import NonNegativeFloat, NonNegativeInt, PositiveFloat, operative_config
from actorlearner.runtime.devices import has_one_gpu
from actorlearner.runtime.lifecycle import ExitCode, Stop, Stopped
from actorlearner.training.delivery import await_announced, finish
from actorlearner.training.loop import TrainingLoop
from actorlearner.training.observations import Observations
from actorlearner.training.saving import Saving
from actorlearner.training.step import TrainFunction, check_batch
from actorlearner.training.takeover import (
    furthest_step,
    has_ended,
    identity_of,
    refuse_second_learner,
    restore_replay,
    say_it_is_over,
)
from actorlearner.training.timing import PublishInterval
from actorlearner.variable_container import Phase, Publisher, await_container


@gin.configurable(
    "learner",
    module="actorlearner",
    denylist=["experiment", "cluster", "root_dir", "strategy", "versions", "stop", "command"],
)
def run_learner(
    experiment: Experiment,
    cluster: Cluster,
    root_dir: Path,
    strategy: tf.distribute.Strategy,
    versions: dict[str, str],
    stop: Stop,
    *,
    publish_interval: NonNegativeInt = 0,
    publish_interval_secs: NonNegativeFloat = 1.0,
    checkpoint_interval_secs: NonNegativeFloat = 60.0,
    evaluation_retry_secs: PositiveFloat = 900.0,
    evaluation_lease_secs: PositiveFloat = 6.0,
    evaluation_patience_secs: PositiveFloat = 1_800.0,
    jit_compile: Optional[bool] = None,
    command: Optional[Mapping[str, Any]] = None,
) -> ExitCode:
    """Trains until `train.num_iterations`, waits for pending evaluations, and writes the run's summary.

    Args:
      experiment: What to run; read only.
      cluster: Where the replay server and the variable container listen.
      root_dir: The run directory; a run in it is resumed, otherwise a new one starts.
      strategy: The agent's variables live under it; the batch is divided over its replicas.
      versions: Versions of the packages in use, for the summary.
      stop: Set on SIGTERM; checked between compiled calls. A checkpoint is saved before returning.
      publish_interval: Smallest number of train steps between two publishes. With a time limit alone, a faster machine
        would collect with weights that are more train steps old.
      publish_interval_secs: Shortest time between two publishes, in seconds; both limits must have passed.
      checkpoint_interval_secs: Time between two checkpoints, in seconds.
      evaluation_retry_secs: An evaluation without a result is repeated after this time, in seconds.
      evaluation_lease_secs: An evaluation is repeated if no eval actor has sent a heartbeat for it for this time, in
        seconds, and it is not in the queue.
      evaluation_patience_secs: At the end, the longest wait for the next result, in seconds.
      jit_compile: Whether XLA compiles a whole call into one program; None does so on one GPU, where it pays.
      command: Further facts for this start's line in starts.jsonl, such as the given bindings.

    Raises:
      RoleError: The run directory is unfit or occupied, a peer is unreachable past the deadline, the tables belong to
        another experiment, or evaluations do not come back.
    """
    refuse_several(experiment.replay, cluster.replay_addresses)
    experiment.seed_process("learner")
    schedule, patience_secs = experiment.schedule, cluster.peer_patience_secs
    directory = RunDirectory(root_dir)
    directory.hold()
    check_batch(schedule.batch_size, strategy.num_replicas_in_sync)

    # What is trained.
    with strategy.scope():
        policies = experiment.policies()
    agent, train_step = policies.agent, policies.train_step
    directory.check_identity(identity_of(experiment, policies))
    if has_ended(directory, schedule.num_iterations):
        say_it_is_over(cluster, schedule.num_iterations, stop)
        return ExitCode.DONE

    # Who else is there.
    tables = experiment.replay.table_signatures(agent.collect_data_spec)
    servers = ReplayServers(cluster.replay_addresses)
    servers.await_tables(tables, stop=stop, deadline_secs=patience_secs)
    await_container(cluster.variables_address, policies.variables, stop=stop, deadline_secs=patience_secs)
    servers.watch(cluster.variables_address)
    published = refuse_second_learner(
        cluster, directory.past_learners(), furthest_step(directory, schedule.num_iterations), stop
    )

    # What it is trained on, from where the learner before this one came to.
    step_spec = tensor_spec.from_spec(agent.collect_data_spec)
    source = experiment.replay.make_source(servers, step_spec, experiment.sampling(agent), strategy)
    observations = Observations(agent, source)
    fuses = jit_compile if jit_compile is not None else source.can_fuse and has_one_gpu(strategy)
    train = TrainFunction(agent, train_step, source, strategy, jit_compile=fuses)
    checkpoints = Checkpoints(directory.checkpoints, train_step, {"agent": agent})
    counts = checkpoints.restore()
    restore_replay(source, counts, cluster, stop)

    # What becomes of it: weights for actors, evaluations, numbers, files.
    if directory.past_learners():
        experiment.pace.note_restart("a resumed run")
    learner = secrets.randbits(62)
    directory.note_learner(learner)
    publisher = Publisher(
        cluster.variables_address, learner, first_version=counts.get("version", 0), published=published
    )
    ledger = EvaluationLedger(
        EvaluationRequests(cluster.variables_address),
        directory.evaluated,
        retry_secs=evaluation_retry_secs,
        lease_secs=evaluation_lease_secs,
        metrics=directory.metrics,
    )
    record = RunRecord(experiment, cluster, directory, ledger, versions, counts, source.account)
    start = note_start(directory, int(train_step.numpy()), experiment.seed, versions, operative_config(), command or {})
    record.log_configuration(operative_config())
    export = PolicyExport(
        agent, train_step, directory.policies, experiment.environment_action_spec, anew=bool(start["differs"])
    )
    requests = CheckpointRequests(servers, learner)
    saving = Saving(train_step, checkpoints, requests, export, record, source, observations, publisher)
    loop = TrainingLoop(
        experiment,
        policies,
        train,
        source,
        observations,
        publisher,
        ledger,
        record,
        saving,
        publish_interval=PublishInterval(publish_interval, publish_interval_secs),
        checkpoint_interval_secs=checkpoint_interval_secs,
        replay=f"the replay at {cluster.replay_address} (tables {', '.join(map(repr, tables))})",
        patience_secs=patience_secs,
    )
    try:
        directory.forget_end()  # otherwise a launcher takes this learner's death for the end of the run
        loop.run(stop)
        record.note_phase("final evaluation")
        publisher.announce(Phase.EVALUATING)
        finish(experiment, policies, export, ledger, record, stop, evaluation_patience_secs)
        await_announced(publisher, Phase.OVER, stop, patience_secs)
    except Stopped as stopped:
        logging.info("%s at train step %d", stopped, int(train_step.numpy()))
        return stop.exit_code
    finally:
        record.close()
        servers.close()
        requests.close()
        source.close()
    # The publisher runs until this process ends, so that a replay server that restarts meanwhile learns of the end.
    return ExitCode.DONE
