"""Moments of observations: what running statistics are made of, counted where the learner takes data in."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of `count` observations: their mean, and the sum of their squared distances from it, for each component."""

    count: int
    mean: np.ndarray
    squares: np.ndarray


def moments_of(observations: np.ndarray) -> Moments:
    """Returns the moments of observations [N, ...], in double precision."""
    wide = observations.astype(np.float64)
    mean = wide.mean(axis=0) if len(wide) else np.zeros(wide.shape[1:])
    return Moments(len(wide), mean, np.square(wide - mean).sum(axis=0))
