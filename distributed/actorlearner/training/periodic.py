"""What is done between two compiled calls, each at its own interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Optional


class Reached(NamedTuple):
    """What one compiled call came to.

    Attributes:
      before, step: The train steps before and after it; equal where no update was made.
      scalars: The last update's; None where data ran out before the call's end.
    """

    before: int
    step: int
    scalars: Optional[Mapping[str, float]]

    def passes(self, interval: int) -> bool:
        """Returns whether a multiple of `interval` train steps was reached; never where the interval is 0."""
        return interval > 0 and self.step // interval > self.before // interval


Action = Callable[[Reached], None]
"""Called after each compiled call."""


class EverySteps:
    """Does something whenever a multiple of so many train steps is reached."""

    def __init__(self, interval: int, do: Action):
        self._interval = interval
        self._do = do

    def __call__(self, reached: Reached) -> None:
        if reached.passes(self._interval):
            self._do(reached)


class EverySecs:
    """Does something after the first call that made an update, and then at most every so many seconds."""

    def __init__(self, secs: float, do: Action, clock: Callable[[], float] = time.monotonic):
        self._secs = secs
        self._do = do
        self._clock = clock
        self._done_at = -math.inf

    def __call__(self, reached: Reached) -> None:
        now = self._clock()
        if reached.step > reached.before and now - self._done_at >= self._secs:
            self._done_at = now
            self._do(reached)
