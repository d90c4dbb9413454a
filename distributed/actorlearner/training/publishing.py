"""When the learner's weights go to the actors, and which of them are evaluated."""

from __future__ import annotations

import functools

from actorlearner.agents.policies import Policies
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.experiment import Schedule
from actorlearner.replay.pace import LearnersTurn
from actorlearner.run.record import RunRecord
from actorlearner.training.periodic import Reached
from actorlearner.training.saving import Saving
from actorlearner.training.timing import PublishInterval
from actorlearner.variable_container import Publisher


class Publishing:
    """Hands weights to the publisher's thread, and to the eval actors those of every `eval_interval` train steps."""

    def __init__(
        self,
        schedule: Schedule,
        policies: Policies,
        publisher: Publisher,
        turn: LearnersTurn,
        interval: PublishInterval,
        ledger: EvaluationLedger,
        record: RunRecord,
        saving: Saving,
    ):
        """Args:
        schedule: Says what is evaluated.
        policies: Whose variables are published, under their train step.
        publisher: Takes snapshots.
        turn: Whether actors wait for weights.
        interval: Between two publishes.
        ledger: Takes what is due for evaluation.
        record: Knows the environment steps.
        saving: Writes a checkpoint of what is evaluated.
        """
        self._schedule = schedule
        self._train_step = policies.train_step
        self._variables = policies.variables
        self._publisher = publisher
        self._turn = turn
        self._interval = interval
        self._ledger = ledger
        self._record = record
        self._saving = saving

    def publish_first(self) -> None:
        """Publishes what the run begins with, or goes on from; it may be due for evaluation."""
        step, interval = int(self._train_step.numpy()), self._schedule.eval_interval
        self._publish(step, evaluate=bool(interval) and (step % interval == 0 or self._is_last(step)))
        if interval:
            self._ledger.request_owed(step)

    def publish(self) -> None:
        """Publishes what there is now."""
        self._publish(int(self._train_step.numpy()), evaluate=False)

    def begin(self) -> None:
        """Begins the time until the next publish."""
        self._interval.begin(int(self._train_step.numpy()))

    def end_turn(self) -> None:
        """Publishes weights for actors that wait for the result of their last steps."""
        if self._turn.is_over():
            self.publish()

    def __call__(self, reached: Reached) -> None:
        """Publishes what is due, once for each train step that is evaluated and for the last."""
        has_moved = reached.step > reached.before
        is_last = has_moved and self._is_last(reached.step)
        is_evaluated = has_moved and reached.passes(self._schedule.eval_interval)
        is_due = self._turn.may_publish and self._interval.is_over(reached.step)
        if is_due or is_last or is_evaluated:
            self._interval.begin(reached.step)
            self._publish(reached.step, evaluate=is_evaluated or (is_last and self._schedule.eval_interval > 0))

    def _is_last(self, step: int) -> bool:
        return step >= self._schedule.num_iterations

    def _publish(self, step: int, *, evaluate: bool) -> None:
        snapshot = self._publisher.take_snapshot(step, self._variables, self._turn.num_answered)
        if evaluate:
            # What is evaluated must never be trained again, with other weights under the same step.
            self._saving.save_checkpoint()
            request = functools.partial(
                self._ledger.request, snapshot, environment_steps=self._record.environment_steps
            )
            self._saving.do_in_background(request)
