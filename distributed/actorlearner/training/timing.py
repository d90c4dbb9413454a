"""Shares of the learner's time, and when weights are published."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class TimeShares:
    """Shares of the learner's time: compiled calls, waiting for data, taking data in, and the rest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at = clock()
        self._secs = {"computing": 0.0, "waiting": 0.0, "ingesting": 0.0}

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return self._measure("computing")

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return self._measure("waiting")

    def ingesting(self) -> contextlib.AbstractContextManager[None]:
        return self._measure("ingesting")

    @contextlib.contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._secs[name] += self._clock() - start

    def take(self) -> dict[str, float]:
        """Returns the shares since the last call, each from 0 to 1.

        They are `computing_share`, `waiting_share`, `ingesting_share`, and `between_share` for the rest.
        """
        now = self._clock()
        total = max(now - self._began_at, 1e-9)
        shares = {f"{name}_share": secs / total for name, secs in self._secs.items()}
        self._began_at = now
        self._secs = dict.fromkeys(self._secs, 0.0)
        return {**shares, "between_share": max(0.0, 1.0 - sum(shares.values()))}


class PublishInterval:
    """Tells when weights are due to be published: after at least so many train steps and so many seconds."""

    def __init__(self, train_steps: int, secs: float, clock: Callable[[], float] = time.monotonic):
        self._train_steps = train_steps
        self._secs = secs
        self._clock = clock
        self.begin(0)

    def begin(self, step: int) -> None:
        """Starts the interval: weights are published now, at train step `step`."""
        self._published, self._published_at = step, self._clock()

    def is_over(self, step: int) -> bool:
        """Returns whether both limits have passed at train step `step`."""
        return step - self._published >= self._train_steps and self._clock() - self._published_at >= self._secs
