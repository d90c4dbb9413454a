"""What the learner saves on the way: checkpoints, the replay's beside them, and policies; a disk is not waited for."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.replay.base import BatchSource
from actorlearner.replay.checkpoint_requests import CheckpointRequests
from actorlearner.run.missing_policies import make_up_missing
from actorlearner.run.policies import PolicyExport
from actorlearner.run.record import RunRecord
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.durable_files import InBackground
from actorlearner.runtime.lifecycle import find_reason
from actorlearner.training.divergence import all_finite, diverged
from actorlearner.training.observations import Observations
from actorlearner.training.periodic import Reached
from actorlearner.variable_container import Publisher


class Saving:
    """Saves under the agent's train step. What cannot be written is said, and training goes on."""

    def __init__(
        self,
        train_step: tf.Variable,
        checkpoints: Checkpoints,
        replay_checkpoints: CheckpointRequests,
        export: PolicyExport,
        record: RunRecord,
        source: BatchSource,
        observations: Observations,
        publisher: Publisher,
    ):
        """Args:
        train_step: What everything is saved under.
        checkpoints: The learner's own.
        replay_checkpoints: Asks the replay servers for theirs.
        export: Writes policies as files.
        record, source, publisher: Have counts that a checkpoint keeps.
        observations: Whose statistics are of the same moment as the source's counts.
        """
        self._train_step = train_step
        self._checkpoints = checkpoints
        self._replay_checkpoints = replay_checkpoints
        self._export = export
        self._record = record
        self._source = source
        self._observations = observations
        self._publisher = publisher
        self.variables = checkpoints.variables()
        """All that a checkpoint has of the agent, optimizers included."""
        self._is_finite = tf.function(functools.partial(all_finite, self.variables), autograph=False)
        self._num_given_back = source.num_given_back
        self._policies_step = -1  # train step of the SavedModels
        self._disk = InBackground()

    def save(self, reached: Reached) -> None:
        """Saves agent, replay and policies."""
        self.save_checkpoint(with_replay=True)
        self.save_policies()

    def save_checkpoint(self, *, with_replay: bool = False) -> None:
        """Writes a checkpoint, which is on disk soon after, and asks for the replay's under the same train step.

        Raises:
          Diverged: A weight or an optimizer's moment is not finite; nothing was written.
        """
        step = int(self._train_step.numpy())
        if not self._is_finite():
            raise diverged(step, "a value to be saved is not finite", self.variables)
        self._disk.begin(step)
        with self._source.standing_still():  # counts and statistics must be of one moment
            counts = {**self._record.counts(), **self._source.counts(), "version": self._publisher.next_version}
            self._observations.count()
        with _saying_what_was_not_saved(step, "The checkpoints before it are kept"):
            prefix = self._checkpoints.write(counts)

            def finish() -> None:
                with _saying_what_was_not_saved(step, "The checkpoints before it are kept"):
                    self._checkpoints.keep(prefix)

            self._disk.do(finish)
            self._disk.do(self._record.sync)
            if with_replay:
                self._replay_checkpoints.ask(step)

    def save_policies(self, *, numbered: bool = False) -> None:
        """Puts the present weights into the SavedModels; they are on disk soon after.

        Where `numbered`, also into a checkpoint whose name is this train step's number.
        """
        step, kept = int(self._train_step.numpy()), "policies/ keeps the previous policies"
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

    def save_numbered_policy(self, reached: Reached) -> None:
        """Saves the policies, this train step's number on one."""
        self.save_policies(numbered=True)

    def make_up_missing_policies(
        self, interval: int, variables: Sequence[tf.Variable], ledger: EvaluationLedger
    ) -> None:
        """Writes the numbered policies that the learner before this one owes. See `make_up_missing`."""
        with _saying_what_was_not_saved(int(self._train_step.numpy()), "What policies/ has is kept"):
            make_up_missing(interval, self._train_step, variables, self._checkpoints, ledger, self._export)

    def save_what_was_given_back(self, reached: Reached) -> None:
        """Asks for the replay's checkpoint when a restarted server was given chunks: it has them in memory only."""
        if self._source.num_given_back > self._num_given_back:
            self._num_given_back = self._source.num_given_back
            logging.info("asking to save the refilled replay under train step %d", reached.step)
            self._replay_checkpoints.ask(reached.step)

    def prepare(self) -> None:
        """Writes the first SavedModels, after which others take milliseconds; takes some seconds."""
        self._export.prepare()

    def do_in_background(self, work: Callable[[], None]) -> None:
        """Has something written after all that was given before; never blocks."""
        self._disk.do(work)

    def save_at_the_end(self) -> None:
        """Saves what there is.

        Raises:
          Diverged: See `save_checkpoint`.
        """
        self.save_checkpoint(with_replay=True)
        if self._export.is_prepared:  # otherwise it would take too long, and nothing was trained yet
            self.save_policies()

    def await_saved(self, replay_secs: float) -> None:
        """Returns when all is on disk; the replay's checkpoint is awaited for at most `replay_secs` seconds."""
        self._disk.wait()
        self._replay_checkpoints.wait(secs=replay_secs)


@contextlib.contextmanager
def _saying_what_was_not_saved(step: int, what_is_kept: str) -> Iterator[None]:
    """Turns a failed write into a warning."""
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        logging.warning(
            "--root_dir: train step %d could not be saved: %s. %s and training continues; free some space, or let this "
            "user write there.",
            step,
            find_reason(error),
            what_is_kept,
        )
