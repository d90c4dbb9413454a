"""Every command that docs/operations.md has for a platform is run by that platform's test, or said here not to be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.deploy.infrastructure import documented_commands

HERE = Path(__file__).parent
TESTED_BY = {
    "Docker": ("test_compose_stack.py",),
    "Slurm": ("test_slurm.py",),
    "Several hosts over ssh": ("test_ssh.py",),
    "Kubernetes": (),
    "TPU VM": (),
}
NOT_RUN = {
    "make setup": "the tests run out of what it makes",
    "EXPERIMENT=dqn_cartpole COLLECT_ACTORS=4 docker compose -f docker/compose.yaml up": "the one above, with settings",
    "docker compose -f docker/compose.yaml -f docker/compose.gpu.yaml up": "needs a GPU",
    "docker compose -f docker/compose.yaml --profile monitoring up --detach": "needs images of Docker Hub",
    "sbatch launch/slurm.sbatch": "the one below, with all settings left out: hours of Minitaur",
    "GIN_BINDINGS='train.num_iterations = 2000; train.batch_size = 64' sbatch launch/slurm.sbatch": "as the test does",
    "squeue --me; tail -f actorlearner-123.log": "only shows",
}
NO_PLATFORM = ("Kubernetes", "TPU VM")  # nobody here has had one


def texts_in(name: str) -> set[str]:
    """Returns every text that stands in a test file; `documented` is handed commands as they stand in the docs."""
    nodes = ast.walk(ast.parse((HERE / name).read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("section", [section for section in TESTED_BY if section not in NO_PLATFORM])
def test_every_documented_command_is_run_by_a_test(section: str):
    """A command that nobody has run is wrong sooner or later, and its reader finds out."""
    commands = set(documented_commands(section))
    run = commands & {text for name in TESTED_BY[section] for text in texts_in(name)}
    assert commands - run == commands & set(NOT_RUN)


def test_what_is_not_run_is_still_documented():
    """An excuse that outlives its command hides the next one."""
    assert set(NOT_RUN) <= {command for section in TESTED_BY for command in documented_commands(section)}
