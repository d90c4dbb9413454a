"""What is due between two compiled calls is done once, whatever train steps a call comes to."""

from __future__ import annotations

from actorlearner.training.periodic import EverySecs, EverySteps, Reached


def test_what_is_due_every_so_many_train_steps_is_done_once_for_each_multiple_that_a_call_passes():
    """An agent that counts several train steps in an update would step over a multiple, and save nothing."""
    done: list[int] = []
    action = EverySteps(100, lambda reached: done.append(reached.step))
    for before, step in ((0, 40), (40, 100), (100, 100), (100, 190), (190, 230), (230, 450)):
        action(Reached(before, step, {}))
    assert done == [100, 230, 450]


def test_an_interval_of_none_is_never_due():
    """eval_interval = 0 evaluates nothing."""
    assert not Reached(0, 100, {}).passes(0)


def test_what_is_due_every_so_many_seconds_is_done_after_the_first_update_and_only_where_one_was_made():
    """Learners that die young, one after the other, would never save; one that waits would save all the time."""
    times = [1.0, 2.0, 30.0, 61.9, 62.0, 70.0]
    moves = [False, True, True, True, False, True]
    now = iter(times)
    done: list[Reached] = []
    action = EverySecs(60.0, done.append, clock=lambda: next(now))
    calls = [Reached(5, 5 + has_moved, None) for has_moved in moves]
    for reached in calls:
        action(reached)
    assert [id(reached) for reached in done] == [id(calls[1]), id(calls[5])]
