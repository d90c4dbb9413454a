"""What the drill takes for a broken promise."""

from __future__ import annotations

import pytest

from actorlearner.tools.drill import Run, _find_miscounts, _ratio_error

ACCOUNT = {"samples": 3_072_000, "inserts": 97_408, "ahead": 2_560.0, "error_buffer": 6_400}  # of a run as it should be


@pytest.fixture
def run(tmp_path):
    run = Run("dqn_cartpole", tmp_path, [], seed=0)
    run.root_dir.mkdir()
    (run.root_dir / "operative_config.gin").write_text("train.batch_size = 128\ntrain.eval_interval = 1000\n"
        "train.collect_steps_per_iteration = 4\n")
    return run


@pytest.mark.parametrize(
    ("changed", "named"),
    [({}, []), ({"samples": 32_000}, ["samples"]), ({"samples": 6_144_000}, ["samples"]),
     ({"inserts": 124_000}, ["inserts"]), ({"inserts": 0}, ["inserts"])],
)
def test_counts_that_were_lost_or_doubled_are_named(run, changed, named):
    """The account works itself back to the ratio from wrong counts as well: it alone would always fit."""
    status = {"train_step": 24_000, "environment_steps": 102_286, "replay": {**ACCOUNT, **changed}}
    found = _find_miscounts(run, status)
    assert len(found) == len(named)
    assert all(name in line for name, line in zip(named, found))


def test_a_missing_account_is_not_taken_for_one_that_fits():
    """An unreadable status would else pass as a ratio that is exact."""
    assert _ratio_error({}) is None
    assert _ratio_error({"replay": ACCOUNT}) == 0.0
    assert _ratio_error({"replay": {**ACCOUNT, "ahead": -129_280.0}}) == pytest.approx(0.04)
