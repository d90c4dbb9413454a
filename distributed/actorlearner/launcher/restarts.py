"""Who restarts a dead role, and when restarts stop: the one back-off policy, of `train` and of `keep-running`."""

from __future__ import annotations

import contextlib
import dataclasses
import signal

from actorlearner.runtime.lifecycle import FINAL_CODES, SECOND_SIGNAL_SECS, ExitCode

STOPPED_CODES = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
KILLED_CODES = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, *STOPPED_CODES)
GAVE_UP = ExitCode.CRASH


@dataclasses.dataclass(frozen=True)
class Timing:
    """The launcher's times, in seconds. Tests shorten them."""

    poll_secs: float = 0.1
    first_restart_secs: float = 1.0  # doubles with every restart ...
    longest_restart_secs: float = 30.0  # ... up to this ...
    forgiven_after_secs: float = 60.0  # ... and is reset after a run this long
    short_life_secs: float = 30.0
    num_short_lives: int = 5  # short runs in a row; then the role is given up
    num_kills: int = 25  # in a row, each after a short run; then too
    end_by_themselves_secs: float = 15.0  # how long actors may take to exit after the learner has ended
    stop_actors_secs: float = 4.0  # from SIGTERM to SIGKILL
    stop_learner_secs: float = 8.0  # it saves a checkpoint
    # all roles; replay servers get what the others leave of it, because saving a large replay takes long
    stop_secs: float = 19.0
    second_signal_secs: float = SECOND_SIGNAL_SECS
    old_error_secs: float = 10.0  # the error of a role that does not exit is shown after this time
    old_status_secs: float = 10.0
    live_interval_secs: float = 1.0
    plain_interval_secs: float = 10.0


DEFAULT_TIMING = Timing()


class Restarts:
    """Back-off of one role: how long to wait before its restart, or to give it up.

    The wait doubles with every restart and is reset after a long run. Several short runs in a row end the restarts.
    """

    def __init__(self, timing: Timing):
        self._timing = timing
        self._next_secs = timing.first_restart_secs
        self._num_short_lives = 0
        self._num_kills = 0

    def secs_until_next(self, lived_secs: float, was_killed: bool = False) -> float | None:
        """Returns the wait in seconds after a run of `lived_secs`, or None to give up. Call it once per exit.

        A role that was killed from outside (`was_killed`: SIGKILL, SIGTERM) is not at fault: it waits less and is given
        up much later. It is given up at all because the kernel may be killing it for its memory use.
        """
        timing = self._timing
        if was_killed:
            self._num_kills = self._num_kills + 1 if lived_secs < timing.short_life_secs else 0
            return None if self._num_kills >= timing.num_kills else timing.first_restart_secs
        self._num_short_lives = self._num_short_lives + 1 if lived_secs < timing.short_life_secs else 0
        if self._num_short_lives >= timing.num_short_lives:
            return None
        if lived_secs >= timing.forgiven_after_secs:
            self._next_secs = timing.first_restart_secs
        secs = self._next_secs
        self._next_secs = min(2 * secs, timing.longest_restart_secs)
        return secs


def describe_exit(returncode: int) -> str:
    """Returns what to write after the role's name: `crashed with exit code 1`, `was killed by SIGKILL`."""
    if returncode == 0:
        return "ended"
    if returncode in FINAL_CODES:
        return f"ended with exit code {returncode}: {FINAL_CODES[returncode]}"
    if returncode == ExitCode.UNAVAILABLE:
        return f"ended with exit code {returncode}: a peer was unreachable or its port taken"
    if returncode in STOPPED_CODES:
        return f"was stopped by {signal.Signals(returncode - 128).name}"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-returncode).name}"
    return f"crashed with exit code {returncode}"
