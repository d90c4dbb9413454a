"""What a run survives, and what it leaves when it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from actorlearner.runtime.ports import find_free_port
from tests.e2e.processes import RUN_SECS, START_SECS, TINY, Process, Processes, bind, is_alive, role_pids

CRASHING = """
import crashing_cartpole
include 'dqn_cartpole.gin'
gym_environment.env_name = 'CrashingCartPole-v0'
"""


def _logged(root_dir: Path, role: str) -> str:
    return (root_dir / "logs" / f"{role}.log").read_text()


@pytest.fixture(scope="module")
def troubled_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Process, int]]:
    """A run whose environments crash, and whose collect actor is killed when training is under way."""
    folder = tmp_path_factory.mktemp("troubled")
    (folder / "crashing.gin").write_text(CRASHING)
    with Processes(folder) as processes:
        train = processes.start(
            "train", "crashing.gin", "--root_dir=run", "--seed=1", "--num_video_episodes=0",
            *bind(*TINY, "train.num_iterations = 1200", "train.eval_interval = 1200"),
            *bind("train.policy_save_interval = 1200", "collect_actor.report_interval_secs = 0.1"),
        )  # fmt: skip
        # 1,150 steps more are far beyond what the rate limiter grants the learner without an actor.
        train.await_line("train step 50:")
        (pid,) = role_pids(folder / "run")["collect-actor-0"]
        os.kill(pid, signal.SIGKILL)
        yield folder / "run", train, train.wait(RUN_SECS)


def test_a_killed_collect_actor_is_started_again_and_training_ends(troubled_run):
    """Elsewhere one crash kills the run, or leaves it waiting for an actor that never comes back."""
    root_dir, train, exit_code = troubled_run
    assert exit_code == 0, train.output
    assert re.search(r"collect-actor-0 was killed by SIGKILL; restarting it", train.output)
    assert len(role_pids(root_dir)["collect-actor-0"]) == 2
    assert json.loads((root_dir / "summary.json").read_text())["train_steps"] == 1200


def test_the_restarted_actor_makes_no_random_steps_of_its_own(troubled_run):
    """In the stock example every actor starts with its own 10,000 random steps, after every restart again."""
    root_dir, _, _ = troubled_run
    second_life = _logged(root_dir, "collect-actor-0").split("--- ")[2]
    assert "warm-up is over" in second_life
    assert "environment 0 crashed" not in second_life.split("warm-up is over")[0]


def test_steps_of_both_lives_are_counted(troubled_run):
    """A restarted actor counts from 0; the run does not."""
    root_dir, _, _ = troubled_run
    second_life = int(re.findall(r"collected (\d+) steps", _logged(root_dir, "collect-actor-0"))[-1])
    assert json.loads((root_dir / "summary.json").read_text())["environment_steps"] > second_life


def test_an_environment_that_crashes_is_replaced_and_counted(troubled_run):
    """A simulator that leaks or segfaults now and then must not end a run of days, nor go unnoticed."""
    root_dir, train, exit_code = troubled_run
    assert exit_code == 0, train.output
    log = _logged(root_dir, "collect-actor-0")
    num_replaced = len(re.findall(r"environment \d+ was replaced by a new one", log))
    num_counted = json.loads((root_dir / "summary.json").read_text())["environment_crashes"]
    # What an actor had not reported when it was killed, or when the summary was written, is not in the count.
    assert 0 < num_counted <= num_replaced


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Process, int, dict[str, list[int]]]]:
    """A long run, stopped by SIGTERM when training is under way."""
    folder = tmp_path_factory.mktemp("stopped")
    with Processes(folder) as processes:
        train = processes.start(
            "train", "dqn_cartpole", "--root_dir=run", "--seed=2", "--num_video_episodes=0",
            *bind(*TINY, "train.num_iterations = 1_000_000", "collect_actor.report_interval_secs = 60.0"),
        )  # fmt: skip
        train.await_line("train step 100:")
        train.send(signal.SIGTERM)
        exit_code = train.wait(START_SECS)
        yield folder / "run", train, exit_code, role_pids(folder / "run")


def _newest_checkpoint(root_dir: Path) -> int:
    return max(int(re.findall(r"ckpt-(\d+)", path.name)[0]) for path in (root_dir / "checkpoints").glob("ckpt-*.index"))


def test_sigterm_during_training_leaves_a_checkpoint_and_no_process(stopped_run):
    """A job that is preempted loses at most seconds of training, and no process keeps computing."""
    root_dir, train, exit_code, pids = stopped_run
    assert exit_code == 143, train.output
    assert _newest_checkpoint(root_dir) >= 100
    assert set(pids) == {"replay-server-0", "learner-0", "collect-actor-0", "eval-actor-0"}
    assert not [pid for lives in pids.values() for pid in lives if is_alive(pid)]
    assert "killing" not in train.output, "some role did not end in time"
    assert "Traceback" not in train.output


def test_the_policies_of_a_stopped_run_are_those_of_the_stop(stopped_run):
    """The policy of an unfinished run must not be the untrained one that it started with."""
    root_dir, _, _, _ = stopped_run
    for name in ("policy", "collect_policy", "greedy_policy"):
        variables = tf.train.load_checkpoint(str(root_dir / "policies" / name / "variables" / "variables"))
        assert variables.get_tensor("train_step/.ATTRIBUTES/VARIABLE_VALUE") == _newest_checkpoint(root_dir)
    assert not [path.name for path in (root_dir / "policies").rglob("*") if path.name.endswith((".new", ".old"))]


def test_what_was_collected_until_the_stop_is_saved(stopped_run):
    """An actor reports every few seconds: at each stop the steps since would be missing from the count for ever."""
    root_dir, _, _, _ = stopped_run
    (collected,) = re.findall(r"collected (\d+) steps", _logged(root_dir, "collect-actor-0"))
    newest = tf.train.load_checkpoint(str(root_dir / "checkpoints"))
    counts = json.loads(newest.get_tensor("counts/.ATTRIBUTES/VARIABLE_VALUE"))
    assert sum(counts["collected"].values()) == int(collected)


def test_starting_again_goes_on_from_the_checkpoint_to_the_end(stopped_run):
    """Starting over in the old directory loses days; a second evaluation of step 0 would spoil the curve."""
    root_dir, _, _, _ = stopped_run
    stopped_at = _newest_checkpoint(root_dir)
    end = (stopped_at // 100 + 10) * 100
    before = len((root_dir / "metrics.jsonl").read_text().splitlines())
    with Processes(root_dir.parent) as processes:
        train = processes.start(
            "train", "dqn_cartpole", "--root_dir=run", "--seed=2", "--num_video_episodes=0",
            *bind(*TINY, f"train.num_iterations = {end}", "learner.checkpoint_interval_secs = 600.0"),
        )  # fmt: skip
        assert train.wait(RUN_SECS) == 0, train.output
        assert f"ckpt-{stopped_at}" in train.await_line("restored (.*)").group(1)
        # At once, not an interval later: learners that die young, one after the other, would save the replay never.
        assert int(train.await_line(r"saved the replay under train step (\d+)").group(1)) < end
    lines = [json.loads(line) for line in (root_dir / "metrics.jsonl").read_text().splitlines()[before:]]
    assert min(line["train_step"] for line in lines if line["kind"] == "train") > stopped_at
    summary = json.loads((root_dir / "summary.json").read_text())
    assert summary["train_steps"] == end
    evaluated = [evaluation["train_step"] for evaluation in summary["evaluations"]]
    assert evaluated == list(range(0, end + 1, 100)), "every due snapshot is evaluated once, also across the stop"
    assert summary["wall_seconds"] > max(line["wall_secs"] for line in summary["evaluations"])
    first, second = summary["starts"]
    assert (first["train_step"], second["train_step"], second["seed"]) == (0, stopped_at, 2)
    assert second["differs"] == {
        "collect_actor.report_interval_secs": ["60.0", None],
        "learner.checkpoint_interval_secs": ["60.0", "600.0"],
        "train.num_iterations": ["1000000", str(end)],
    }, "what differs, and nothing that does not"
    said = f"start 2 of this run, at train step {stopped_at:,}: differences from the previous start: "
    assert said in _logged(root_dir, "learner-0")


NAN = """
import nan_cartpole
include 'dqn_cartpole.gin'
gym_environment.env_name = 'NanCartPole-v0'
"""


def test_an_environment_that_gives_a_nan_ends_the_run_and_leaves_the_last_good_checkpoint(processes, tmp_path):
    """One NaN in the replay turns all weights into NaN, and hours later its origin is unknown."""
    (tmp_path / "nan.gin").write_text(NAN)
    train = processes.start(
        "train", "nan.gin", "--root_dir=run", "--seed=1", "--num_eval_actors=0", "--num_video_episodes=0",
        *bind(*TINY, "train.num_iterations = 1_000_000"),
    )  # fmt: skip
    assert train.wait(RUN_SECS) == 65, train.output
    assert re.search(
        r"error: after [\d,]+ environment steps environment \d gave observation\[2\] = nan: nothing of it was sent",
        train.stderr,
    )
    assert _newest_checkpoint(tmp_path / "run") > 0


def test_sigterm_reaches_a_learner_that_is_blocked_inside_reverb(processes, tmp_path, eventually):
    """Python handles no signal while a batch is awaited inside a compiled call; launchers then kill, and lose hours."""
    address = f"localhost:{find_free_port()}"
    started = {
        role: processes.start(
            role, "dqn_cartpole", f"--replay_address={address}",
            *(["--root_dir=run"] if role != "replay-server" else []),
            *bind(*TINY, "train.num_iterations = 1_000_000", "train.eval_interval = 0"),
            *bind("experiment.replay = @uniform_replay()", "uniform_replay.wait_secs = 1000.0"),
        )
        for role in ("replay-server", "learner", "collect-actor")
    }  # fmt: skip
    started["learner"].await_line("train step 50:", RUN_SECS)
    started["collect-actor"].send(signal.SIGKILL)
    # Said when no update was made for 5 s: the call is inside Reverb, and would be for 1000 s more.
    status = tmp_path / "run" / "status.json"  # written every second, so not at once
    eventually(lambda: status.exists() and json.loads(status.read_text())["phase"] == "waiting", secs=RUN_SECS)
    started["learner"].send(signal.SIGTERM)
    assert started["learner"].wait(20.0) == 143, started["learner"].output
    assert _newest_checkpoint(tmp_path / "run") >= 50
