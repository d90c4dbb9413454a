"""docker/up.sh on a real Docker engine: `tests/run.sh deploy`, as root, as it is also run as somebody else."""

from __future__ import annotations

import grp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.compose_stack import BUILD_SECS, END_SECS, START_SECS, UP_SCRIPT, Stack
from tests.deploy.infrastructure import await_that, needed_engine
from tests.e2e.processes import TINY

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(3600)]

CALLER = 12_345  # a user that no image knows of; who may use the engine


def as_caller(*command: str) -> list[str]:
    engine = grp.getgrnam("docker").gr_gid
    return ["setpriv", f"--reuid={CALLER}", f"--regid={CALLER}", f"--groups={engine}", *command]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A tiny run in a folder that the caller may write to."""
    needed_engine()
    os.chown(tmp_path, CALLER, CALLER)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    stack = Stack(
        tmp_path,
        f"actorlearner-test-up-{os.getpid()}",
        VIDEO_EPISODES="0",
        COLLECT_ACTORS="1",
        HOME=str(tmp_path),
        GIN_BINDINGS="\n".join([*TINY, "learner.checkpoint_interval_secs = 5.0"]),
    )
    try:
        yield stack
    finally:
        stack.close()
        shutil.rmtree(stack.run_dir, ignore_errors=True)


def await_training(stack: Stack, train_step: int) -> None:
    await_that(lambda: stack.train_step() > train_step, "training under way", BUILD_SECS, lambda: stack.output)


def test_what_a_caller_trains_belongs_to_them_and_a_signal_saves_it(stack: Stack):
    """Files of root in one's own folder can be neither removed nor resumed; a run cut short must not be lost."""
    endless = "train.num_iterations = 1_000_000"
    stack.settings["GIN_BINDINGS"] += f"\n{endless}"
    for signal, code in ((stack.press_ctrl_c, 130), (stack.terminate, 143)):
        before = stack.train_step()
        stack.start_up(*as_caller(UP_SCRIPT))
        await_training(stack, before + 200)
        reached = stack.train_step()
        signal()
        assert stack.await_up(90) == code, stack.output
        assert stack.compose("ps", "--quiet") == ""
        names = [path.name for path in (stack.run_dir / "checkpoints").glob("ckpt-*.index")]
        checkpoints = [int(name.split("-")[1].split(".")[0]) for name in names]  # also ckpt-2500.1
        assert max(checkpoints) >= reached, "not saved when it was told to stop"
        assert list((stack.run_dir / "checkpoints" / "replay").glob("[0-9]*"))

    reached = stack.train_step()
    end = (reached // 100 + 2) * 100
    stack.settings["GIN_BINDINGS"] = stack.settings["GIN_BINDINGS"].replace(endless, f"train.num_iterations = {end}")
    stack.start_up(*as_caller(UP_SCRIPT))
    assert stack.await_up(END_SECS) == 0, stack.output
    assert stack.compose("ps", "--quiet") == ""
    assert (stack.run_dir / "summary.json").is_file()
    assert {path.stat().st_uid for path in [stack.run_dir, *stack.run_dir.rglob("*")]} == {CALLER}


def test_a_setting_that_cannot_work_ends_it_at_once_with_its_code(stack: Stack):
    """Six containers that restart for ever do not show what is wrong."""
    stack.settings["GIN_BINDINGS"] = "train.batch_sise = 3"
    stack.start_up(UP_SCRIPT)
    assert stack.await_up(BUILD_SECS) == 64, stack.output
    assert "Did you mean 'train.batch_size'?" in stack.output
    assert stack.compose("ps", "--quiet") == ""


def test_training_that_diverges_ends_it_with_its_code_and_is_not_started_again(stack: Stack):
    """Ten more tries with the same numbers take an hour, and their logs bury the reason."""
    stack.settings["GIN_BINDINGS"] += "\ntrain.num_iterations = 1_000_000; dqn.learning_rate = 1e30"
    stack.start_up(UP_SCRIPT)
    assert stack.await_up(START_SECS) == 65, stack.output
    assert "training has diverged" in stack.output
    assert "the run cannot go on (exit code 65)" in stack.output
    assert stack.restarts("learner") == 0
    assert stack.compose("ps", "--quiet") == ""
