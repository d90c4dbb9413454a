"""Several environments stepped in turn with one batch of actions; a crashed one is replaced by a fresh one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Optional

from tf_agents.environments import py_environment
from tf_agents.trajectories import time_step as ts

MAX_CRASHES_WITHOUT_STEP = 3


class EnvironmentBatch:
    """Steps `num_environments` environments, each with its own seed, and outlives their crashes."""

    def __init__(
        self,
        make_environment: Callable[[int], py_environment.PyEnvironment],
        num_environments: int,
        seeds: Iterator[int],
    ):
        """Makes the environments.

        Args:
          make_environment: Makes one environment from a seed.
          num_environments: How many.
          seeds: One for each environment, and for each fresh one after a crash.
        """
        self._make_environment = make_environment
        self._seeds = seeds
        self._environments = [make_environment(next(seeds)) for _ in range(num_environments)]
        self._crashes_in_a_row = [0] * num_environments
        self.num_crashes = 0

    def __len__(self) -> int:
        return len(self._environments)

    def reset(self) -> list[ts.TimeStep]:
        """Returns the first time step of a new episode in each environment."""
        return [self._reset(index) for index in range(len(self))]

    def step(self, index: int, action: Any) -> Optional[ts.TimeStep]:
        """Returns what environment `index` answered, or None when it crashed: then `restart` it.

        After a last time step, the next call begins a new episode and ignores its action.
        """
        try:
            time_step = self._environments[index].step(action)
        except Exception:  # whatever an environment raises, the actor goes on
            logging.exception("environment %d crashed in step", index)
            return None
        self._crashes_in_a_row[index] = 0
        return time_step

    def restart(self, index: int) -> ts.TimeStep:
        """Returns the first time step of a fresh environment in the place of the crashed one.

        Raises:
          RuntimeError: It crashed again and again without one good step.
        """
        self.num_crashes += 1
        self._crashes_in_a_row[index] += 1
        if self._crashes_in_a_row[index] > MAX_CRASHES_WITHOUT_STEP:
            raise RuntimeError(
                f"environment {index} crashed {self._crashes_in_a_row[index]} times without one good step; see the log"
            )
        try:
            self._environments[index].close()
        except Exception:
            logging.warning("the crashed environment %d did not close", index)
        self._environments[index] = self._make_environment(next(self._seeds))
        logging.warning("environment %d was replaced by a fresh one; %d crashes so far", index, self.num_crashes)
        return self._reset(index)

    def _reset(self, index: int) -> ts.TimeStep:
        try:
            return self._environments[index].reset()
        except Exception:
            logging.exception("environment %d crashed in reset", index)
            return self.restart(index)

    def close(self) -> None:
        for environment in self._environments:
            environment.close()
