"""Every command of docs/operations.md is in a test that runs it, or said here not to be."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from actorlearner import cli
from tests.documented_commands import OPERATIONS, documented_commands, documented_sections

HERE = Path(__file__).parent
TESTED_BY = {
    "When one replay server is not enough": ("e2e/test_several_replay_servers.py", "e2e/test_replicas.py"),
    "Docker": ("deploy/test_compose_stack.py",),
    "Slurm": ("deploy/test_slurm.py",),
    "Several hosts over ssh": ("deploy/test_ssh.py",),
    "Kubernetes": (),
    "TPU VM": (),
    "TLS between machines": ("e2e/test_tls.py", "deploy/test_tls_stack.py"),
}
NOT_RUN = {
    ".venv/bin/actorlearner eval-actor dqn_cartpole --replay_address=host1:8008": "the README's, which its test runs",
    "make setup": "the tests run out of what it makes",
    "EXPERIMENT=dqn_cartpole COLLECT_ACTORS=4 docker compose -f docker/compose.yaml up": "the one above, with settings",
    "docker compose -f docker/compose.yaml -f docker/compose.gpu.yaml up": "needs a GPU",
    "docker compose -f docker/compose.yaml --profile monitoring up --detach": "needs images of Docker Hub",
    "sbatch launch/slurm.sbatch": "the one below, with all settings left out: hours of Minitaur",
    "GIN_BINDINGS='train.num_iterations = 2000; train.batch_size = 64' sbatch launch/slurm.sbatch": "as the test does",
    "for role in replay-server learner collect-actor eval-actor; do kubectl -n actorlearner create secret generic "
    "tls-$role --from-file=certs/$role; done": "needs a cluster",
    "squeue --me; tail -f actorlearner-123.log": "only shows",
}
NO_PLATFORM = ("Kubernetes", "TPU VM")  # nobody here has had one


def texts_in(name: str) -> set[str]:
    """Returns every text that stands in a test file; `documented` is handed commands as they stand in the docs."""
    nodes = ast.walk(ast.parse((HERE / name).read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_section_with_commands_is_known_here():
    """A new page of the manual would silently stay untested."""
    assert set(documented_sections()) == set(TESTED_BY)


@pytest.mark.parametrize("section", [section for section in TESTED_BY if section not in NO_PLATFORM])
def test_every_documented_command_is_in_a_test(section: str):
    """A command that is never run is wrong sooner or later, and a reader finds out."""
    commands = set(documented_commands(section))
    tested = commands & {text for name in TESTED_BY[section] for text in texts_in(name)}
    assert commands - tested == commands & set(NOT_RUN)


def test_every_flag_of_the_manual_is_one():
    """A flag that was renamed stays in the manual, and in sentences no test runs it."""
    commands = re.findall(r"(?:^|`)(?:\.venv/bin/)?actorlearner ([a-z][^`\n]*)", OPERATIONS.read_text(), re.MULTILINE)
    complete = [command for command in commands if re.search(r" --?\w", command) and "EXPERIMENT" not in command]
    assert len(complete) >= 15
    for command in complete:
        cli.make_parser().parse_args(shlex.split(command, comments=True))


def test_what_is_not_run_is_still_documented():
    """An excuse that outlives its command hides the next one."""
    assert set(NOT_RUN) <= {command for section in TESTED_BY for command in documented_commands(section)}
