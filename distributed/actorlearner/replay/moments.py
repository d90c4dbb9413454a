"""Moments of observations, from which running statistics are updated; computed where the learner receives data."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean of `count` observations and sum of their squared distances from it, for each component."""

    count: int
    mean: np.ndarray
    squares: np.ndarray


def moments_of(observations: np.ndarray) -> Moments:
    """Returns the moments of observations [N, ...], in double precision."""
    wide = observations.astype(np.float64)
    mean = wide.mean(axis=0) if len(wide) else np.zeros(wide.shape[1:])
    return Moments(len(wide), mean, np.square(wide - mean).sum(axis=0))
