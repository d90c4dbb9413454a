"""Statistics over a few seeds: interquartile mean and bootstrap interval.

Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (interquartile mean,
percentile bootstrap over seeds).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
_NUM_EXACT = 6  # up to this many values all resamples are enumerated: 6 ** 6 = 46,656
_NEAR = 0.05  # relative distance by which a run's last evaluation may miss a step

Evaluation = Mapping[str, Any]


def interquartile_mean(values: Any) -> Any:
    """Returns the mean after a quarter of the values, rounded down, is cut from each end.

    So for 1 to 3 values it is the mean, for 5 the mean of the middle three. Along the last axis: [..., N] -> [...].
    """
    ordered = np.sort(np.asarray(values, float), axis=-1)
    num_values = ordered.shape[-1]
    cut = num_values // 4
    return ordered[..., cut : num_values - cut].mean(-1)


def bootstrap_interval(values: Sequence[float], statistic: Any = interquartile_mean) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of `statistic`; deterministic.

    For up to six values it is exact: all resamples are enumerated. For two or three values it is their range, because
    the resamples of only the lowest value make up 1/4 or 1/27 of all.

    Args:
      values: At least one.
      statistic: Takes [..., N] and returns [...].
    """
    array = np.asarray(values, float)
    results = statistic(array[_resamples(len(array))])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(results, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


@functools.lru_cache(maxsize=32)
def _resamples(num_values: int) -> np.ndarray:
    """Returns indices, [resamples, num_values]."""
    if num_values <= _NUM_EXACT:
        return np.array(list(itertools.product(range(num_values), repeat=num_values)))
    return np.random.default_rng(0).integers(num_values, size=(NUM_RESAMPLES, num_values))


def read_return(evaluations: Sequence[Evaluation], step: float, clock: str) -> Optional[float]:
    """Returns the average return at `step`, interpolated between the evaluations on both sides of it.

    If a run's last evaluation is less than 5 % short of `step`, its return is used.

    Args:
      evaluations: Evaluations of one run, by train step.
      step: Step on the clock.
      clock: "environment_steps" or "train_step".

    Returns:
      The return; None if the run has not come so far, or had no evaluation before it.
    """
    # of equal steps the latest
    returns = {evaluation[clock]: evaluation["average_return"] for evaluation in evaluations}
    steps = sorted(returns)
    if not steps or step < steps[0] or steps[-1] < (1 - _NEAR) * step:
        return None
    return float(np.interp(step, steps, [returns[at] for at in steps]))


def describe_values(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, interquartile mean with its interval, and minimum of at least one value."""
    low, high = bootstrap_interval(values)
    return {
        "mean": float(np.mean(values)),
        "interquartile_mean": float(interquartile_mean(values)),
        "interval": [low, high],
        "lowest": float(min(values)),
    }
