"""Race: which variants of a sweep are beaten, so that the machine's time goes to the others.

Variants run seed by seed, and are compared at the evaluations that all of them have reached. Source: Maron and Moore
1994, "Hoeffding Races" (drop what is worse than the best with confidence, go on with the rest), with paired differences
over seeds in place of Hoeffding's bound, which needs far more runs than anyone trains.

A bootstrap of three differences is their range: of two equal variants with ten evaluations it alone would drop one in
nine sweeps of ten (simulated: normal returns, correlated by 0.8 from one evaluation to the next). A variant is beaten
only where Student's t of the same differences, shared between the comparisons, agrees, at three evaluations in a row:
then it is one sweep in sixty, and a variant that is worse by four standard deviations of a seed is still dropped in
nearly nine sweeps of ten, after three seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np

from actorlearner.tools.sweeping.statistics import CONFIDENCE, Evaluation, bootstrap_interval, read_return

MIN_SEEDS = 3
NUM_IN_A_ROW = 3
"""Evaluations, the newest among them, at each of which a variant must be beaten."""


@dataclasses.dataclass(frozen=True)
class Defeat:
    """Why a variant is stopped: its return less the best one's, over the same seeds.

    Attributes:
      step: Of the newest evaluation, on the sweep's clock.
      best: The variant that beats it.
      num_seeds: Compared.
      difference: The mean.
      interval: Its 95 % bootstrap interval.
    """

    step: int
    best: str
    num_seeds: int
    difference: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"beaten at step {self.step:,}: {self.difference:,.4g} ({low:,.4g} to {high:,.4g}) "
            f"against {self.best}, {self.num_seeds} seeds"
        )


def find_beaten(
    curves: Mapping[str, Mapping[int, Sequence[Evaluation]]], clock: str, num_in_a_row: int = NUM_IN_A_ROW
) -> dict[str, Defeat]:
    """Returns the variants that are beaten, each with why.

    Args:
      curves: Of the variants still in the race: evaluations by seed.
      clock: On which they are compared, "environment_steps" or "train_step".
      num_in_a_row: Evaluations at each of which it must be beaten.
    """
    if len(curves) < 2:
        return {}
    reference = max((curve for curve in next(iter(curves.values())).values()), key=len, default=())
    reached = []
    for step in sorted({int(evaluation[clock]) for evaluation in reference}):
        returns = _returns_at(curves, step, clock)
        if returns is not None:
            reached.append((step, returns))
    newest = reached[-num_in_a_row:]
    if len(newest) < num_in_a_row:
        return {}
    found = [_beaten_at(step, returns) for step, returns in newest]
    return {variant: defeat for variant, defeat in found[-1].items() if all(variant in defeats for defeats in found)}


def _returns_at(
    curves: Mapping[str, Mapping[int, Sequence[Evaluation]]], step: int, clock: str
) -> Optional[dict[str, np.ndarray]]:
    """Returns each variant's returns at `step`, for the seeds that all of them have there; None where these are few."""
    returns: dict[str, dict[int, float]] = {}
    for variant, seeds in curves.items():
        read = {seed: read_return(curve, step, clock) for seed, curve in seeds.items()}
        returns[variant] = {seed: value for seed, value in read.items() if value is not None}
    shared = sorted(set.intersection(*map(set, returns.values())))
    if len(shared) < MIN_SEEDS:
        return None
    return {variant: np.array([of_seeds[seed] for seed in shared]) for variant, of_seeds in returns.items()}


def _beaten_at(step: int, returns: Mapping[str, np.ndarray]) -> dict[str, Defeat]:
    best = max(returns, key=lambda variant: float(returns[variant].mean()))
    defeats = {}
    for variant, values in returns.items():
        differences = values - returns[best]
        if variant == best or p_value(differences) > (1 - CONFIDENCE) / 2 / (len(returns) - 1):
            continue
        interval = bootstrap_interval([float(value) for value in differences], _mean)
        if interval[1] < 0:
            defeats[variant] = Defeat(step, best, len(values), float(differences.mean()), interval)
    return defeats


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def p_value(differences: np.ndarray) -> float:
    """Returns how probable a mean this low is where the true one is zero: Student's t, one-sided."""
    num, mean, spread = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    if not spread:
        return 0.0 if mean < 0 else 1.0
    # With t = sqrt(freedom) tan(angle), the density of the angle is proportional to cos(angle) ** (freedom - 1).
    freedom = num - 1
    angles = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    angle = math.atan(mean / (spread / math.sqrt(num)) / math.sqrt(freedom))
    return float(density[angles <= angle].sum() / density.sum())
