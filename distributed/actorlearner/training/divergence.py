"""Ends training that has diverged, naming the train step and the variable that is not finite."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Optional

import tensorflow as tf

from actorlearner.runtime.lifecycle import ExitCode, RoleError, find_reason


def all_finite(variables: Sequence[tf.Variable]) -> tf.Tensor:
    floating = [variable for variable in variables if variable.dtype.is_floating]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(variable)) for variable in floating])


def find_not_finite(variables: Sequence[tf.Variable]) -> Optional[str]:
    """Returns the name of the first float variable that holds a NaN or an infinity; None if none does."""
    for variable in variables:
        if variable.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(variable))):
            return f"'{variable.name.split(':')[0]}' {variable.shape.as_list()}"
    return None


def require_finite(step: int, scalars: Optional[Mapping[str, float]], variables: Sequence[tf.Variable]) -> None:
    """Checks that the last update's scalars are finite.

    Raises:
      Diverged: One is not; the message names the train step, the scalar and the first bad variable.
    """
    for name, value in (scalars or {}).items():
        if not math.isfinite(value):
            raise diverged(step, f"{name} = {value}", variables)


def refuse_not_finite(step: int, error: tf.errors.InvalidArgumentError, variables: Sequence[tf.Variable]) -> None:
    """Raises as `require_finite` if `error` is a failed numeric check; returns otherwise."""
    if re.search(r"\b(nan|inf)\b", error.message, re.IGNORECASE):
        raise diverged(step, find_reason(error), variables) from error


class Diverged(RoleError):
    """A loss or a weight is not finite."""


def diverged(step: int, what: str, variables: Sequence[tf.Variable]) -> Diverged:
    variable = find_not_finite(variables)
    return Diverged(
        f"at train step {step:,} {what}: training has diverged"
        + (f"; the first variable that is not finite is {variable}" if variable else "")
        + ". The last good checkpoint is kept. Lower the learning rate, clip gradients, or check the rewards and "
        "observations; then start again with the same --root_dir to resume from it.",
        ExitCode.DATA,
    )
