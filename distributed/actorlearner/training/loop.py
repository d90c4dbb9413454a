"""The training loop: compiled calls until the last train step, and a list of what is due between two calls."""

from __future__ import annotations

from actorlearner.agents.policies import Policies
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.experiment import Experiment
from actorlearner.replay.base import BatchSource
from actorlearner.run.record import RunRecord
from actorlearner.runtime.lifecycle import Stop, Stopped
from actorlearner.training.calls import Calls
from actorlearner.training.divergence import Diverged, require_finite
from actorlearner.training.observations import Observations
from actorlearner.training.periodic import Action, EverySecs, EverySteps, Reached
from actorlearner.training.publishing import Publishing
from actorlearner.training.saving import Saving
from actorlearner.training.step import TrainFunction
from actorlearner.training.timing import PublishInterval
from actorlearner.training.waiting import Waiting
from actorlearner.variable_container import Phase, Publisher


class TrainingLoop:
    """Trains from what was restored to the last train step."""

    def __init__(
        self,
        experiment: Experiment,
        policies: Policies,
        train: TrainFunction,
        source: BatchSource,
        observations: Observations,
        publisher: Publisher,
        ledger: EvaluationLedger,
        record: RunRecord,
        saving: Saving,
        *,
        publish_interval: PublishInterval,
        checkpoint_interval_secs: float,
        replay: str,
        patience_secs: float,
    ):
        """Args:
        experiment: Has the schedule and the pace.
        policies: What is trained, and what counts its train steps.
        train: The compiled function.
        source: Of the batches.
        observations: Counted between two calls.
        publisher: Takes weights, and tells every role how far training is.
        ledger: Takes what is due for evaluation.
        record: The run's numbers.
        saving: Writes what is due.
        publish_interval: Between two publishes.
        checkpoint_interval_secs: Between two checkpoints, in seconds.
        replay: Where batches come from, in words.
        patience_secs: Longest wait for data, in seconds.
        """
        self._schedule = schedule = experiment.schedule
        self._policies = policies
        self._train_step = policies.train_step
        self._observations = observations
        self._publisher = publisher
        self._ledger = ledger
        self._record = record
        self._saving = saving
        self._replay = replay
        self._patience_secs = patience_secs
        self._waiting = Waiting(source, replay, record, patience_secs)
        turn = experiment.pace.make_learners_turn(source)
        self._publishing = Publishing(schedule, policies, publisher, turn, publish_interval, ledger, record, saving)
        self._calls = Calls(
            train,
            self._train_step,
            source,
            observations,
            record,
            self._waiting,
            saving.variables,
            before_waiting=self._publishing.end_turn,
        )
        self._steps_per_update = 1.0
        self._actions: list[Action] = [
            self._require_finite,
            self._note_train_step,
            self._publishing,
            EverySteps(schedule.log_interval, self._log),
            EverySteps(schedule.policy_save_interval, saving.save_numbered_policy),
            EverySecs(checkpoint_interval_secs, saving.save),
            saving.save_what_was_given_back,
        ]

    def run(self, stop: Stop) -> None:
        """Trains to the last train step; saves at intervals and at the end.

        Raises:
          Stopped: `stop` was set; a checkpoint was saved.
          RoleError: No data came within the deadline (UNAVAILABLE); a checkpoint was saved.
          Diverged: The loss, a weight or an optimizer's moment is not finite (DATA). Nothing was saved: the last update
            was partly applied, and Adam's moments keep it even if every weight is finite.
        """
        self._begin()
        has_diverged = False
        try:
            if self._step() < self._schedule.num_iterations:
                self._await_first_data(stop)
            self._publisher.announce(Phase.TRAINING)
            self._publishing.begin()
            self._calls.shares.take()  # discard the time before training
            self._train(stop)
        except Diverged:
            has_diverged = True
            raise
        finally:
            self._record.take_last_reports()  # the launcher stops actors first, so their last reports have arrived
            if not has_diverged:
                self._saving.save_at_the_end()
            self._saving.await_saved(replay_secs=3.0)

    def _train(self, stop: Stop) -> None:
        step = self._step()
        while step < self._schedule.num_iterations:
            if stop.is_set():
                raise Stopped("stopped")
            scalars = self._calls.make(self._num_updates_to_boundary(step), stop)
            before, step = step, self._step()
            if self._calls.num_made:
                self._steps_per_update = max(1.0, (step - before) / self._calls.num_made)
            for action in self._actions:
                action(Reached(before, step, scalars))

    def _step(self) -> int:
        """Returns the train step. It is read, never computed: an agent may count more than once in an update."""
        return int(self._train_step.numpy())

    def _num_updates_to_boundary(self, step: int) -> int:
        """Returns how many updates the next call may make, so that it ends where something is due."""
        schedule = self._schedule
        intervals = (schedule.eval_interval, schedule.log_interval, schedule.policy_save_interval)
        boundaries = [(step // interval + 1) * interval for interval in intervals if interval]
        num_steps = min([schedule.num_iterations, *boundaries]) - step
        return min(schedule.num_updates_per_call, max(1, int(num_steps / self._steps_per_update)))

    def _begin(self) -> None:
        """Publishes what was restored, and makes up for what the learner before this one left undone."""
        step = self._step()
        self._record.note_restored(step)
        self._saving.make_up_missing_policies(
            self._schedule.policy_save_interval, self._policies.variables, self._ledger
        )
        if step:  # resumed: actors need not warm up again
            self._publisher.announce(Phase.TRAINING)
        self._publishing.publish_first()

    def _await_first_data(self, stop: Stop) -> None:
        is_new = not self._step()
        if is_new:  # the actors are starting too
            self._saving.prepare()
        self._waiting.for_first_data(stop, when_not_ready=self._publishing.end_turn)
        if is_new and self._observations.are_counted:
            self._observations.look_first(self._replay, stop, self._patience_secs)
            self._publishing.publish()  # now with the statistics of the warm-up

    def _require_finite(self, reached: Reached) -> None:
        require_finite(reached.step, reached.scalars, self._saving.variables)

    def _note_train_step(self, reached: Reached) -> None:
        self._record.note_train_step(reached.step)

    def _log(self, reached: Reached) -> None:
        if reached.scalars is not None:
            self._record.log_training(reached.step, {**reached.scalars, **self._calls.shares.take()})
