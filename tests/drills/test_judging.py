"""What the drill takes for a broken promise."""

from __future__ import annotations

import json
import time

import pytest

from drills import run as drill
from drills.drilled_run import Run
from drills.judging import (
    SAVE_SECS,
    Outcome,
    find_doubled,
    find_miscounts,
    find_ratio_error,
    judge_held,
    judge_loss,
    judge_training_on,
    note_before,
)

ACCOUNT = {"samples": 3_072_000, "inserts": 97_408, "ahead": 2_560.0, "error_buffer": 6_400}  # of a run as it should be


@pytest.fixture
def run(tmp_path):
    run = Run("dqn_cartpole", tmp_path, [], seed=0)
    run.root_dir.mkdir()
    (run.root_dir / "operative_config.gin").write_text(
        "train.batch_size = 128\ntrain.collect_steps_per_iteration = 4\n"
    )
    return run


@pytest.mark.parametrize(("samples", "named"), [(3_072_000, []), (3_078_400, []), (3_078_401, ["samples"])])
def test_a_learners_own_replay_counts_its_samples_to_within_one_call(run, samples, named):
    """It saves both in one piece: more would be train steps that were made twice, or not."""
    with (run.root_dir / "operative_config.gin").open("a") as config:
        config.write("experiment.replay = @resident_replay()\ntrain.num_updates_per_call = 50\n")
    status = {"train_step": 24_000, "environment_steps": 102_286, "replay": {**ACCOUNT, "samples": samples}}
    found = find_miscounts(run, status)
    assert len(found) == len(named)
    assert all(name in line for name, line in zip(named, found))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({}, []), ({"samples": 32_000}, ["samples"]), ({"samples": 6_144_000}, ["samples"]),
     ({"inserts": 0}, ["inserts"])],
)
def test_counts_that_were_lost_are_named(run, changed, named):
    """The account works itself back to the ratio from wrong counts as well: it alone would always fit."""
    status = {"train_step": 24_000, "environment_steps": 102_286, "replay": {**ACCOUNT, **changed}}
    found = find_miscounts(run, status)
    assert len(found) == len(named)
    assert all(name in line for name, line in zip(named, found))


@pytest.mark.parametrize(
    ("process", "restored", "num_doubled", "is_named"),
    [(8, 22_000, 0, False), (8, 22_000, 30_000, True), (8, 14_000, 30_000, False), (7, 14_000, 30_000, True)],
    ids=["as it should be", "doubled", "collected for steps that are made again", "same learner"],
)
def test_inserts_that_were_counted_twice_are_named(run, process, restored, num_doubled, is_named):
    """The account works itself back to the ratio from wrong counts as well: later it would fit."""
    (run.root_dir / "logs").mkdir()
    log = f"--- 2026-11-23 07:00:00 process 8: learner\nI 12:00:00 restored {run.root_dir}/ckpt-{restored}\n"
    (run.root_dir / "logs" / "learner-0.log").write_text(log)
    after = {"process": process, "replay": {**ACCOUNT, "ahead": 2_560.0 + 32 * num_doubled}}
    assert bool(find_doubled(run, {"process": 7, "train_step": 24_000}, after)) == is_named


def test_a_missing_account_is_not_taken_for_one_that_fits():
    """An unreadable status would else pass as a ratio that is exact."""
    assert find_ratio_error({}) is None
    assert find_ratio_error({"replay": ACCOUNT}) == 0.0
    assert find_ratio_error({"replay": {**ACCOUNT, "ahead": -129_280.0}}) == pytest.approx(0.04)


KILLED_AT = 1_000.0


def broken_of(*words, account=ACCOUNT):
    """Returns what is found broken of a learner that said at that second: this train step, made at that second."""
    said = [
        {
            "phase": "training",
            "replay": account,
            "time": KILLED_AT + at,
            "train_step": step,
            "train_step_time": KILLED_AT + made,
        }
        for at, step, made in ((-0.1, 700, -0.1), *words)
    ]
    outcome = Outcome("a dead server")
    judge_training_on(outcome, said, KILLED_AT, batch_size=128)
    return outcome.broken


def test_a_learner_that_trains_on_without_its_server_is_told_from_one_that_stands_still():
    """A learner that only waits for its server would else recover as fast."""
    assert broken_of((0.9, 760, 0.8), (1.9, 820, 1.8), (4.9, 900, 4.8)) == []
    assert broken_of((0.9, 700, -0.1), (1.9, 700, -0.1))
    assert broken_of((0.9, 750, 0.01), (1.9, 750, 0.01)), "only the call ended that was under way"


def test_a_learner_whose_account_allows_no_train_step_need_not_make_one():
    """Samples per insert are exact, also while no inserts can come."""
    assert broken_of((1.9, 750, 0.01), account={**ACCOUNT, "ahead": -6_300.0}) == []


@pytest.mark.parametrize(("holds", "is_broken"), [("1,000", False), ("999", True)])
def test_a_server_that_holds_less_than_its_last_checkpoint_is_named(run, holds, is_broken):
    """It answers again all the same, and actors and learner go on with what is left."""
    checkpoint = run.root_dir / "checkpoints" / "replay" / "500-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "about.json").write_text(json.dumps(
        {
            "time": 2.0,
            "items": {"experience": 1_000, "stream": 4},
            "tables": {"experience": {"max_times_sampled": 0}, "stream": {"max_times_sampled": 1}},
        }
    ))
    (run.root_dir / "logs").mkdir()
    (run.root_dir / "logs" / "replay-server-0.log").write_text(
        f"--- 2026 process 7: replay-server\nI 12:00:00 the replay holds 0 in 'stream', {holds} in 'experience'\n"
    )
    outcome = Outcome("a dead server")
    judge_held(run, outcome, run.saved_items(), time.monotonic())
    assert bool(outcome.broken) == is_broken


@pytest.mark.parametrize(("broken", "code"), [([], 0), (["died"], 1)], ids=["held", "broken"])
def test_the_exit_code_says_whether_every_promise_held(tmp_path, monkeypatch, broken, code):
    """A script that runs the drill every night looks at nothing else."""
    outcomes = [Outcome("first", recovery_secs=1.0), Outcome("second", broken=broken), Outcome("the end")]
    monkeypatch.setattr(drill, "_inject", lambda run, faults: iter(outcomes))
    place = {"folder": tmp_path, "json_path": tmp_path / "drill.json"}
    assert drill.run_drill("dqn_cartpole", faults=["kill-learner"], num_kills=0, seed=0, **place) == code
    found = json.loads((tmp_path / "drill.json").read_text())
    assert found["held"] == (not broken)
    assert [outcome["broken"] for outcome in found["outcomes"]] == [[], broken, []]


@pytest.mark.parametrize(
    ("points", "age_secs", "lost", "is_kept"),
    [
        ([(20.0, 8_000), (1.0, 9_500)], 30.0, 2_100, True),
        ([(20.0, 8_000), (1.0, 9_500)], 30.0, 2_101, False),
        ([(20.0, 8_000), (11.0, 9_000), (9.0, 9_200)], 30.0, 1_101, False),  # what there was ten seconds before
        ([(20.0, 8_000), (-1.0, 7_000)], 30.0, 2_101, False),  # one after the death
        ([(20.0, None)], 30.0, 3_101, False),  # the replay had not said yet what it holds
        # A learner so young that it saved nothing yet, which began with 7,000 of the 10,000 that it holds now.
        ([(20.0, 9_900), (1.0, 9_500)], 8.0, 3_100, True),
        ([(20.0, 9_900), (1.0, 9_500)], 8.0, 3_101, False),
    ],
)
def test_what_a_death_of_all_may_lose_was_collected_since_the_last_checkpoint(run, points, age_secs, lost, is_kept):
    """A learner that began again shortly before holds less than the one before; what it began with is saved."""
    with (run.root_dir / "operative_config.gin").open("a") as config:
        config.write(f"learner.checkpoint_interval_secs = {10.0 - SAVE_SECS}\nexperiment.replay = @resident_replay()\n")
    lines = [
        {"kind": "train", "time": KILLED_AT - secs, **({} if held is None else {"replay_held": held})}
        for secs, held in points
    ]
    (run.root_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    began_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(KILLED_AT - age_secs))
    (run.root_dir / "logs").mkdir()
    (run.root_dir / "logs" / "learner-0.log").write_text(
        f"--- {began_at} process 7: learner\nI 12:00:00 9000 windows came back from the replay server\n\n"
        f"--- {began_at} process 8: learner\nI 12:00:00 7000 windows came back from the replay server\n"
    )
    status = {"phase": "training", "train_step": 1_000, "replay": {"held": 10_000}}
    (run.root_dir / "status.json").write_text(json.dumps(status))
    outcome, before, _ = note_before(run, "SIGKILL everything")
    outcome.transitions_lost = lost
    judge_loss(run, outcome, before, KILLED_AT)
    assert (outcome.broken == []) == is_kept


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("8,000 in 'uniform_table'", "held"), ("8,000 in 'a_table_of_yours'", "not done")],
)
def test_a_replay_that_does_not_say_what_came_back_is_not_taken_for_one_that_held(run, said, verdict):
    """By the time the learner trains again, new transitions stand in the place of those that were lost."""
    (run.root_dir / "logs").mkdir()
    log = f"--- 2026-11-23 07:00:00 process 8: replay-server\nI 12:00:00 the replay holds {said}\n"
    (run.root_dir / "logs" / "replay-server-0.log").write_text(log)
    status = {"phase": "training", "train_step": 1_000, "replay": {"held": 8_000}}
    (run.root_dir / "status.json").write_text(json.dumps(status))
    outcome, before, _ = note_before(run, "SIGKILL everything")
    judge_loss(run, outcome, before, KILLED_AT)
    assert outcome.verdict.partition(":")[0] == verdict
