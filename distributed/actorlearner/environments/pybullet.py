"""PyBullet environments, through TF-Agents' `suite_pybullet`: the same gym registry, with PyBullet's ids in it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings

import gin
import gym
from tf_agents.environments import py_environment

from actorlearner.environments.gym import GymEnvironment, make_registered

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")  # PyBullet imports pkg_resources and prints its build time
    from tf_agents.environments import suite_pybullet  # noqa: F401

    from actorlearner.environments import minitaur


@gin.configurable("pybullet_environment", module="actorlearner")
@dataclasses.dataclass(frozen=True)
class PybulletEnvironment(GymEnvironment):
    """Makes PyBullet environments, e.g. "MinitaurBulletEnv-v0". Attributes are those of `GymEnvironment`."""

    def make_environment(self, seed: int) -> py_environment.PyEnvironment:
        """Returns a new environment with a physics client of its own. See `GymEnvironment.make_environment`."""
        with contextlib.redirect_stdout(io.StringIO()):  # Minitaur prints its paths
            return make_registered(self.env_name, self.max_episode_steps, seed, self.wrap)

    def wrap(self, environment: gym.Env) -> gym.Env:
        """Returns the environment, made faster where its results stay the same. See `GymEnvironment.wrap`."""
        minitaur.speed_up(environment)
        return super().wrap(environment)
