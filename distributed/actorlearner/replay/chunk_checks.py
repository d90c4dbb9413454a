"""Checks whether an item of a replay's table can come from this experiment's actors. `chunks.py` defines a chunk.

An item of the right types may still end the run: a NaN, or a reward that overflows in the loss, reaches the weights; an
action that does not exist ends the compiled call. The server keeps the item, so each resume would end too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf
import tree

from actorlearner.runtime.row_checks import MAX_COUNT, MAX_MAGNITUDE, Between

MAX_OF_OWN = 16
"""Largest accepted chunk, as a multiple of this experiment's own: actors may have more environments."""

CLOCKS_SECS = 86_400.0
"""How far an actor's clock, which numbers its chunks, may be ahead of this one, in nanoseconds."""

_STAMP = Between(-1, MAX_COUNT)  # train step of the acting weights; -1: the random policy acted
_SAMPLES = Between(-MAX_MAGNITUDE, MAX_MAGNITUDE)
_STEP_TYPE = Between(0, 2)
_DISCOUNT = Between(0.0, 1.0)


def step_limits(step_spec: Any) -> list[Optional[Between]]:
    """Returns the limits of each leaf of a `Trajectory` step, in the order of `tree.flatten`; None: any value.

    Whole numbers keep their spec's bounds, because they index tables. Floats only have to be finite, and small enough
    that their square does not overflow, because many environments leave their bounds.
    """
    limits: list[Optional[Between]] = []
    for path, spec in tree.flatten_with_path(step_spec):
        field = str(path[0])
        if field in ("step_type", "next_step_type"):
            limits.append(_STEP_TYPE)
        elif field == "discount":
            limits.append(_DISCOUNT)
        elif spec.dtype.is_floating:
            limits.append(_SAMPLES)
        elif spec.dtype.is_integer and hasattr(spec, "minimum"):
            limits.append(Between(int(np.min(spec.minimum)), int(np.max(spec.maximum))))
        else:
            limits.append(None)
    return limits


def leaf_names(step_spec: Any) -> list[str]:
    """Returns each leaf's name for warnings, in the same order."""
    return ["/".join(map(str, path)) for path, _ in tree.flatten_with_path(step_spec)]


def is_chunk(leaves: Sequence[np.ndarray], signature: Any) -> bool:
    """Returns whether an item is a chunk: the signature's leaves, with equal numbers of environments and rows."""
    specs = tree.flatten(signature)
    if len(leaves) != len(specs) or not all(
        spec.dtype == leaf.dtype and spec.shape.is_compatible_with(leaf.shape) for spec, leaf in zip(specs, leaves)
    ):
        return False
    chunk = tree.unflatten_as(signature, leaves)
    shape = chunk["ends_run"].shape
    return (
        chunk["acted_at"].shape == shape[1:]
        and 0 < chunk["length"] <= shape[1]
        and all(leaf.shape[:2] == shape for leaf in tree.flatten(chunk["step"]))
    )


class ChunkCheck:
    """Checks items against what this experiment's chunks can hold. Thread-safe."""

    def __init__(self, step_spec: Any, max_rows: int):
        """Args:
        step_spec: Spec of one trajectory step.
        max_rows: Steps, of all environments together, in the largest chunk.
        """
        self._limits = step_limits(step_spec)
        self._names = leaf_names(step_spec)
        self._max_rows = max_rows

    def find_misfit(self, leaves: Sequence[np.ndarray], signature: Any) -> Optional[str]:
        """Returns why an item's leaves are not a chunk of this experiment, in words; None if they are one."""
        if not is_chunk(leaves, signature):
            return "its parts do not belong together"
        return self._find_untrue(tree.unflatten_as(signature, leaves))

    def _find_untrue(self, chunk: Mapping[str, Any]) -> Optional[str]:
        num_environments, num_rows = chunk["ends_run"].shape
        if num_environments * num_rows > self._max_rows:
            return f"its steps = {num_environments} x {num_rows:,}, expected at most {self._max_rows:,}"
        latest = time.time_ns() + int(CLOCKS_SECS * 1e9)
        if not 0 <= chunk["chunk"] <= latest:
            return (
                f"its number, a time in nanoseconds, = {chunk['chunk']}, expected 0 to {latest}: "
                "if it is an actor's, compare the clocks"
            )
        length = int(chunk["length"])
        misfit = _STAMP.find_misfit(chunk["acted_at"][:length])
        if misfit:
            return f"acted_at {misfit}"
        for name, limit, leaf in zip(self._names, self._limits, tree.flatten(chunk["step"])):
            misfit = limit.find_misfit(leaf[:, :length]) if limit else None
            if misfit:
                return f"{name} {misfit}"
        return None


def are_plausible(steps: Any, limits: Sequence[Optional[Between]]) -> tf.Tensor:
    """Returns whether each item of a batch is plausible, bool [B]; for compiled code.

    Args:
      steps: Nest of leaves [B, ...].
      limits: As `step_limits` returns them.
    """
    leaves = tree.flatten(steps)
    found = tf.ones([tf.shape(leaves[0])[0]], tf.bool)
    for leaf, limit in zip(leaves, limits):
        if limit is not None:
            least, most = (tf.constant(bound, leaf.dtype) for bound in _in_range(limit, leaf.dtype))
            fits = (leaf >= least) & (leaf <= most)  # False for a NaN
            found &= tf.reduce_all(tf.reshape(fits, [tf.shape(leaf)[0], -1]), axis=1)
    return found


def _in_range(limit: Between, dtype: tf.DType) -> tuple[float, float]:
    return max(limit.least, dtype.min), min(limit.most, dtype.max)
