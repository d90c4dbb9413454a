"""One tiny `actorlearner train dqn_cartpole` run, and what it promises to leave behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gin
import imageio_ffmpeg
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
from tf_agents.policies import policy_loader

from actorlearner.experiment import Experiment, load_experiment
from actorlearner.tools.recording import policies
from tests.e2e.conftest import FinishedRun
from tests.e2e.processes import RUN_SECS, TINY, bind

EVALUATED_STEPS = [0, 100, 200]
EVALUATION_FIELDS = {
    "train_step",
    "environment_steps",
    "average_return",
    "average_episode_length",
    "num_episodes",
    "wall_secs",
}
DELIVERED_FIELDS = {
    "train_step",
    "average_return",
    "return_std",
    "average_episode_length",
    "min_episode_length",
    "num_truncated",
    "num_episodes",
}


@pytest.fixture(scope="module")
def summary(finished_run: FinishedRun):
    return json.loads((finished_run.root_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def experiment(finished_run: FinishedRun) -> Experiment:
    return load_experiment(str(finished_run.root_dir / "operative_config.gin"), seed=3)


def _tensors(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={TENSORS: 0})
    accumulator.Reload()
    return accumulator


def test_training_to_the_end_exits_0_without_a_warning_of_ours(finished_run: FinishedRun):
    """A run that limps to its end hides its defects in the log."""
    assert finished_run.exit_code == 0, finished_run.output
    assert "Traceback" not in finished_run.output
    assert not [line for line in finished_run.output.splitlines() if "| W " in line or "| E " in line]


def test_the_run_directory_holds_what_the_documentation_lists(finished_run: FinishedRun):
    """A tool or a person that looks for a file finds it under its documented name."""
    names = {path.name for path in finished_run.root_dir.iterdir() if not path.name.startswith(".")}
    assert names >= {
        "operative_config.gin",
        "summary.json",
        "metrics.jsonl",
        "checkpoints",
        "policies",
        "logs",
        "learning_curve.png",
        "videos",
        "train",
        "collect",
        "eval",
    }
    logs = {path.name for path in (finished_run.root_dir / "logs").iterdir()}
    assert logs == {"replay-server-0.log", "learner-0.log", "collect-actor-0.log", "eval-actor-0.log"}
    assert not list(finished_run.root_dir.rglob("*.tmp*")), "half-written files were left"
    assert not list(finished_run.root_dir.rglob("*.partial*"))


def test_the_summary_says_what_ran_and_how_far_it_came(finished_run: FinishedRun, summary):
    """A result whose versions, seed or counts are missing cannot be reproduced."""
    assert summary["experiment"] == "dqn_cartpole"
    assert summary["seed"] == 3
    assert summary["train_steps"] == 200
    # 100 windows to begin with, then 4 a train step less what the rate limiter lets the learner run ahead.
    assert summary["environment_steps"] > 500
    assert summary["environment_crashes"] == 0
    assert 0 < summary["wall_seconds"] < 240
    assert set(summary["versions"]) >= {"actorlearner", "python", "tensorflow", "tf-agents", "dm-reverb"}


def test_the_policy_is_evaluated_at_0_at_every_interval_and_at_the_end(summary):
    """The stock example attributes an old return to a new step; the seeds plot step 0 too."""
    assert [evaluation["train_step"] for evaluation in summary["evaluations"]] == EVALUATED_STEPS
    for evaluation in summary["evaluations"]:
        assert set(evaluation) >= EVALUATION_FIELDS
        assert evaluation["num_episodes"] == 3
        assert 1 <= evaluation["average_episode_length"] <= 60
        assert evaluation["average_return"] == pytest.approx(evaluation["average_episode_length"]), "CartPole pays 1"
    steps = [evaluation["environment_steps"] for evaluation in summary["evaluations"]]
    assert steps == sorted(steps)


def test_the_delivered_policy_is_the_best_evaluated_one(summary):
    """Handing over the last policy instead of the best loses what training had found."""
    delivered = summary["delivered"]
    assert set(delivered) == DELIVERED_FIELDS
    best = max(evaluation["average_return"] for evaluation in summary["evaluations"])
    candidates = [e["train_step"] for e in summary["evaluations"] if e["average_return"] == best]
    assert delivered["train_step"] in candidates
    assert delivered["num_episodes"] == 3
    assert 1 <= delivered["min_episode_length"] <= delivered["average_episode_length"] <= 60


def test_metrics_hold_every_log_interval_and_every_evaluation(finished_run: FinishedRun, summary):
    """Losses that only TensorBoard can read are lost to scripts."""
    lines = [json.loads(line) for line in (finished_run.root_dir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["train_step"] for line in training] == [50, 100, 150, 200]
    assert all(np.isfinite(line["loss"]) and line["train_steps_per_sec"] > 0 for line in training)
    assert all(line["staleness"] >= 0 for line in training)
    evaluated = [line for line in lines if line["kind"] == "evaluation"]
    assert sorted(line["train_step"] for line in evaluated) == EVALUATED_STEPS


def test_tensorboard_shows_training_collecting_and_evaluating(finished_run: FinishedRun):
    """Curves without points, or with steps that jump back, cannot be read."""
    expected = {
        "train": ({"loss", "staleness", "train_steps_per_sec"}, [50, 100, 150, 200]),
        "eval": ({"AverageReturn", "AverageEpisodeLength"}, EVALUATED_STEPS),
        "collect/0": ({"EnvironmentSteps", "EnvironmentStepsPerSec", "NumberOfEpisodes"}, None),
    }
    for folder, (tags, steps) in expected.items():
        events = _tensors(finished_run.root_dir / folder)
        assert tags <= set(events.Tags()["tensors"]), folder
        for tag in tags:
            found = [event.step for event in events.Tensors(tag)]
            assert found == (steps or sorted(found)), f"{folder}: {tag}"
            assert found
            assert all(np.isfinite(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag))


def test_tensorboard_shows_the_operative_configuration(finished_run: FinishedRun):
    """A curve without its settings is a riddle a month later."""
    (event,) = _tensors(finished_run.root_dir / "train").Tensors("operative_config")
    text = tf.make_ndarray(event.tensor_proto).item().decode()
    assert "train.num_iterations = 200" in text
    assert "dqn.learning_rate" in text


def test_the_operative_configuration_is_an_experiment_with_the_same_settings(experiment: Experiment):
    """A saved configuration that cannot be loaded again only describes the run."""
    schedule = experiment.schedule
    assert (schedule.num_iterations, schedule.batch_size, schedule.num_environments) == (200, 32, 2)
    assert experiment.environment.max_episode_steps == 60  # type: ignore[attr-defined]
    assert experiment.agent.double_q is True  # type: ignore[attr-defined]


def test_the_operative_configuration_keeps_every_roles_settings(experiment: Experiment):
    """The learner writes it, but the run was also what the other roles were told."""
    assert gin.query_parameter("replay_server.linger_secs") == 1.0
    assert gin.query_parameter("collect_actor.refresh_interval_secs") == 0.05


@pytest.mark.parametrize("name", ["policy", "collect_policy", "greedy_policy"])
def test_a_saved_policy_acts_without_our_package(finished_run: FinishedRun, experiment: Experiment, name: str):
    """A SavedModel that needs the code that made it cannot be deployed."""
    folder = str(finished_run.root_dir / "policies" / name)
    environment = experiment.make_environment(0)
    policy = policy_loader.load(folder)
    step = policy.action(environment.reset())
    assert int(step.action) in (0, 1)
    environment.close()
    raw = tf.saved_model.load(folder)
    assert int(raw.get_train_step()) in EVALUATED_STEPS


def test_a_numbered_checkpoint_brings_back_the_policy_of_its_step(finished_run: FinishedRun, experiment: Experiment):
    """Two checkpoints that load as the same policy show that loading changes nothing."""
    policies = finished_run.root_dir / "policies"
    checkpoints = sorted((policies / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["policy_checkpoint_0000000100", "policy_checkpoint_0000000200"]
    weights = []
    for checkpoint in checkpoints:
        policy = policy_loader.load(str(policies / "policy"), str(checkpoint))
        weights.append([np.array(variable) for variable in policy.variables()])
        environment = experiment.make_environment(0)
        assert int(policy.action(environment.reset()).action) in (0, 1)
        environment.close()
    assert any((first != last).any() for first, last in zip(*weights))


def test_the_last_checkpoint_is_of_the_last_train_step(finished_run: FinishedRun):
    """A run that ends without saving cannot be prolonged."""
    newest = tf.train.latest_checkpoint(str(finished_run.root_dir / "checkpoints"))
    assert newest is not None and re.search(r"-200(\.\d+)?$", newest)
    reader = tf.train.load_checkpoint(newest)
    assert int(reader.get_tensor("train_step/.ATTRIBUTES/VARIABLE_VALUE")) == 200
    counts = json.loads(reader.get_tensor("counts/.ATTRIBUTES/VARIABLE_VALUE"))
    assert counts["samples"] == 200 * 32
    assert counts["inserts"] > 100


def test_the_learning_curve_is_a_picture(finished_run: FinishedRun):
    """An empty file with the right name is not a picture."""
    picture = tf.io.decode_png((finished_run.root_dir / "learning_curve.png").read_bytes())
    assert min(picture.shape[:2]) > 300
    assert np.unique(picture.numpy().reshape(-1, picture.shape[-1]), axis=0).shape[0] > 2


@pytest.mark.parametrize("name", ["trained_policy", "random_policy"])
def test_a_second_of_video_is_a_second_of_the_task(finished_run: FinishedRun, experiment: Experiment, name: str):
    """The tutorials' videos play at 30 frames a second whatever the task's own time is."""
    seed = experiment.derive_seed("video")
    environment = experiment.make_environment(seed)
    environment.seed(seed)
    act = (
        policies.random_act(environment, seed=seed)
        if name == "random_policy"
        else policies.saved_model_act(finished_run.root_dir / "policies" / "greedy_policy")
    )
    time_step, num_steps = environment.reset(), 0
    while not time_step.is_last():
        time_step, num_steps = environment.step(act(time_step)), num_steps + 1
    environment.close()
    path = str(finished_run.root_dir / "videos" / f"{name}.mp4")
    num_frames, _ = imageio_ffmpeg.count_frames_and_secs(path)
    meta = next(imageio_ffmpeg.read_frames(path))
    assert meta["fps"] == 25
    assert num_frames == 1 + num_steps // 2
    assert abs(num_frames / meta["fps"] - num_steps / 50) <= 2 / 25


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".learner.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_fresh_moves_the_old_run_aside_says_where_and_begins_at_train_step_0(processes, finished_run, tmp_path):
    """Going on from the old weights is not what was asked for, and to delete them in their stead cannot be undone."""
    shutil.copytree(finished_run.root_dir, tmp_path / "run")
    before = _contents(tmp_path / "run")
    train = processes.start(
        "train", "dqn_cartpole", "--fresh", "--root_dir=run", "--num_eval_actors=0", "--num_video_episodes=0",
        *bind(*TINY, "train.num_iterations = 50", "train.policy_save_interval = 50"),
    )  # fmt: skip
    assert train.wait(RUN_SECS) == 0, train.output
    said = train.await_line(r"^--fresh: the run that was in run is now in (run\.\d{8}-\d{6}); nothing was deleted$")
    assert _contents(tmp_path / said[1]) == before
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_step"] for line in metrics] == [50]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_steps"] == 50
    logs = "".join(log.read_text() for log in (tmp_path / "run" / "logs").glob("*.log"))
    assert not re.search("restored|restoring", logs), "neither weights nor replay"
