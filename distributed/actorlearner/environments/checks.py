"""Checks that an environment's values fit its specs, and refuses those that do not, by name.

A leaf is one array of an observation, or the reward. A leaf of another shape is refused. One of another type is
converted if no value changes by more than rounding. That holds for every step; the first steps of each environment are
also compared with the bounds of their spaces.
"""

from __future__ import annotations

import logging
from typing import Any

import gym
import numpy as np
import tree
from tf_agents.environments import gym_wrapper, py_environment, wrappers
from tf_agents.trajectories import StepType

NUM_FULL_CHECKS = 100
"""Number of first time steps of each environment that are also compared with the bounds of its spaces."""

_NUMBERS = "biuf"  # numpy's kinds: bool, int, unsigned int, float


class UnfitData(ValueError):
    """An environment returned a value that its specs do not allow; the message has environment, leaf and value."""


class NotFinite(UnfitData):
    """An environment returned a NaN or an infinity; the message has the environment and the first bad leaf."""


def fit(index: int, name: str, value: Any, spec: Any) -> np.ndarray:
    """Returns `value` as an array of the spec's shape and type.

    Args:
      index: Index of the environment, for the message.
      name: Name of the leaf, for the message.
      value: What the environment returned.
      spec: Array spec of the leaf.

    Raises:
      UnfitData: It has another shape, or numbers that the spec's type cannot hold.
    """
    if isinstance(value, np.ndarray) and value.dtype == spec.dtype and value.shape == spec.shape:
        return value
    try:
        given = np.asarray(value)
    except ValueError:  # parts of unequal lengths
        raise _unfit(index, name, f"{type(value).__name__} {value!r:.100}", spec, _hint(value)) from None
    if given.dtype.kind not in _NUMBERS:
        raise _unfit(index, name, f"{type(value).__name__} {value!r:.100}", spec, _hint(value))
    if given.shape != spec.shape:
        raise _unfit(index, name, f"{given.dtype}{list(given.shape)}", spec)
    if given.dtype == spec.dtype:
        return given
    with np.errstate(all="ignore"):
        converted = given.astype(spec.dtype)
    if not _is_same(given, converted):
        worst = given[~_equal(given, converted)].flat[0]
        raise _unfit(index, name, f"{worst} ({given.dtype}), which {converted.dtype} cannot hold", spec)
    return converted


def fit_observation(index: int, observation: Any, spec: Any) -> Any:
    """Returns the observation with the structure, shapes and types of its nested spec. See `fit`."""
    if not tree.is_nested(spec):
        return fit(index, "observation", observation, spec)
    try:
        leaves = tree.flatten_up_to(spec, observation, check_types=False)
    except (TypeError, ValueError) as error:
        raise UnfitData(
            f"environment {index} gave an observation of another structure{_hint(observation)} than its space, "
            f"{tree.map_structure(_say, spec)}: {str(error).splitlines()[0]} "
            "Correct the space, or what the environment returns."
        ) from None
    parts = zip(_leaf_names(spec), leaves, tree.flatten(spec))
    fitted = [fit(index, name, leaf, part) for name, leaf, part in parts]
    return tree.unflatten_as(spec, fitted)


def fit_flag(index: int, done: Any) -> bool:
    """Returns an environment's `done` as a bool.

    Raises:
      UnfitData: It is neither a bool nor one of the numbers 0 and 1.
    """
    is_scalar = isinstance(done, (bool, np.bool_, int, np.integer)) or (isinstance(done, np.ndarray) and not done.shape)
    if is_scalar and done in (0, 1):
        return bool(done)
    raise UnfitData(
        f"environment {index} gave done = {done!r:.100} ({type(done).__name__}) where gym says True or False. "
        "Let its step return bool(...) of a scalar."
    )


def is_truncated(info: Any) -> bool:
    """Returns whether a time limit ended the episode, as gym's `TimeLimit` and similar wrappers say in `info`."""
    return isinstance(info, dict) and bool(info.get("TimeLimit.truncated", False))


def unpack_step(index: int, answer: Any) -> Any:
    """Returns the four values of a gym environment's `step`.

    Raises:
      UnfitData: There are not four.
    """
    if isinstance(answer, (tuple, list)) and len(answer) == 4:
        return answer
    count = f"{len(answer)} values" if isinstance(answer, (tuple, list)) else type(answer).__name__
    raise UnfitData(
        f"environment {index}'s step gave {count} where gym 0.23 says 4: observation, reward, done, info. "
        "One written for gymnasium gives 5: let it return done = terminated or truncated, and "
        'info["TimeLimit.truncated"] = truncated.'
    )


def find_gym(environment: py_environment.PyEnvironment) -> gym_wrapper.GymWrapper | None:
    """Returns TF-Agents' innermost wrapper of a gym environment; None if it is not a gym environment."""
    while isinstance(environment, wrappers.PyEnvironmentBaseWrapper):
        environment = environment.wrapped_env()
    return environment if isinstance(environment, gym_wrapper.GymWrapper) else None


class CheckedGym(gym.Wrapper):
    """Checks a gym environment below TF-Agents' wrapper, which would cast any value."""

    def __init__(self, index: int, wrapper: gym_wrapper.GymWrapper):
        super().__init__(wrapper.gym)
        self._index = index
        self._observation_spec = wrapper.observation_spec()
        self._reward_spec = wrapper.reward_spec()

    def reset(self, **kwargs: Any) -> Any:
        return fit_observation(self._index, self.env.reset(**kwargs), self._observation_spec)

    def step(self, action: Any) -> tuple[Any, np.ndarray, bool, Any]:
        observation, reward, done, info = unpack_step(self._index, self.env.step(action))
        reward = fit(self._index, "reward", reward, self._reward_spec)
        if not np.isfinite(reward).all():  # TF-Agents would report a NaN as None
            raise NotFinite(f"environment {self._index} gave reward = {reward}")
        return (
            fit_observation(self._index, observation, self._observation_spec),
            reward,
            fit_flag(self._index, done),
            info,
        )


class BoundsCheck:
    """Compares the first time steps of each environment with the bounds of their spaces."""

    def __init__(self, num_environments: int, time_step_spec: Any):
        self.num_left = [NUM_FULL_CHECKS] * num_environments
        """Number of time steps of each environment that are still to be checked."""
        self._spec = time_step_spec
        self._names = _leaf_names(time_step_spec.observation)
        self._warned: set[str] = set()

    def begin(self, index: int) -> None:
        """Restarts the checks of the environment at `index`, because it was replaced."""
        self.num_left[index] = NUM_FULL_CHECKS

    def check(self, index: int, step_type: Any, discount: Any, observation: Any) -> None:
        """Checks that all values are within bounds; a float outside only warns, once for each leaf.

        Raises:
          UnfitData: A whole number is outside its space, or the step type or the discount is invalid.
        """
        self.num_left[index] -= 1
        if np.shape(step_type) or step_type not in (StepType.FIRST, StepType.MID, StepType.LAST):
            raise UnfitData(
                f"environment {index} gave step_type = {step_type!r}, expected 0, 1 or 2 (first, mid, last)."
            )
        if not (np.all(np.asarray(discount) >= 0) and np.all(np.asarray(discount) <= 1)):  # False for a NaN
            raise UnfitData(f"environment {index} gave discount = {discount!r}, expected 0 to 1.")
        for name, value, spec in zip(self._names, tree.flatten(observation), tree.flatten(self._spec.observation)):
            if not hasattr(spec, "minimum"):
                continue
            slack = 1e-6 * np.maximum(1.0, np.abs(value)) if spec.dtype.kind == "f" else 0
            outside = (value < spec.minimum - slack) | (value > spec.maximum + slack)
            if not outside.any():
                continue
            first = np.asarray(value)[outside].flat[0]
            if spec.dtype.kind != "f":
                raise _unfit(index, name, f"{first}", spec)
            if name not in self._warned and np.isfinite(first):
                self._warned.add(name)
                logging.warning("environment %d gave %s = %s, outside its space: %s", index, name, first, _say(spec))


def _leaf_names(spec: Any) -> list[str]:
    return ["/".join(map(str, ("observation", *path))) for path, _ in tree.flatten_with_path(spec)]


def _equal(given: np.ndarray, converted: np.ndarray) -> np.ndarray:
    if given.dtype.kind == "f" and converted.dtype.kind == "f":  # rounding is allowed, an infinity is not
        return np.isfinite(given) == np.isfinite(converted)
    if converted.dtype.kind == "f":
        return np.isfinite(converted)
    return (given == converted) & ((given < 0) == (converted < 0))


def _is_same(given: np.ndarray, converted: np.ndarray) -> bool:
    return bool(_equal(given, converted).all())


def _say(spec: Any) -> str:
    bounds = f" from {np.min(spec.minimum)} to {np.max(spec.maximum)}" if hasattr(spec, "minimum") else ""
    return f"{np.dtype(spec.dtype)}{list(spec.shape)}{bounds}"


def _hint(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        return " (an observation and an info, as in gymnasium; in gym 0.23 reset returns the observation alone)"
    return ""


def _unfit(index: int, name: str, given: str, spec: Any, hint: str = "") -> UnfitData:
    return UnfitData(
        f"environment {index} gave {name} = {given}{hint} where its space says {_say(spec)}. "
        "Correct the space, or what the environment returns."
    )
