"""What the drill takes for a broken promise."""

from __future__ import annotations

import json
import threading
import time

import pytest

from actorlearner.tools.drill import Outcome, Run, _find_miscounts, _judge_held, _judge_training_on, _ratio_error

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


def write_status(run, **values):
    (run.root_dir / "status.tmp").write_text(json.dumps(values))
    (run.root_dir / "status.tmp").rename(run.root_dir / "status.json")


def judge_training_on(run, account, train_step, train_step_time):
    """Returns what the drill finds broken when this is the learner's word a second after its server's death."""
    killed_at, outcome = time.time() - 1.0, Outcome("a dead server")
    write_status(run, time=time.time(), train_step=train_step, train_step_time=killed_at + train_step_time)
    thread = threading.Thread(
        target=_judge_training_on, args=(run, outcome, {"train_step": 700, "replay": account}, killed_at), daemon=True
    )
    thread.start()
    thread.join(timeout=0.5)
    if thread.is_alive():  # it waits for the learner to train after all
        write_status(run, time=time.time(), train_step=701, train_step_time=killed_at + 2.5)
        thread.join(timeout=30.0)
    assert not thread.is_alive()
    return outcome.broken


def test_a_learner_that_trains_on_without_its_server_is_told_from_one_that_only_waits(run):
    """A learner that stood still until its server was back would else recover as fast."""
    assert judge_training_on(run, ACCOUNT, 760, 0.3) == []
    (broken,) = judge_training_on(run, ACCOUNT, 760, -0.1)
    assert broken == "trained on after 2.5 s, promised 1 s"


def test_a_learner_whose_account_allows_no_train_step_need_not_make_one(run):
    """Samples per insert are exact, also while no inserts can come."""
    assert judge_training_on(run, {**ACCOUNT, "ahead": -6_300.0}, 700, -0.1) == []


@pytest.mark.parametrize(("holds", "is_broken"), [("1,000", False), ("999", True)])
def test_a_server_that_holds_less_than_its_last_checkpoint_is_named(run, holds, is_broken):
    """It answers again all the same, and actors and learner go on with what is left."""
    checkpoint = run.root_dir / "checkpoints" / "replay" / "500-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "about.json").write_text(json.dumps({"time": 2.0, "items": {"experience": 1_000, "stream": 4}}))
    (run.root_dir / "logs").mkdir()
    (run.root_dir / "logs" / "replay-server-0.log").write_text(
        f"--- 2026 process 7: replay-server\nI 12:00:00 the replay holds 0 in 'stream', {holds} in 'experience'\n"
    )
    outcome = Outcome("a dead server")
    _judge_held(run, outcome, run.saved_items(), time.monotonic())
    assert bool(outcome.broken) == is_broken
