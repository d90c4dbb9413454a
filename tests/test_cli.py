"""The door: every subcommand explains itself, and wrong flags end it at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import actorlearner
from actorlearner import cli, tools

ROLES = ["replay-server", "learner", "collect-actor", "eval-actor"]
TOOLS = [
    *("await-end", "bench", "certs", "check", "drill", "health"),
    *("keep-running", "metrics", "report", "sweep", "video"),
]
COMMANDS = ["train", *ROLES, *TOOLS]
SOURCE_ROOT = Path(actorlearner.__file__).parent.parent


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "actorlearner", *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_list_of_commands_is_complete(capsys):
    """A command that --help leaves out does not exist."""
    with pytest.raises(SystemExit) as raised:
        cli.main(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.partition("COMMAND\n")[2].splitlines() if line[4] != " "]
    assert listed == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    """A % in a help text ends --help in a traceback."""
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: actorlearner {command} ")


TOOL = '''"""Say hello to somebody."""


def add_arguments(parser):
    parser.add_argument("name")


def run(arguments):
    print("hello", arguments.name)
    return 0
'''


def test_a_new_tool_is_one_new_file(tmp_path, monkeypatch, capsys):
    """What changes existing lines for each tool ends with a door that nobody can read."""
    (tmp_path / "say_hello.py").write_text(TOOL)
    monkeypatch.setattr(tools, "__path__", [*tools.__path__, str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert re.search(r"say-hello +say hello to somebody\n", capsys.readouterr().out)
    assert cli.main(["say-hello", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"


@pytest.mark.parametrize("command", ROLES)
def test_every_role_takes_the_same_flags(command):
    """One command line with another first word starts the next role: that is how launchers are written."""
    arguments = cli.make_parser().parse_args(
        [
            command, "sac_minitaur", "--replay_address=a:1", "--variables_address=b:2", "--task=3", "--seed=4",
            "--gin_bindings=train.batch_size = 1", "--gin_bindings=train.log_interval = 2", "--root_dir=/x",
            "--peer_patience_secs=5",
        ]
    )  # fmt: skip
    assert arguments.gin_bindings == ["train.batch_size = 1", "train.log_interval = 2"]
    assert (arguments.replay_address, arguments.variables_address, arguments.task) == ("a:1", "b:2", 3)


def test_the_version_is_the_packages(capsys):
    """A bug report needs it."""
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"actorlearner {actorlearner.__version__}\n"


def test_a_command_is_needed(capsys):
    """Without one argparse does nothing and exits 0, if it is let."""
    with pytest.raises(SystemExit) as raised:
        cli.main([])
    assert raised.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--replay_address=nowhere", "error: --replay_address = 'nowhere': expected HOST:PORT"),
        ("--task=-1", "error: --task = -1: expected 0 for the first of its kind"),
        ("--replay_address=a:1,b", "error: --replay_address = 'a:1,b': 'b': expected HOST:PORT"),
    ],
)
def test_a_role_with_a_wrong_address_ends_before_tensorflow_is_imported(flag, message):
    """Seconds of importing before a typing error shows are what makes people hate a command."""
    start = time.monotonic()
    ended = run("collect-actor", "sac_minitaur", flag)
    assert ended.returncode == 64
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay_address=a:1,b:2", "--task=2"], "error: --task = 2: --replay_address lists 2 replay servers, the "),
        (["--advertise=here"], "error: --advertise = 'here': expected HOST:PORT"),
        (["--may_join=a:1,b"], "error: --may_join = 'a:1,b': 'b': expected HOST:PORT"),
        (
            ["--may_join=a:1", "--advertise=b:2"],
            "error: --may_join = 'a:1' and --advertise: only the first replay server",
        ),
    ],
)
def test_a_replay_server_that_is_none_of_the_list_is_told_how_to_join(flags, message):
    """No role would read its part of the replay."""
    ended = run("replay-server", "sac_minitaur", *flags)
    assert ended.returncode == 64
    assert message in ended.stderr


@pytest.mark.parametrize("command", ["report", "video"])
def test_a_tool_on_what_is_no_run_says_so(command, tmp_path):
    """The traceback of a missing file names a file that the user has never heard of."""
    ended = run(command, str(tmp_path / "nowhere"))
    assert ended.returncode == 64
    assert ended.stderr.count("error: ") == 1
    assert str(tmp_path / "nowhere") in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_drill_has_one_source_of_faults(capsys):
    """Of two, one would be passed over in silence."""
    assert cli.main(["drill", "dqn_cartpole", "--kills=1", "--random=1"]) == 64
    assert "give only one of --fault, --kills and --random" in capsys.readouterr().err


def test_a_task_is_a_number_or_auto(capsys):
    """A typing error must not become task 0, whose seeds and files another process has."""
    parser = cli.make_parser()
    assert parser.parse_args(["collect-actor", "dqn_cartpole", "--task=auto"]).task is None
    with pytest.raises(SystemExit):
        parser.parse_args(["collect-actor", "dqn_cartpole", "--task=first"])
    assert "'first': expected 0 or more, or auto" in capsys.readouterr().err


def test_check_names_what_is_wrong_before_anything_starts(tmp_path):
    """In a cluster the same misspelling would be found by every role, many times over."""
    ended = run("check", "dqn_cartpole", "--gin_bindings=train.batch_sise = 3")
    assert ended.returncode == 64
    assert "batch_sise" in ended.stderr
    (tmp_path / "file").touch()
    ended = run("check", "dqn_cartpole", f"--root_dir={tmp_path / 'file' / 'run'}")
    assert ended.returncode == 73
    ended = run("check", "dqn_cartpole", f"--root_dir={tmp_path / 'run'}")
    assert (ended.returncode, ended.stdout) == (0, "dqn_cartpole can be started\n")


def test_only_may_be_given_once_for_all_subjects_or_once_for_each():
    """The last one alone would be measured, and the others be missed in the table."""
    for flags in (["--only", "weights", "minitaur"], ["--only", "weights", "--only", "minitaur"]):
        assert cli.make_parser().parse_args(["bench", *flags]).only == ["weights", "minitaur"]
