"""The training loop: compiled calls until `num_iterations`; all else is done between two calls."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

import tensorflow as tf
from tf_agents.agents import tf_agent

from actorlearner.cluster import Cluster
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.experiment import Experiment
from actorlearner.replay.base import BatchSource
from actorlearner.replay.checkpoint_requests import CheckpointRequests
from actorlearner.run.missing_policies import make_up_missing
from actorlearner.run.policies import PolicyExport
from actorlearner.run.record import RunRecord
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.durable_files import InBackground
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, RoleError, Stop, Stopped, find_reason, wait_until
from actorlearner.training.divergence import Diverged, all_finite, diverged, refuse_not_finite, require_finite
from actorlearner.training.timing import PublishInterval, TimeShares
from actorlearner.variable_container import Phase, Publisher


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
        self._is_finite = tf.function(functools.partial(all_finite, self._all_variables), autograph=False)
        self._export = export
        self._disk = InBackground()
        self._policies_step = -1  # of the SavedModels
        self._version = 0
        self._turn = experiment.pace.make_learners_turn(source)
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
                is_due = publish_interval.is_over(step) and self._turn.may_publish
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

    def _end_turn(self, step: int) -> None:
        """Lets actors go on that wait for the weights that their last steps led to."""
        if self._turn.is_over():
            self._publish(step)

    def _is_evaluation_due(self, step: int) -> bool:
        interval = self._schedule.eval_interval
        return interval > 0 and (step % interval == 0 or step == self._schedule.num_iterations)

    def _publish(self, step: int) -> None:
        """Hands the weights to the publisher's thread, and to the eval actors when they are due."""
        snapshot = self._publisher.take_snapshot(step, self._variables, self._turn.num_answered)
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
            self._record.attendance.raise_if_all_failed("collect-actor")
            is_ready = self._source.is_ready()
            if not is_ready:
                self._end_turn(int(self._train_step.numpy()))
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
                if not self._source.leave_out(error):
                    raise
            else:
                self._source.note_updates(num_updates)
                self._starved_since = None
                self._record.note_waiting(None)
                beat()
                return step + num_updates, scalars
        else:
            self._end_turn(step)
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
                if not self._source.leave_out(error):
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
        self._record.attendance.raise_if_all_failed("collect-actor")
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
            raise diverged(step, "what is to be saved is not finite", self._all_variables)
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
