"""Race: finds beaten variants of a sweep, so that the machine's time goes to the others.

Variants run seed by seed, and are compared at the evaluations that all of them have reached. Source: Maron and Moore
1994, "Hoeffding Races" (drop what is significantly worse than the best, continue with the rest), with paired
differences over seeds instead of Hoeffding's bound, which would need far more runs.

A bootstrap of three differences is their range: with ten evaluations, it alone would drop one of two equal variants in
nine of ten sweeps (simulated: normal returns, correlated by 0.8 from one evaluation to the next). So a variant counts
as beaten only if Student's t of the same differences, corrected for the number of comparisons, agrees, at three
evaluations in a row: then it is one sweep in sixty, and a variant that is worse by four standard deviations of a seed
is still dropped in nearly nine of ten sweeps, after three seeds.
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
"""Number of latest evaluations at each of which a variant must be beaten."""


@dataclasses.dataclass(frozen=True)
class Defeat:
    """Why a variant is stopped: its return minus the best variant's, over the same seeds.

    Attributes:
      step: Step of the newest evaluation, on the sweep's clock.
      best: The variant that beats it.
      num_seeds: Number of seeds compared.
      difference: Mean difference.
      interval: 95 % bootstrap interval of the difference.
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
    """Returns the beaten variants, each with its `Defeat`.

    Args:
      curves: Evaluations by seed, for each variant still in the race.
      clock: What steps count: "environment_steps" or "train_step".
      num_in_a_row: Number of latest evaluations at each of which it must be beaten.
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
    """Returns each variant's returns at `step`, for the seeds that all have reached it; None if these are too few."""
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
    """Returns the one-sided p-value of Student's t-test: the probability of a mean this low if the true mean is 0."""
    num, mean, spread = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    if not spread:
        return 0.0 if mean < 0 else 1.0
    # With t = sqrt(freedom) tan(angle), the density of the angle is proportional to cos(angle) ** (freedom - 1).
    freedom = num - 1
    angles = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    angle = math.atan(mean / (spread / math.sqrt(num)) / math.sqrt(freedom))
    return float(density[angles <= angle].sum() / density.sum())
