"""The pace of collect actors and learner: each at its own speed, or in turns.

A replay chooses the pace (`Replay.pace`), and both roles ask it: the actor before it takes newer weights and after each
step, the learner before it publishes and when it has no more data to train on. In turns, an actor sends one chunk of
steps; the learner makes the train steps that it allows and publishes once, with the number of chunks it has answered on
the version board; the actor continues when its own chunk is among them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop, wait_until
from actorlearner.variable_container import Phase, Subscriber

if TYPE_CHECKING:
    from actorlearner.replay.base import BatchSource, TrajectorySink


class Pace:
    """The settings of a pace, which both sides use; it has no state."""

    is_repeatable: bool
    """Whether two new runs of one seed end with equal weights, bit for bit."""

    sends_whole_chunks_only: bool
    """Whether an actor sends a chunk only when it is full, however long that takes."""

    least_secs_between_looks: float
    """Shortest time between two requests of an actor whether the warm-up is over, in seconds."""

    def check_actor(self, task: int) -> None:
        """Checks that a collect actor with this task number can take part. Raises `RoleError` (USAGE)."""

    def note_restart(self, what: str) -> None:
        """Warns if a restart (of `what`) breaks the promise of the pace."""

    def make_actors_turn(self, sink: TrajectorySink, weights: Subscriber, patience_secs: float) -> ActorsTurn:
        """Returns one collect actor's side.

        Args:
          sink: The actor's sink.
          weights: The actor's view of the learner.
          patience_secs: How long it waits for an answer, in seconds.
        """
        raise NotImplementedError

    def make_learners_turn(self, source: BatchSource) -> LearnersTurn:
        """Returns the learner's side; `source` knows which data has arrived."""
        raise NotImplementedError


class ActorsTurn:
    """One collect actor's side; this class is for free pace."""

    may_change = True
    """Whether the actor may take newer weights, or end its warm-up, before its next step."""

    def await_answer(self, stop: Stop) -> None:
        """Blocks until the next step may be made; called after each step.

        Raises:
          RoleError: The learner gave no answer within `patience_secs` (UNAVAILABLE).
          Stopped: `stop` was set.
        """


class LearnersTurn:
    """The learner's side; this class is for free pace."""

    num_answered = 0
    """Number of chunks whose train steps have all been made, for the version board."""

    may_publish = True
    """Whether weights may be published whenever they are due."""

    def is_over(self) -> bool:
        """Returns whether actors wait for weights now; called when no train step is allowed. True once per turn."""
        return False


class Free(Pace):
    """Actors and learner go at their own speed; only samples per insert makes one wait for the other."""

    is_repeatable = False
    sends_whole_chunks_only = False
    least_secs_between_looks = 0.2

    def make_actors_turn(self, sink: TrajectorySink, weights: Subscriber, patience_secs: float) -> ActorsTurn:
        return ActorsTurn()

    def make_learners_turn(self, source: BatchSource) -> LearnersTurn:
        return LearnersTurn()


class TakingTurns(Pace):
    """One collect actor and the learner take turns, chunk by chunk: lock-step."""

    is_repeatable = True
    sends_whole_chunks_only = True
    least_secs_between_looks = 0.0  # the first step with new weights must not depend on the clock

    def check_actor(self, task: int) -> None:
        if task:
            raise RoleError(
                f"--task = {task} with train.lock_step = True: lock-step has one collect actor, and its task is 0.",
                ExitCode.USAGE,
            )

    def note_restart(self, what: str) -> None:
        logging.warning("train.lock_step = True, but %s is not reproducible; --fresh starts over", what)

    def make_actors_turn(self, sink: TrajectorySink, weights: Subscriber, patience_secs: float) -> ActorsTurn:
        return _ChunkByChunk(sink, weights, patience_secs)

    def make_learners_turn(self, source: BatchSource) -> LearnersTurn:
        return _AnswerByAnswer(source)


class _ChunkByChunk(ActorsTurn):
    def __init__(self, sink: TrajectorySink, weights: Subscriber, patience_secs: float):
        self._sink = sink
        self._weights = weights
        self._patience_secs = patience_secs
        self._num_sent = sink.num_chunks
        self.may_change = False

    def await_answer(self, stop: Stop) -> None:
        self.may_change = self._sink.num_chunks > self._num_sent
        if not self.may_change:
            return
        self._num_sent = self._sink.num_chunks
        wait_until(
            lambda: self._weights.num_chunks() >= self._num_sent or self._weights.phase() > Phase.TRAINING,
            lambda: (
                f"the learner to train on chunk {self._num_sent:,}, in lock-step: it has done "
                f"{self._weights.num_chunks():,}"
            ),
            stop=stop,
            deadline_secs=self._patience_secs,
            setting="--peer_patience_secs",
            every_secs=0.005,
        )


class _AnswerByAnswer(LearnersTurn):
    may_publish = False  # weights change only between chunks

    def __init__(self, source: BatchSource):
        self._source = source
        self.num_answered = 0

    def is_over(self) -> bool:
        is_over = self._source.num_chunks > self.num_answered
        self.num_answered = self._source.num_chunks
        return is_over
