"""At whose speed actors and learner go: each at its own, or in turns."""

from __future__ import annotations

from typing import Any

import pytest

from actorlearner.replay.base import BatchSource, TrajectorySink
from actorlearner.replay.pace import Free, TakingTurns
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.variable_container import Phase


class Weights:
    """What an actor hears of the learner; counts how often it asked."""

    def __init__(self):
        self.num_asked = 0
        self.answered_at = 3

    def num_chunks(self):
        self.num_asked += 1
        return int(self.num_asked >= self.answered_at)

    def phase(self):
        return Phase.TRAINING


def test_an_actor_changes_weights_after_the_answer_to_its_chunk_and_at_no_other_step():
    """At any other step, which weights made which step would depend on the clock."""
    sink = TrajectorySink()
    weights: Any = Weights()
    turn = TakingTurns().make_actors_turn(sink, weights, patience_secs=30)
    assert not turn.may_change
    turn.await_answer(Stop())
    assert not turn.may_change and not weights.num_asked, "no chunk has ended"
    sink.num_chunks = 1
    turn.await_answer(Stop())
    assert turn.may_change and weights.num_asked >= weights.answered_at
    turn.await_answer(Stop())
    assert not turn.may_change


def test_a_learner_answers_each_chunk_once():
    """An answer too few and the actor waits for ever; one too many and it goes on before its weights are there."""
    source = BatchSource()
    turn = TakingTurns().make_learners_turn(source)
    assert not turn.may_publish
    assert not turn.is_over()
    source.num_chunks = 2
    assert turn.is_over()
    assert turn.num_answered == 2
    assert not turn.is_over()


def test_who_goes_at_his_own_speed_waits_for_nobody():
    """Lock-step's cost is for tests and comparisons alone."""
    sink = TrajectorySink()
    weights: Any = Weights()
    sink.num_chunks = 5
    turn = Free().make_actors_turn(sink, weights, patience_secs=30)
    turn.await_answer(Stop())
    assert turn.may_change and not weights.num_asked
    assert not Free().make_learners_turn(BatchSource()).is_over()


def test_in_lock_step_there_is_one_actor():
    """A second one's chunks would come in an order that the clock decides."""
    Free().check_actor(1)
    TakingTurns().check_actor(0)
    with pytest.raises(RoleError, match="--task = 1 with train.lock_step = True") as refused:
        TakingTurns().check_actor(1)
    assert refused.value.exit_code == ExitCode.USAGE
