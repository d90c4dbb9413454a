"""What a sweep says of a few seeds, against values worked out by hand."""

import numpy as np
import pytest

from actorlearner.tools.sweeping.race import MIN_SEEDS, NUM_IN_A_ROW, find_beaten, p_value
from actorlearner.tools.sweeping.statistics import bootstrap_interval, describe_values, interquartile_mean, read_return

SEEDS = 4
STEPS = range(0, 1_000, 100)


def curve(level, spread=0.0, steps=STEPS):
    """Evaluations that rise by `level` a hundred steps, plus `spread`."""
    return [{"train_step": s, "environment_steps": 2 * s, "average_return": level * s / 100 + spread} for s in steps]


@pytest.mark.parametrize(
    ("values", "middle"),
    [
        ([3.0], 3.0),
        ([1.0, 2.0], 1.5),
        ([1.0, 2.0, 6.0], 3.0),  # a quarter of three, rounded down, is none
        ([0.0, 1.0, 3.0, 100.0], 2.0),
        ([5.0, 1.0, 2.0, 3.0, -90.0], 2.0),
        ([9.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 4.5),  # 1 and 2, 8 and 9 are cut
    ],
)
def test_the_interquartile_mean_cuts_a_quarter_from_each_end(values, middle):
    """One seed that fell must not decide a comparison, nor may more than a quarter be thrown away."""
    assert interquartile_mean(values) == pytest.approx(middle)


def test_the_interval_of_two_or_three_seeds_is_their_range():
    """An interval narrower than what was seen promises what nobody knows."""
    assert bootstrap_interval([4.0, 1.0]) == (1.0, 4.0)
    assert bootstrap_interval([4.0, 1.0, 2.0]) == (1.0, 4.0)
    assert bootstrap_interval([4.0]) == (4.0, 4.0)


def test_the_interval_of_five_seeds_is_the_exact_one():
    """Of 0 0 0 0 100 a resample has k hundreds with binomial odds, and k - 1 of its middle three are hundreds.

    P(k <= 2) is 0.942 and P(k <= 3) is 0.993, so 97.5 % of the resamples lie at or below k = 3: 2 / 3 of 100.
    """
    assert bootstrap_interval([0.0, 0.0, 100.0, 0.0, 0.0]) == pytest.approx((0.0, 200 / 3))


def test_the_interval_of_many_values_is_that_of_theory():
    """Past six values the resamples are drawn: 1.96 standard errors of the mean on each side."""
    values = np.random.default_rng(1).normal(10, 2, size=400).tolist()
    low, high = bootstrap_interval(values, lambda array: array.mean(-1))
    error = np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - 1.96 * error, np.mean(values) + 1.96 * error), abs=0.05)
    assert bootstrap_interval(values, lambda array: array.mean(-1)) == (low, high)


def test_a_description_has_every_figure_of_the_table():
    """Mean 26, middle three 3 4 5."""
    described = describe_values([4.0, 3.0, 5.0, 117.0, 1.0])
    assert (described["mean"], described["interquartile_mean"], described["lowest"]) == (26.0, 4.0, 1.0)
    assert described["interval"][0] <= 4.0 <= described["interval"][1]


def test_a_return_at_a_step_is_read_off_the_curve():
    """Actors run on while an evaluation is queued, so no run is evaluated at 50,000 environment steps exactly."""
    evaluations = [
        {"train_step": 0, "environment_steps": 100, "average_return": 9.0},
        {"train_step": 10, "environment_steps": 100, "average_return": 1.0},  # nobody had reported in between
        {"train_step": 20, "environment_steps": 200, "average_return": 3.0},
    ]
    assert read_return(evaluations, 125, "environment_steps") == pytest.approx(1.5)
    assert read_return(evaluations, 10, "train_step") == 1.0
    assert read_return(evaluations, 209, "environment_steps") == 3.0  # less than 5 % short of it
    assert read_return(evaluations, 220, "environment_steps") is None
    assert read_return(evaluations, 50, "environment_steps") is None
    assert read_return([], 50, "train_step") is None


def test_students_t_is_that_of_the_tables():
    """-1 -2 -3: t = -2 / (1 / sqrt 3), and with two degrees of freedom P = 1/2 - t / (2 sqrt(2 + t^2)) = 0.0371."""
    assert p_value(np.array([-1.0, -2.0, -3.0])) == pytest.approx(0.0371, abs=1e-4)
    assert p_value(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - 0.0371, abs=1e-4)
    assert p_value(np.array([2.0, 0.0, -2.0, 1.0, -1.0])) == pytest.approx(0.5, abs=1e-3)


def test_a_variant_that_is_clearly_worse_with_every_seed_is_beaten():
    """Its trials take hours that the others need."""
    curves = {
        "good": {seed: curve(10, seed) for seed in range(SEEDS)},
        "bad": {seed: curve(1, seed / 2) for seed in range(SEEDS)},
        "nearly as good": {seed: curve(10, 2 * seed - 3.4) for seed in range(SEEDS)},
    }
    beaten = find_beaten(curves, "train_step")
    assert list(beaten) == ["bad"]
    assert (beaten["bad"].step, beaten["bad"].num_seeds) == (900, SEEDS)
    assert beaten["bad"].interval[0] <= beaten["bad"].difference <= beaten["bad"].interval[1] < 0
    assert str(beaten["bad"]).startswith("beaten at step 900: -8")


def test_nobody_is_beaten_before_three_seeds_of_all_are_evaluated_at_the_same_step():
    """Two seeds say nothing of a spread, and a variant whose third has just begun is not to be judged by its start."""
    good = {seed: curve(10, seed) for seed in range(SEEDS)}
    bad = {seed: curve(1, seed / 2) for seed in range(MIN_SEEDS - 1)}
    assert find_beaten({"good": good, "bad": bad}, "train_step") == {}
    bad[7] = curve(1)  # a seed that the other has not
    assert find_beaten({"good": good, "bad": bad}, "train_step") == {}
    bad[2] = curve(1, steps=range(0, 100 * (NUM_IN_A_ROW - 1), 100))
    assert find_beaten({"good": good, "bad": bad}, "train_step") == {}
    bad[2] = curve(1, 0.4, steps=range(0, 600, 100))
    assert find_beaten({"good": good, "bad": bad}, "train_step")["bad"].step == 500


def test_equal_variants_are_seldom_beaten():
    """The bootstrap interval of three differences alone drops one of two equal variants in nine sweeps of ten."""
    rng = np.random.default_rng(0)
    num_beaten = 0
    for _ in range(100):
        noise = rng.normal(size=(2, 3, 10))
        for step in range(1, 10):
            noise[..., step] = 0.8 * noise[..., step - 1] + 0.6 * noise[..., step]
        num_beaten += any(
            find_beaten(
                {
                    str(variant): {
                        seed: [
                            {"train_step": step, "average_return": noise[variant, seed, step]}
                            for step in range(reached)
                        ]
                        for seed in range(3)
                    }
                    for variant in range(2)
                },
                "train_step",
            )
            for reached in range(1, 11)
        )
    assert num_beaten <= 6
