"""Every start of a run leaves a trace."""

from __future__ import annotations

import subprocess

import pytest

from actorlearner import cli
from actorlearner.run.directory import RunDirectory
from actorlearner.run.starts import find_commit, note_start, read_settings

CONFIG = """
import actorlearner.agents.dqn

# Macros:
# ==============================================================================
rate = 0.001

# Parameters for dqn:
# ==============================================================================
dqn.learning_rate = %rate
dqn.layers = \\
    (100,
     50)
train.num_iterations = 200
"""


def note(folder, config=CONFIG, *, train_step=0, seed=1, versions=None, **command):
    return note_start(RunDirectory(folder), train_step, seed, versions or {"numpy": "1.26.4"}, config, command)


def test_a_start_with_other_settings_is_kept_with_what_differs_and_the_earlier_configuration(tmp_path, caplog):
    """Another learning rate overwrote operative_config.gin as if it had always been so."""
    changed = CONFIG.replace("0.001", "0.01").replace("50)", "60)").replace("train.num_iterations = 200\n", "")
    with caplog.at_level("INFO"):
        assert note(tmp_path)["differs"] == {}
        assert not caplog.messages, "a new run differs from nothing"
        start = note(tmp_path, changed, train_step=1_200, seed=2, bindings=["rate = 0.01"], commit="abc")
    differs = {
        "rate": ["0.001", "0.01"],
        "dqn.layers": ["(100, 50)", "(100, 60)"],
        "train.num_iterations": ["200", None],
        "seed": [1, 2],
        "commit": [None, "abc"],
    }
    assert start["differs"] == differs
    starts = RunDirectory(tmp_path).read_starts()
    assert [(start["number"], start["train_step"], start["seed"]) for start in starts] == [(1, 0, 1), (2, 1_200, 2)]
    assert starts[1]["bindings"] == ["rate = 0.01"]
    assert (tmp_path / "operative_config.gin").read_text() == changed
    assert (tmp_path / "operative_config.1.gin").read_text() == CONFIG
    (line,) = caplog.messages
    assert line.startswith(
        "start 2 of this run, at train step 1,200: differences from the previous start: rate: 0.001 -> "
    )


def test_a_start_like_the_one_before_says_so_and_keeps_one_configuration(tmp_path, caplog):
    """A learner that was killed a hundred times would leave a hundred files."""
    note(tmp_path)
    with caplog.at_level("INFO"):
        assert note(tmp_path, train_step=50)["differs"] == {}
    assert caplog.messages == ["start 2 of this run, at train step 50: nothing differs from the previous start"]
    assert [path.name for path in tmp_path.glob("*.gin")] == ["operative_config.gin"]


def test_a_run_of_an_earlier_version_is_compared_with_its_configuration(tmp_path):
    """It has no list of starts yet, but what was in force is there, and would be overwritten."""
    (tmp_path / "operative_config.gin").write_text(CONFIG)
    assert note(tmp_path, CONFIG.replace("200", "400"))["differs"] == {"train.num_iterations": ["200", "400"]}
    assert (tmp_path / "operative_config.0.gin").read_text() == CONFIG


def test_the_settings_of_a_configuration_are_read_over_several_lines():
    """Half a value compared would hide what changed in the other half."""
    settings = {"rate": "0.001", "dqn.learning_rate": "%rate", "dqn.layers": "(100, 50)", "train.num_iterations": "200"}
    assert read_settings(CONFIG) == settings


@pytest.mark.parametrize(("given", "seed"), [(None, 5), (7, 7)])
def test_the_seed_is_the_runs_own_unless_one_is_given(tmp_path, monkeypatch, given, seed):
    """If each resume drew a new seed, the seed of a result would be unknown."""
    note(tmp_path, seed=5)
    note(tmp_path, seed=6)
    started: list[int] = []

    def run_local(options):
        started.append(options.seed)
        return 0

    monkeypatch.setattr("actorlearner.launcher.local.run_local", run_local)
    flags = [] if given is None else [f"--seed={given}"]
    assert cli.main(["train", "dqn_cartpole", f"--root_dir={tmp_path}", *flags]) == 0
    assert started == [seed]


def test_a_line_cut_short_costs_one_start_and_not_the_list(tmp_path):
    """A disk that filled up, or lost power, leaves half a line; the next must not be written behind it."""
    note(tmp_path)
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"number": 2, "se')
    directory = RunDirectory(tmp_path)
    directory.hold()
    assert note_start(directory, 10, 1, {}, CONFIG, {})["number"] == 2
    assert [start["train_step"] for start in directory.read_starts()] == [0, 10]


def test_the_commit_is_that_of_the_checkout_and_says_when_it_was_changed(tmp_path):
    """ "It ran yesterday" is no answer; of an installed package, another repository around it is none either."""
    assert find_commit(tmp_path) is None

    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, timeout=60
        )

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message=one")
    commit = find_commit(tmp_path)
    assert commit and len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert find_commit(tmp_path) == f"{commit}-dirty"
