"""What must end a run ends it with an error, for real: disks, NaN, divergence. Nothing that was saved is lost by it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from actorlearner.experiment import load_experiment
from actorlearner.runtime.checkpoints import Checkpoints
from tests.e2e.drilled_runs import TEST_SECS, Drill, broken, drill_with
from tests.e2e.processes import RUN_SECS, Processes, bind

pytestmark = pytest.mark.timeout(TEST_SECS)

FAULTS = ("interrupt", "read-only-directory", "nan-observation", "diverge", "full-disk", "other-experiment")


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with drill_with(tmp_path_factory.mktemp("drill"), FAULTS) as drill:
        yield drill


@pytest.mark.parametrize("fault", [
    "read-only directory", "NaN observation", "loss that overflows", "full disk", "another experiment's checkpoint"
])
def test_what_must_end_a_run_ends_it_with_an_error_and_costs_nothing_that_was_saved(drill: Drill, fault: str):
    """A traceback does not help the user, and a run that continues with NaN is silently lost."""
    outcome = drill.outcomes[fault]
    assert not broken(outcome) and not outcome["not_done"], drill.process.output
    assert outcome["train_step_after"] > 0


def test_ctrl_c_stops_the_run_and_saves_it(drill: Drill):
    """Ctrl-C must not lose the minutes since the last checkpoint."""
    outcome = drill.outcomes["SIGINT launcher"]
    assert not broken(outcome), drill.process.output
    assert outcome["train_step_after"] >= outcome["train_step_before"]


def test_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(processes: Processes, tmp_path: Path):
    """NaN weights saved over the last good ones end a run of days."""
    train = processes.start(
        "train", "dqn_cartpole", "--root_dir=run", "--seed=1", "--num_video_episodes=0", "--num_eval_actors=0",
        *bind("train.num_iterations = 1_000", "train.initial_collect_steps = 200", "train.batch_size = 32"),
        *bind("dqn.learning_rate = 1e30", "dqn.final_learning_rate = 1e30", "train.num_updates_per_call = 1"),
        *bind("learner.checkpoint_interval_secs = 0"),
    )  # fmt: skip
    assert train.wait(RUN_SECS) == 65, train.output
    assert "at train step" in train.stderr and "training has diverged" in train.stderr
    assert re.search(r"\b(nan|inf)\b|is not finite is '", train.stderr, re.IGNORECASE)
    newest = tf.train.load_checkpoint(str(tmp_path / "run" / "checkpoints"))
    for name, shape in newest.get_variable_to_shape_map().items():
        value = newest.get_tensor(name)
        if np.issubdtype(np.asarray(value).dtype, np.floating):
            assert np.isfinite(value).all(), f"{name} {shape}"


SAC = """
include 'base.gin'
include 'agents/sac.gin'
include 'environments/cartpole.gin'
gym_environment.env_name = 'Pendulum-v1'
sac.actor_fc_layer_params = (16,)
sac.critic_joint_fc_layer_params = (16,)
"""


SMALL = ("train.initial_collect_steps = 200", "train.batch_size = 32", "train.eval_interval = 0")


def _train_100_steps(processes: Processes, experiment: str) -> tuple[str, ...]:
    """Returns the command that goes on with a run of 100 train steps, given how many there are to be."""
    train = ("train", experiment, "--root_dir=run", "--seed=1", "--num_video_episodes=0", "--num_eval_actors=0")
    first = processes.start(*train, *bind(*SMALL, "train.num_iterations = 100"))
    assert first.wait(RUN_SECS) == 0, first.output
    return (*train, *bind(*SMALL))


@pytest.mark.parametrize(
    "scale",
    [3e18, 1e36],
    ids=["the loss overflows, all variables are finite", "Adam's moments overflow too"],
)
def test_what_a_diverged_update_left_is_not_saved(processes: Processes, tmp_path: Path, scale: float):
    """The loss is checked during the update: finite weights may be spoilt too, and would spoil each later start."""
    (tmp_path / "sac.gin").write_text(SAC)
    train = _train_100_steps(processes, "sac.gin")
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.glob("ckpt-*")}
    assert before
    second = processes.start(*train, *bind("train.num_iterations = 1_000", f"sac.reward_scale_factor = {scale}"))
    assert second.wait(RUN_SECS) == 65, second.output
    assert "training has diverged" in second.stderr
    assert {path.name: path.read_bytes() for path in checkpoints.glob("ckpt-*")} == before


def test_a_moment_that_overflows_while_loss_and_weights_stay_finite_ends_the_run(processes: Processes, tmp_path: Path):
    """Adam divides by it: nothing is learned any more, for hours, and every save would be as useless."""
    train = _train_100_steps(processes, "dqn_cartpole")
    folder = tmp_path / "run" / "checkpoints"
    agent, train_step = load_experiment("dqn_cartpole", SMALL, seed=1).make_agent()
    agent._optimizer.build(agent._q_network.trainable_weights)
    checkpoints = Checkpoints(folder, train_step, {"agent": agent})
    counts = checkpoints.restore()
    moment = next(variable for variable in checkpoints.variables() if re.search(r"\bv/", variable.name))
    moment.assign(tf.fill(moment.shape, np.inf))
    checkpoints.save(counts)
    # One by one: the first update's loss is finite, the second's would not be.
    second = processes.start(*train, *bind("train.num_iterations = 100_000", "train.num_updates_per_call = 1"))
    assert second.wait(RUN_SECS) == 65, second.output
    assert re.search(r"not finite: training has diverged; the first variable .* '.*v/.*' \[", second.stderr)


def test_a_run_that_goes_on_past_its_end_has_not_ended(processes: Processes, tmp_path: Path):
    """Were its learner killed while the actors, done, are gone, a launcher would not start them for the next one."""
    train = _train_100_steps(processes, "dqn_cartpole")
    summary = tmp_path / "run" / "summary.json"
    ended = json.loads(summary.read_text())
    assert ended["has_ended"]
    second = processes.start(*train, *bind("train.num_iterations = 1_000_000", "train.log_interval = 100"))
    second.await_line("train step 200:", RUN_SECS)
    assert json.loads(summary.read_text()) == {**ended, "has_ended": False}
    second.send(signal.SIGTERM)
    assert second.wait(RUN_SECS) == 143, second.output
