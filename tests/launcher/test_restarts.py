"""When a dead role is started again."""

from __future__ import annotations

import pytest

from actorlearner.launcher.restarts import Restarts, Timing, describe_exit


def test_waits_double_up_to_a_limit_and_start_anew_after_a_long_life():
    restarts = Restarts(Timing())
    assert [restarts.secs_until_next(40) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert restarts.secs_until_next(60) == 1
    assert restarts.secs_until_next(40) == 2


def test_five_short_lives_in_a_row_are_the_last():
    restarts = Restarts(Timing())
    assert [restarts.secs_until_next(29) for _ in range(4)] == [1, 2, 4, 8]
    assert restarts.secs_until_next(31) == 16, "a longer life between them"
    assert None not in [restarts.secs_until_next(29) for _ in range(4)]
    assert restarts.secs_until_next(29) is None


def test_who_is_killed_again_and_again_is_started_again_at_once():
    """A SIGKILL from outside is not a defect of the role; giving up, or waiting half a minute, would be a bug."""
    restarts = Restarts(Timing())
    assert [restarts.secs_until_next(5, was_killed=True) for _ in range(24)] == [1] * 24
    assert restarts.secs_until_next(5, was_killed=True) is None, "unless the kernel kills it for its memory, for ever"


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "ended"),
        (1, "crashed with exit code 1"),
        (143, "was stopped by SIGTERM"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (65, "ended with exit code 65: the data does not fit the experiment"),
    ],
)
def test_exit_codes_are_put_into_words(returncode, words):
    assert describe_exit(returncode) == words
