"""How collecting goes, as the learner and TensorBoard are told."""

from __future__ import annotations

import secrets
import time

import numpy as np

from actorlearner.cluster import Cluster
from actorlearner.collecting.collector import Collector
from actorlearner.reports import CollectReport, NewestReport
from actorlearner.runtime.telemetry import Events, Rate


class Progress:
    """Reports the collect actor's counts to the learner and TensorBoard."""

    def __init__(self, cluster: Cluster, reporter: NewestReport, events: Events):
        self._actor = secrets.randbits(62)
        self._task = cluster.task
        self._reporter = reporter
        self._events = events
        self._rate = Rate()
        self._reported_at = self._shown_at = time.monotonic()

    def is_due(self, interval_secs: float) -> bool:
        return time.monotonic() - self._reported_at >= interval_secs

    def await_sent(self, timeout_secs: float) -> None:
        """Blocks until the learner's queue has the last report, for at most `timeout_secs` seconds."""
        self._reporter.await_sent(timeout_secs)

    def report(self, collector: Collector, train_step: int, events_interval_secs: float) -> None:
        """Passes the counts so far to the sending thread."""
        self._reported_at = time.monotonic()
        rate = self._rate.update(collector.environment_steps)
        average_return = float(np.mean(collector.recent_returns)) if collector.recent_returns else float("nan")
        self._reporter.put(
            CollectReport(
                actor=self._actor,
                task=self._task,
                environment_steps=collector.environment_steps,
                episodes=collector.episodes,
                environment_crashes=collector.environment_crashes,
                average_return=average_return,
                blocked_secs=collector.blocked_secs,
                wall_secs=time.monotonic() - collector.began_at,
            )
        )
        if self._reported_at - self._shown_at >= events_interval_secs:
            self._shown_at = self._reported_at
            scalars = {
                "EnvironmentSteps": collector.environment_steps,
                "EnvironmentStepsPerSec": rate,
                "NumberOfEpisodes": collector.episodes,
                "EnvironmentCrashes": collector.environment_crashes,
                "BlockedSecs": collector.blocked_secs,
            }
            if collector.recent_returns:
                scalars["AverageReturn"] = average_return
            self._events.write(train_step, scalars)
