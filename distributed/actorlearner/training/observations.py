"""Running statistics of observations: each one that the replay takes in is counted once."""

from __future__ import annotations

import concurrent.futures
import contextlib

import tensorflow as tf
from tf_agents.agents import tf_agent

from actorlearner.replay.base import BatchSource
from actorlearner.runtime.health import beat
from actorlearner.runtime.lifecycle import Stop, wait_until


class Observations:
    """Counts what the source takes in into the agent's `observation_statistics`; does nothing where it has none.

    Make it before the source's draws are compiled and before its `restore`.
    """

    def __init__(self, agent: tf_agent.TFAgent, source: BatchSource):
        self._statistics = getattr(agent, "observation_statistics", None)
        self._source = source
        self.are_counted = self._statistics is not None
        if self.are_counted:
            source.count_observations()

    def count(self) -> None:
        """Counts in what came since the last call; not while a compiled call is under way."""
        if self._statistics is not None:
            for moments in self._source.take_moments():  # one by one, because their sum would round differently
                self._statistics.update(moments)

    def look_first(self, replay: str, stop: Stop, patience_secs: float) -> None:
        """Returns when the source has taken observations in, before the first update; others' items are left out.

        Args:
          replay: Where they come from, in words.
          stop: Ends the wait.
          patience_secs: Longest wait.

        Raises:
          Stopped: `stop` was set.
          RoleError: None arrived within the deadline (UNAVAILABLE).
        """
        caller = concurrent.futures.ThreadPoolExecutor(1, "first look")  # a draw may block inside Reverb

        def poll() -> bool:
            future = caller.submit(self._source.look_first)
            while not future.done() and not stop.is_set():
                concurrent.futures.wait([future], timeout=1.0)
                beat()
            if not future.done():
                return False
            error = future.exception()
            if isinstance(error, tf.errors.InvalidArgumentError):
                if not self._source.leave_out(error):
                    raise error
            elif error is not None and not isinstance(error, tf.errors.OpError):
                raise error
            if error is not None:
                with contextlib.suppress(tf.errors.OpError):  # the server is away; the next poll tries again
                    self._source.renew()
            return error is None

        wait_until(
            poll,
            lambda: f"{replay} to send the observations for normalisation: {self._source.describe()}",
            stop=stop,
            deadline_secs=patience_secs,
            setting="--peer_patience_secs",
        )
        caller.shutdown(wait=False)
        self.count()
