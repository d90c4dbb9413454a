"""Learner: trains the agent on what the replay holds, publishes its weights and keeps the run's record.

replay --batches--> [learner] --weights--> variable container
                        ^ evaluation results, counts of collected steps
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import gin
import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.specs import tensor_spec

from actorlearner import variable_container
from actorlearner.cluster import Cluster
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.evaluations.queue import EvaluationRequests, Purpose
from actorlearner.experiment import Experiment
from actorlearner.replay.base import BatchSource, MeetsStrangers
from actorlearner.replay.checkpoint_requests import CheckpointRequests
from actorlearner.replay.servers import ReplayServers, refuse_several
from actorlearner.run.directory import RunDirectory
from actorlearner.run.missing_policies import make_up_missing
from actorlearner.run.policies import PolicyExport
from actorlearner.run.record import RunRecord
from actorlearner.run.starts import note_start
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.configuration import NonNegativeFloat, NonNegativeInt, PositiveFloat, operative_config
from actorlearner.runtime.devices import has_one_gpu
from actorlearner.runtime.durable_files import InBackground
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, RoleError, Stop, Stopped, find_reason, wait_until
from actorlearner.runtime.messages import Unreachable
from actorlearner.variable_container import Phase, Publisher, Snapshot, Version

MAX_PAST_VERSION = 10**12
"""A learner that died cannot have published so often: ten times a second it would have taken 3,000 years."""

UNKNOWN_STEPS, UNKNOWN_SECS = 10_000, 30.0
"""So much further than its status says a learner that was killed may have been; a disk may be slow."""

NUM_HEARTBEATS = 3
"""So many heartbeats in a row make another learner: a row or two that say so may be any client's."""


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
    """Trains until `train.num_iterations`, waits for the evaluations due, and writes the run's summary.

    Args:
      experiment: What to run; read only.
      cluster: Where the replay server and the variable container listen.
      root_dir: The run directory; holds checkpoints to go on from, or becomes a new run.
      strategy: The agent's variables live under it; the batch is divided over its replicas.
      versions: Of the packages at work, for the summary.
      stop: Set on SIGTERM; looked at between calls of the compiled loop. A checkpoint is saved before returning.
      publish_interval: Fewest train steps between two publishes; the call that makes them is ended first. By time alone
        a faster machine would collect with weights that are more train steps old.
      publish_interval_secs: Least time between two publishes, in seconds; both must have passed.
      checkpoint_interval_secs: Time between two checkpoints, in seconds.
      evaluation_retry_secs: A snapshot without a result is evaluated again after this time, in seconds.
      evaluation_lease_secs: A snapshot is evaluated again when no eval actor has been at work on it for this time, in
        seconds, and none is to take it.
      evaluation_patience_secs: At the end, the longest wait for the next evaluation's result, in seconds.
      jit_compile: Whether XLA makes one program of a whole call's train steps; None does it where it pays, on one GPU.
      command: What else the run's starts.jsonl is to say of this start, such as the bindings given.

    Raises:
      RoleError: The run directory is unfit or occupied, a peer is unreachable past the deadline, the tables are another
        experiment's, or evaluations do not come back.
    """
    refuse_several(experiment.replay, cluster.replay_addresses)
    experiment.seed_process("learner")
    directory = RunDirectory(root_dir)
    directory.hold()
    schedule = experiment.schedule
    check_batch(schedule.batch_size, strategy.num_replicas_in_sync)
    with strategy.scope():
        agent, train_step = experiment.make_agent()
    variables = agent.collect_policy.variables()
    directory.check_identity(_identity(experiment, agent))
    if _has_ended(directory, schedule.num_iterations):
        _say_it_is_over(cluster, schedule.num_iterations, stop)
        return ExitCode.DONE

    patience_secs = cluster.peer_patience_secs
    signatures = experiment.replay.table_signatures(agent.collect_data_spec)
    servers = ReplayServers(cluster.replay_addresses)
    servers.await_tables(signatures, stop=stop, deadline_secs=patience_secs)
    variable_container.await_container(cluster.variables_address, variables, stop=stop, deadline_secs=patience_secs)
    servers.watch(cluster.variables_address)
    published = _refuse_second_learner(
        cluster, directory.past_learners(), _furthest_step(directory, schedule.num_iterations), stop
    )

    source = experiment.replay.make_source(
        servers,
        tensor_spec.from_spec(agent.collect_data_spec),
        experiment.sampling(agent),
        strategy,
    )
    if getattr(agent, "observation_statistics", None) is not None:
        source.count_observations()
    fuses = jit_compile if jit_compile is not None else source.can_fuse and has_one_gpu(strategy)
    train = make_train_function(agent, train_step, source, strategy, jit_compile=fuses)
    checkpoints = Checkpoints(directory.checkpoints, train_step, {"agent": agent})
    counts = checkpoints.restore()
    if schedule.lock_step and directory.past_learners():
        logging.warning("train.lock_step = True, but a resumed run cannot be repeated bit for bit; --fresh begins anew")
    _restore_replay(source, counts, cluster, stop)
    learner = secrets.randbits(62)
    directory.note_learner(learner)
    publisher = Publisher(
        cluster.variables_address, learner, first_version=counts.get("version", 0), published=published
    )
    replay_checkpoints = CheckpointRequests(servers, learner)
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
    loop = TrainingLoop(
        experiment,
        cluster,
        agent,
        train_step,
        source,
        train,
        publisher,
        ledger,
        record,
        checkpoints,
        replay_checkpoints,
        export,
    )
    try:
        publish = PublishInterval(publish_interval, publish_interval_secs)
        directory.forget_end()  # else a launcher thinks at the next death of this one that nobody is needed any more
        loop.run(stop, publish, checkpoint_interval_secs=checkpoint_interval_secs)
        record.note_phase("final evaluation")
        publisher.announce(Phase.EVALUATING)
        finish(experiment, agent, train_step, export, ledger, record, stop, evaluation_patience_secs)
        wait_until(
            lambda: publisher.announce(Phase.OVER),
            lambda: f"the variable container at {cluster.variables_address} to take the news that training is over",
            stop=stop,
            deadline_secs=patience_secs,
            setting="--peer_patience_secs",
        )
    except Stopped as stopped:
        logging.info("%s at train step %d", stopped, int(train_step.numpy()))
        return stop.exit_code
    finally:
        record.close()
        servers.close()
        replay_checkpoints.close()
        source.close()
    # The publisher goes on until this process ends: a replay server that is started again by then must hear of the end.
    return ExitCode.DONE


def check_batch(batch_size: int, num_replicas: int) -> None:
    """Says how the global batch is divided.

    Raises:
      RoleError: It cannot be divided evenly (USAGE).
    """
    if batch_size % num_replicas:
        raise RoleError(
            f"train.batch_size = {batch_size} is the global batch and cannot be divided over {num_replicas} replicas. "
            f"Give a multiple of {num_replicas}.",
            ExitCode.USAGE,
        )
    logging.info("batch size %d: %d replica(s) of %d", batch_size, num_replicas, batch_size // num_replicas)


def _identity(experiment: Experiment, agent: tf_agent.TFAgent) -> dict[str, Any]:
    """What must not change between two starts on one run directory."""
    return {
        "agent": type(agent).__name__,
        "environment": experiment.environment.env_name,
        "observation": str(experiment.time_step_spec.observation),
        "action": str(experiment.action_spec),
        "variables": [f"{v.name.split(':')[0]} {v.shape.as_list()}" for v in agent.collect_policy.variables()],
    }


def _has_ended(directory: RunDirectory, num_iterations: int) -> bool:
    """Returns whether a learner before this one did all there is to do but, maybe, the curve and the videos."""
    summary = directory.read_json(directory.summary)
    return bool(summary and summary.get("has_ended") and summary["train_steps"] == num_iterations)


def _say_it_is_over(cluster: Cluster, num_iterations: int, stop: Stop, patience_secs: float = 60.0) -> None:
    """Returns when whoever listens has been told.

    All roles may just have been started again, and the replay server be on its way; or nobody is left, as the others
    heard it from the learner before this one. So it is looked for for at most `patience_secs` seconds.

    Raises:
      Stopped: `stop` was set.
    """
    logging.info("this run has ended at train step %d", num_iterations)

    def announce() -> bool:
        try:
            variable_container.announce_end(cluster.variables_address, num_iterations, secrets.randbits(62))
        except Unreachable:
            return False
        return True

    try:
        wait_until(
            announce,
            lambda: f"the variable container at {cluster.variables_address} to take the news that training is over",
            stop=stop,
            deadline_secs=min(patience_secs, cluster.peer_patience_secs),
            setting="--peer_patience_secs",
        )
    except RoleError:
        logging.info("nobody answers at %s: nobody is left to be told", cluster.variables_address)


def _restore_replay(source: BatchSource, counts: dict[str, Any], cluster: Cluster, stop: Stop) -> None:
    """Returns once the source has what the replay server holds; its server may be on its way back.

    Raises:
      RoleError: It was out of reach for longer than the deadline (UNAVAILABLE).
      Stopped: `stop` was set.
    """

    def go_on() -> None:
        beat()
        if stop.is_set():
            raise Stopped(f"stopped while reading what the replay server at {cluster.replay_address} holds")

    def restore() -> bool:
        try:
            source.restore(counts, go_on)
        except (Unreachable, tf.errors.OpError) as error:
            logging.warning("the replay did not come back yet: %s", error)
            return False
        return True

    wait_until(
        restore,
        lambda: f"the replay server at {cluster.replay_address} to hand out what it holds",
        stop=stop,
        deadline_secs=cluster.peer_patience_secs,
        setting="--peer_patience_secs",
    )


def _furthest_step(directory: RunDirectory, num_iterations: int) -> int:
    """Returns a train step that the learner before this one cannot have passed; its status was a second old at most."""
    status = directory.read_json(directory.status) or {}
    since = max(UNKNOWN_STEPS, int(UNKNOWN_SECS * (status.get("train_steps_per_sec") or 0.0)))
    return min(num_iterations, status["train_step"] + since) if "train_step" in status else num_iterations


def _refuse_second_learner(
    cluster: Cluster, past_learners: Sequence[int], furthest_step: int, stop: Stop, watch_secs: float = 6.0
) -> Optional[Version]:
    """Returns once no other learner's heartbeat goes on; watches for at most `watch_secs` if one ever did.

    Those in `past_learners` held this run directory before: they are dead, need not be watched, and what they published
    last is returned, if this run can have come so far.
    """
    try:
        before = variable_container.read_version(cluster.variables_address)
        if before is None or before.phase is Phase.OVER:
            return None
        if before.learner in past_learners:
            # Else actors keep its weights for ever, or this learner's versions go on where no reader believes them.
            can_be_its = before.train_step <= furthest_step and before.version <= MAX_PAST_VERSION
            return before if can_be_its else None
        deadline, num_heartbeats = time.monotonic() + watch_secs, 0
        now = before
        while num_heartbeats < NUM_HEARTBEATS:
            if time.monotonic() > deadline or stop.wait(0.5):
                return None  # another run's, whose weights are nothing to this one
            now = variable_container.read_version(cluster.variables_address) or before
            if now.learner != before.learner:
                before, num_heartbeats = now, 0
            elif now.heartbeat > before.heartbeat:
                before, num_heartbeats = now, num_heartbeats + 1
                deadline = time.monotonic() + watch_secs  # a busy machine's come slowly
    except Unreachable:
        return None
    raise RoleError(
        f"another learner publishes to the variable container at {cluster.variables_address} (train step "
        f"{now.train_step:,}). Stop it, or give this run a replay server of its own.",
        ExitCode.OCCUPIED,
    )


def make_train_function(
    agent: tf_agent.TFAgent,
    train_step: tf.Variable,
    source: BatchSource,
    strategy: tf.distribute.Strategy,
    *,
    jit_compile: bool = False,
) -> Callable[[Any, tf.Tensor], dict[str, tf.Tensor]]:
    """Returns `train(handle, num_updates)`: that many of the agent's own updates in one compiled call.

    With `jit_compile` the call is one XLA program, batches and all: on a GPU the updates of a small network are
    bound by the launching of their many kernels otherwise. The source must be one that `can_fuse`.

    It returns the last update's scalars: `loss`, the agent's extra losses, and `staleness`, the mean number of train
    steps between the weights that made the batch and those trained on it. Under several replicas the losses are summed
    (TF-Agents scales each replica's by the global batch) and staleness is averaged.
    """
    update = tf.autograph.experimental.do_not_convert(agent.train)

    def replica_step(*parts: Any) -> dict[str, tf.Tensor]:
        experience, acted_at = source.unpack(*parts)
        acted = acted_at >= 0
        age = tf.where(acted, tf.cast(train_step, tf.int64) - acted_at, 0)
        staleness = tf.math.divide_no_nan(
            tf.cast(tf.reduce_sum(age), tf.float32), tf.reduce_sum(tf.cast(acted, tf.float32))
        )
        loss_info = update(experience)
        extra = loss_info.extra._asdict() if hasattr(loss_info.extra, "_asdict") else {}
        scalars = {name: value for name, value in extra.items() if tf.is_tensor(value) and value.shape.rank == 0}
        return {"loss": loss_info.loss, **scalars, "staleness": staleness / strategy.num_replicas_in_sync}

    def one_step(handle: Any) -> dict[str, tf.Tensor]:
        per_replica = strategy.run(replica_step, args=source.draw(handle))
        return {
            name: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None) for name, value in per_replica.items()
        }

    @tf.function(jit_compile=jit_compile or None)
    def train(handle: Any, num_updates: tf.Tensor) -> dict[str, tf.Tensor]:
        scalars = one_step(handle)  # once outside the loop: autograph must know the shapes
        for _ in tf.range(num_updates - 1):
            scalars = one_step(handle)
        return scalars

    # Traced here so that the optimizers' variables exist before a checkpoint is restored.
    with strategy.scope():
        train.get_concrete_function(source.handle, tf.constant(1))
    return train


class TimeShares:
    """Where the learner's time goes: compiled calls, waiting for data, taking it in, or what else is between calls."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at = clock()
        self._secs = {"computing": 0.0, "waiting": 0.0, "ingesting": 0.0}

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return self._measure("computing")

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return self._measure("waiting")

    def ingesting(self) -> contextlib.AbstractContextManager[None]:
        return self._measure("ingesting")

    @contextlib.contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._secs[name] += self._clock() - start

    def take(self) -> dict[str, float]:
        """Returns the shares since the last call, 0 to 1: `between_share` is what none of the others is.

        The others are `computing_share`, `waiting_share` and `ingesting_share`.
        """
        now = self._clock()
        total = max(now - self._began_at, 1e-9)
        shares = {f"{name}_share": secs / total for name, secs in self._secs.items()}
        self._began_at = now
        self._secs = dict.fromkeys(self._secs, 0.0)
        return {**shares, "between_share": max(0.0, 1.0 - sum(shares.values()))}


class PublishInterval:
    """The time between two publishes of weights: at least so many train steps, and so many seconds."""

    def __init__(self, train_steps: int, secs: float, clock: Callable[[], float] = time.monotonic):
        self._train_steps = train_steps
        self._secs = secs
        self._clock = clock
        self.begin(0)

    def begin(self, step: int) -> None:
        """Notes that weights are published now, at train step `step`."""
        self._published, self._published_at = step, self._clock()

    def is_over(self, step: int) -> bool:
        """Returns whether both have passed at train step `step`."""
        return step - self._published >= self._train_steps and self._clock() - self._published_at >= self._secs


class TrainingLoop:
    """Calls the compiled function until `num_iterations`; all else is done between two calls."""

    def __init__(
        self,
        experiment: Experiment,
        cluster: Cluster,
        agent: tf_agent.TFAgent,
        train_step: tf.Variable,
        source: BatchSource,
        train: Callable[[Any, tf.Tensor], dict[str, tf.Tensor]],
        publisher: Publisher,
        ledger: EvaluationLedger,
        record: RunRecord,
        checkpoints: Checkpoints,
        replay_checkpoints: CheckpointRequests,
        export: PolicyExport,
    ):
        self._schedule = experiment.schedule
        self._cluster = cluster
        self._variables = agent.collect_policy.variables()
        self._statistics = getattr(agent, "observation_statistics", None)
        self._train_step = train_step
        self._source = source
        self._train = train
        self._publisher = publisher
        self._ledger = ledger
        self._record = record
        self._checkpoints = checkpoints
        self._replay_checkpoints = replay_checkpoints
        self._all_variables = checkpoints.variables()
        self._is_finite = tf.function(functools.partial(_all_finite, self._all_variables), autograph=False)
        self._export = export
        self._disk = InBackground()
        self._policies_step = -1  # of the SavedModels
        self._version = 0
        self._num_chunks_answered = 0
        self._starved_since: Optional[float] = None
        self._said_at = time.monotonic()
        tables = ", ".join(f"'{name}'" for name in experiment.replay.table_signatures(agent.collect_data_spec))
        self._replay = f"the replay at {cluster.replay_address} (tables {tables})"
        self._shares = TimeShares()
        # A call may block inside Reverb, where no signal reaches it; this thread does, the loop looks at the clock.
        self._caller = concurrent.futures.ThreadPoolExecutor(1, "train")

    def run(self, stop: Stop, publish_interval: PublishInterval, *, checkpoint_interval_secs: float) -> None:
        """Trains to the last train step, saving on the way and at the end.

        Raises:
          Stopped: `stop` was set; a checkpoint was saved.
          RoleError: No data came for longer than the deadline (UNAVAILABLE); a checkpoint was saved.
          Diverged: The loss, a weight or a moment is not finite (DATA). Nothing was saved: parts of the last update
            were made, and Adam's moments remember it even where every weight is finite.
        """
        has_diverged = False
        step = int(self._train_step.numpy())
        self._record.note_restored(step)
        with _saying_what_was_not_saved(step, "What policies/ has is kept"):
            make_up_missing(
                self._schedule.policy_save_interval,
                self._train_step,
                self._variables,
                self._checkpoints,
                self._ledger,
                self._export,
            )
        if step:  # going on: actors need not warm up again
            self._publisher.announce(Phase.TRAINING)
        self._publish(step)
        if self._schedule.eval_interval:
            self._ledger.request_owed(step)
        try:
            if step < self._schedule.num_iterations:
                if not step:  # the actors are not ready either
                    self._export.prepare()
                self._await_first_data(stop)
                if self._statistics is not None and not step:
                    self._look_first(stop)
                    self._count_observations()
                    self._publish(step)  # with the statistics of the warm-up
            self._publisher.announce(Phase.TRAINING)
            publish_interval.begin(step)
            saved_at = -math.inf  # at once: learners that die young, one after the other, would save the replay never
            num_given_back = self._source.num_given_back
            self._shares.take()  # what came before was no training
            while step < self._schedule.num_iterations:
                if stop.is_set():
                    raise Stopped("stopped")
                before = step
                step, scalars = self._call(step, stop)
                require_finite(step, scalars, self._all_variables)
                self._record.note_train_step(step)
                now = time.monotonic()
                is_wanted = step == self._schedule.num_iterations or self._is_evaluation_due(step)
                # In lock-step weights change between chunks only.
                is_due = publish_interval.is_over(step) and not self._schedule.lock_step
                if is_due or (is_wanted and step > before):
                    publish_interval.begin(step)
                    self._publish(step)
                if scalars is not None and step % self._schedule.log_interval == 0:
                    self._record.log_training(step, {**scalars, **self._shares.take()})
                if scalars is not None and step % self._schedule.policy_save_interval == 0:
                    self._save_policies(numbered=True)
                if step > before and now - saved_at >= checkpoint_interval_secs:
                    saved_at = now
                    self._save(with_replay=True)
                    self._save_policies()
                if self._source.num_given_back > num_given_back:  # a server that began anew has it in memory only
                    num_given_back = self._source.num_given_back
                    logging.info("asking to save what replay servers were given back, under train step %d", step)
                    self._replay_checkpoints.ask(step)
        except Diverged:
            has_diverged = True
            raise
        finally:
            self._record.take_last_reports()  # the launcher stops the actors first: their last ones are there
            if not has_diverged:
                self._save(with_replay=True)
                if self._export.is_prepared:  # else it would take too long, and nothing was trained
                    self._save_policies()
            self._disk.wait()
            self._replay_checkpoints.wait(secs=3.0)

    def _answer_chunk(self, step: int) -> None:
        """In lock-step: lets the actor go on, with the weights that its last chunk led to."""
        if self._schedule.lock_step and self._source.num_chunks > self._num_chunks_answered:
            self._num_chunks_answered = self._source.num_chunks
            self._publish(step)

    def _is_evaluation_due(self, step: int) -> bool:
        interval = self._schedule.eval_interval
        return interval > 0 and (step % interval == 0 or step == self._schedule.num_iterations)

    def _publish(self, step: int) -> None:
        """Hands the weights to the publisher's thread, and to the eval actors when they are due."""
        snapshot = self._publisher.take_snapshot(step, self._variables, self._num_chunks_answered)
        self._version = snapshot.version
        if self._is_evaluation_due(step):
            self._save()  # what is evaluated must never be trained again, with other weights under the same step
            self._disk.do(
                functools.partial(self._ledger.request, snapshot, environment_steps=self._record.environment_steps)
            )

    def _await_first_data(self, stop: Stop) -> None:
        """Returns when the replay holds enough to train on."""
        described = "nothing yet"

        def poll() -> bool:
            nonlocal described
            described = self._source.describe()
            self._record.note_waiting(described)
            self._record.attendance.require_hope("collect-actor")
            is_ready = self._source.is_ready()
            if not is_ready:
                self._answer_chunk(int(self._train_step.numpy()))
            return is_ready

        wait_until(
            poll,
            lambda: f"collect actors to fill {self._replay}: {described}; {self._record.describe_actors()}",
            stop=stop,
            deadline_secs=self._cluster.peer_patience_secs,
            setting="--peer_patience_secs",
            progress=lambda: described,
        )
        self._record.note_waiting(None)

    def _call(self, step: int, stop: Stop) -> tuple[int, Optional[dict[str, float]]]:
        """Returns the train step reached and the last update's scalars; None when data ran out during the call."""
        with self._shares.ingesting():
            num_updates = self._source.allow(self._num_updates_to_boundary(step))
            self._count_observations()
        if num_updates:
            try:
                with self._shares.computing():
                    scalars = self._run_compiled(num_updates, stop)
            except (tf.errors.OutOfRangeError, tf.errors.UnavailableError):
                pass  # the batches that did come were trained on
            except tf.errors.InvalidArgumentError as error:
                # TF-Agents looks at some losses itself.
                refuse_not_finite(int(self._train_step.numpy()), error, self._all_variables)
                if not isinstance(self._source, MeetsStrangers) or not self._source.leave_out(error):
                    raise
            else:
                self._source.note_updates(num_updates)
                self._starved_since = None
                self._record.note_waiting(None)
                beat()
                return step + num_updates, scalars
        else:
            self._answer_chunk(step)
        reached = int(self._train_step.numpy())
        self._source.note_updates(reached - step)
        if reached > step:
            self._starved_since = None
        with self._shares.waiting():
            self._await_more_data()
        return reached, None

    def _run_compiled(self, num_updates: int, stop: Stop) -> dict[str, float]:
        """Returns the last update's scalars.

        Raises:
          Stopped: `stop` was set and the call did not return; it is left behind, with the train steps it made.
          RoleError: No update was made for longer than the deadline (UNAVAILABLE), or the actors ended for good.
        """
        future = self._caller.submit(self._train, self._source.handle, tf.constant(num_updates))
        reached, moved_at = int(self._train_step.numpy()), time.monotonic()
        while True:
            done, _ = concurrent.futures.wait([future], timeout=1.0)
            if done:
                return {name: float(value) for name, value in future.result().items()}
            now = int(self._train_step.numpy())
            if now != reached:
                reached, moved_at = now, time.monotonic()
                self._record.note_train_step(now)
                beat()
            elif time.monotonic() - moved_at > 5.0:  # far longer than an update
                if self._source.can_fuse:  # then drawing never waits: actors are not the reason
                    what = "an update of the compiled call: its device is busy with something else, or compiles"
                    self._say_waiting(moved_at, what, "Leave it more of the machine, or raise it.")
                else:
                    self._say_starved(moved_at, self._source.describe())
            if stop.is_set() and time.monotonic() - moved_at > 2.0:
                raise Stopped("stopped while a batch was awaited")

    def _look_first(self, stop: Stop) -> None:
        """Returns when the source has taken observations in, before the first update; a stranger's are left out.

        Raises:
          Stopped: `stop` was set.
          RoleError: It did not within the deadline (UNAVAILABLE).
        """

        def poll() -> bool:
            future = self._caller.submit(self._source.look_first)  # it may block inside Reverb
            while not future.done() and not stop.is_set():
                concurrent.futures.wait([future], timeout=1.0)
                beat()
            if not future.done():
                return False
            error = future.exception()
            if isinstance(error, tf.errors.InvalidArgumentError):
                if not isinstance(self._source, MeetsStrangers) or not self._source.leave_out(error):
                    raise error
            elif error is not None and not isinstance(error, tf.errors.OpError):
                raise error
            if error is not None:
                with contextlib.suppress(tf.errors.OpError):  # the server is away; the next look asks again
                    self._source.renew()
            return error is None

        wait_until(
            poll,
            lambda: f"{self._replay} to hand out the observations to normalise by: {self._source.describe()}",
            stop=stop,
            deadline_secs=self._cluster.peer_patience_secs,
            setting="--peer_patience_secs",
        )

    def _count_observations(self) -> None:
        if self._statistics is not None:
            for moments in self._source.take_moments():  # one by one: together they would round in another way
                self._statistics.update(moments)

    def _num_updates_to_boundary(self, step: int) -> int:
        """Returns how many updates one call may make so that it ends where something is due."""
        schedule = self._schedule
        intervals = (schedule.eval_interval, schedule.log_interval, schedule.policy_save_interval)
        boundaries = [(step // interval + 1) * interval for interval in intervals if interval]
        return min(schedule.num_updates_per_call, min([schedule.num_iterations, *boundaries]) - step)

    def _await_more_data(self) -> None:
        """Waits a moment for data and says what is missing.

        Raises:
          RoleError: No data for longer than the deadline (UNAVAILABLE).
        """
        self._starved_since = self._starved_since or time.monotonic()
        if time.monotonic() - self._starved_since > 1.0:  # shorter waits are the ordinary pace of samples per insert
            self._say_starved(self._starved_since, self._source.describe())
        self._source.await_data(secs=0.25)
        with contextlib.suppress(tf.errors.OpError):  # the server is away; the next call asks again
            self._source.renew()

    def _say_starved(self, since: float, described: str) -> None:
        self._record.attendance.require_hope("collect-actor")
        what = f"collect actors: no data from {self._replay}: {described}; {self._record.describe_actors()}"
        self._say_waiting(since, what, "Start collect actors, or raise it.")

    def _say_waiting(self, since: float, what: str, remedy: str) -> None:
        beat()  # watched: it ends below
        now = time.monotonic()
        self._record.note_waiting(what)
        if now - self._said_at > SAY_EVERY_SECS:
            self._said_at = now
            logging.info("waiting for %s (%.0f s)", what, now - since)
        if now - since > self._cluster.peer_patience_secs:
            raise RoleError(
                f"waited {now - since:.0f} s for {what}, longer than --peer_patience_secs = "
                f"{self._cluster.peer_patience_secs:g}. {remedy}",
                ExitCode.UNAVAILABLE,
            )

    def _save(self, *, with_replay: bool = False) -> None:
        """Writes a checkpoint, which is on disk soon after, and asks for the replay's under the same train step.

        What cannot be written is said, and training goes on.

        Raises:
          Diverged: A weight or an optimizer's moment is not finite. It was not written.
        """
        step = int(self._train_step.numpy())
        if not self._is_finite():
            raise _diverged(step, "what is to be saved is not finite", self._all_variables)
        self._disk.begin(step)
        with self._source.standing_still():  # what counts as taken in is in the statistics, too
            counts = {**self._record.counts(), **self._source.counts(), "version": self._version + 1}
            self._count_observations()
        with _saying_what_was_not_saved(step, "The checkpoints before it are kept"):
            prefix = self._checkpoints.write(counts)

            def finish() -> None:
                with _saying_what_was_not_saved(step, "The checkpoints before it are kept"):
                    self._checkpoints.keep(prefix)

            self._disk.do(finish)
            self._disk.do(self._record.sync)
            if with_replay:
                self._replay_checkpoints.ask(step)

    def _save_policies(self, *, numbered: bool = False) -> None:
        """Puts the present weights into the SavedModels, and into a checkpoint of this train step's number.

        They are on disk soon after. What cannot be written is said, and training goes on.
        """
        step, kept = int(self._train_step.numpy()), "policies/ keeps the policies before it"
        self._disk.begin(step)
        with _saying_what_was_not_saved(step, kept):
            writes = [self._export.write_checkpoint] if numbered else []
            if step != self._policies_step:
                writes.append(self._export.write_policies)
            self._policies_step = step
            for write in writes:
                finish = write()

                def finish_and_say(finish: Callable[[], None] = finish) -> None:
                    with _saying_what_was_not_saved(step, kept):
                        finish()

                self._disk.do(finish_and_say)


@contextlib.contextmanager
def _saying_what_was_not_saved(step: int, what_is_kept: str) -> Iterator[None]:
    """Warns of what could not be written, and goes on."""
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        logging.warning(
            "--root_dir: train step %d could not be saved: %s. %s and training goes on; free some space, or let this "
            "user write there.",
            step,
            find_reason(error),
            what_is_kept,
        )


def _all_finite(variables: Sequence[tf.Variable]) -> tf.Tensor:
    floating = [variable for variable in variables if variable.dtype.is_floating]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(variable)) for variable in floating])


def find_not_finite(variables: Sequence[tf.Variable]) -> Optional[str]:
    """Returns the name of the first floating variable that holds a NaN or an infinity; None when none does."""
    for variable in variables:
        if variable.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(variable))):
            return f"'{variable.name.split(':')[0]}' {variable.shape.as_list()}"
    return None


def require_finite(step: int, scalars: Optional[Mapping[str, float]], variables: Sequence[tf.Variable]) -> None:
    """Returns when the last update's scalars are finite.

    Raises:
      Diverged: One is not; the message has the train step, the scalar and the first bad variable.
    """
    for name, value in (scalars or {}).items():
        if not math.isfinite(value):
            raise _diverged(step, f"{name} = {value}", variables)


def refuse_not_finite(step: int, error: tf.errors.InvalidArgumentError, variables: Sequence[tf.Variable]) -> None:
    """Returns when `error` is about something else; raises as `require_finite` when a numeric check failed."""
    if re.search(r"\b(nan|inf)\b", error.message, re.IGNORECASE):
        raise _diverged(step, find_reason(error), variables) from error


class Diverged(RoleError):
    """A loss or a weight is not finite."""


def _diverged(step: int, what: str, variables: Sequence[tf.Variable]) -> Diverged:
    variable = find_not_finite(variables)
    return Diverged(
        f"at train step {step:,} {what}: training has diverged"
        + (f"; the first variable that is not finite is {variable}" if variable else "")
        + ". The last good checkpoint is kept. Lower the learning rate, clip gradients, or look at the rewards and "
        "observations; then start again with the same --root_dir to go on from it.",
        ExitCode.DATA,
    )


def finish(
    experiment: Experiment,
    agent: tf_agent.TFAgent,
    train_step: tf.Variable,
    export: PolicyExport,
    ledger: EvaluationLedger,
    record: RunRecord,
    stop: Stop,
    patience_secs: float,
) -> None:
    """Chooses the best evaluated policy, has it evaluated once more, and saves it as the run's policy.

    Raises:
      Stopped: `stop` was set.
      RoleError: A result did not come within `patience_secs` seconds after the one before (UNAVAILABLE).
    """
    if experiment.schedule.eval_interval:
        record.note_phase("final evaluation")
        while pending := ledger.pending():
            _await_result(
                functools.partial(_has_fewer_pending, ledger, len(pending)),
                f"evaluations of {pending}",
                record,
                ledger,
                stop,
                patience_secs,
            )
        variables = agent.collect_policy.variables()
        newest = Snapshot(-1, int(train_step.numpy()), [variable.numpy() for variable in variables])
        best = ledger.best() or newest
        if best is newest:
            logging.warning("no evaluated policy's weights are there: the last train step's are handed over")
        ledger.request(best, Purpose.DELIVERED)
        _await_result(
            lambda: ledger.delivered() is not None,
            "the delivered policy's evaluation",
            record,
            ledger,
            stop,
            patience_secs,
        )
        best.assign_to(variables)
        train_step.assign(best.train_step)
    record.note_phase("reporting")
    export.save_policies()
    record.write_summary()


def _has_fewer_pending(ledger: EvaluationLedger, num_pending: int) -> bool:
    return len(ledger.pending()) < num_pending


def _await_result(
    poll: Callable[[], bool], what: str, record: RunRecord, ledger: EvaluationLedger, stop: Stop, patience_secs: float
) -> None:
    def poll_and_send() -> bool:
        record.attendance.require_hope("eval-actor")
        ledger.send_unsent()
        return poll()

    record.note_waiting(what)
    wait_until(
        poll_and_send,
        lambda: f"eval actors: {what}",
        stop=stop,
        deadline_secs=patience_secs,
        setting="learner.evaluation_patience_secs",
    )
    record.note_waiting(None)
