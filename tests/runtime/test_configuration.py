"""Strict gin: whatever is wrong with a file or a binding is said before anything starts."""

from __future__ import annotations

import gin
import pytest

from actorlearner.experiment import shipped_experiments_folder
from actorlearner.runtime.configuration import parse_strictly, split_bindings
from actorlearner.runtime.lifecycle import ExitCode, RoleError

GOOD = "include 'dqn_cartpole.gin'\n"


def parse(tmp_path, text, *bindings):
    path = tmp_path / "mine.gin"
    path.write_text(text)
    parse_strictly(path, bindings, [shipped_experiments_folder()])


def refusal(tmp_path, text, *bindings):
    with pytest.raises(RoleError) as raised:
        parse(tmp_path, text, *bindings)
    assert raised.value.exit_code == ExitCode.USAGE
    return str(raised.value)


MISSPELT = {
    "trian.batch_size = 64": ("trian.batch_size", "train.batch_size"),
    "train.batch_sise = 64": ("train.batch_sise", "train.batch_size"),
    "num_iteration = 5": ("num_iteration", "num_iterations"),
    "train.batch_size = %bach_size\nbatch_size = 3": ("train.batch_size takes its value from %bach_size", "batch_size"),
    "include 'agents/dqm.gin'": ("agents/dqm.gin", "agents/dqn.gin"),
    "experiment.agent = @dqm()": ("'dqm' (experiment.agent)", "@dqn"),
    "train.batch_size = %constants.NONE": ("constants.NONE", ""),
}


@pytest.mark.parametrize("line", MISSPELT)
def test_a_misspelt_name_is_refused_with_its_line_and_the_nearest_name(tmp_path, line):
    """gin alone takes a misspelt macro for a new one, and the run trains for hours with the default."""
    message = refusal(tmp_path, f"# mine\n{GOOD}{line}\n")
    named, nearest = MISSPELT[line]
    assert message.startswith(f"{tmp_path}/mine.gin:3: ")
    assert named in message
    assert not nearest or (f"Did you mean '{nearest}'?" in message or f".{nearest}'?" in message)


@pytest.mark.parametrize("module", ["actorlearner.agents.dqm", "no_such_package"])
def test_an_import_that_fails_is_refused_with_its_line(tmp_path, module):
    """The traceback of an import says nothing about the gin file that asked for it."""
    message = refusal(tmp_path, f"{GOOD}import {module}\n")
    assert message.startswith(f"{tmp_path}/mine.gin:2: cannot import '{module}'")


WRONG_VALUES = {
    "train.batch_size = 2.5": "a whole number, not the float 2.5, >= 1",
    "train.batch_size = '64'": "a whole number, not the str '64', >= 1",
    "train.batch_size = True": "a whole number, not the bool True, >= 1",
    "train.batch_size = None": "a whole number, not the NoneType None, >= 1",
    "train.batch_size = 0": "a number >= 1",
    "train.eval_interval = -1": "a number >= 0",
    "train.collect_steps_per_iteration = 0": "a number > 0",
    "dqn.gamma = 1.5": "a number >= 0 and <= 1",
    "dqn.gamma = 'high'": "a number, not the str 'high', >= 0 and <= 1",
    "dqn.double_q = 1": "True or False, not the int 1",
    "dqn.td_errors_loss = 'hubert'": "one of 'squared', 'huber'",
    "dqn.fc_layer_params = 100": "a tuple such as (256, 256), not the int 100",
    "dqn.fc_layer_params = (100, 0)": "each element to be a number >= 1",
    "dqn.gradient_clipping = -1.0": "a number > 0 or None",
    "gym_environment.env_name = 3": "a string in quotes, not the int 3",
    "experiment.agent = 'dqn'": "a configurable reference such as @sac()",
    "uniform_replay.sampler = 'prioritised'": "one of 'uniform', 'fifo', 'lifo'",
}


@pytest.mark.parametrize("line", WRONG_VALUES)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_its_line(tmp_path, line):
    """gin alone accepts any value: a batch size of 0 ends in a traceback minutes later, in another process."""
    message = refusal(tmp_path, f"{GOOD}\n{line}\n")
    assert message.startswith(f"{tmp_path}/mine.gin:3: {line.split(' =')[0]} = ")
    assert f"expected {WRONG_VALUES[line]}" in message


def test_a_macro_of_the_wrong_type_is_refused_where_it_is_defined(tmp_path):
    """The line to mend is the macro's, not the one that uses it."""
    message = refusal(tmp_path, f"{GOOD}size = 'big'\ntrain.batch_size = %size\n")
    assert message.startswith(f"{tmp_path}/mine.gin:2: size (for train.batch_size) = 'big': expected a whole number")


@pytest.mark.parametrize("line", ["train.batch_size 64", "train.batch_size =", "train.batch_size = (1,", "= 3"])
def test_a_syntax_error_is_refused_with_its_line(tmp_path, line):
    """gin's own error names a line without the file it is in, when the file was included."""
    included = tmp_path / "part.gin"
    included.write_text(f"# a part\n{line}\n")
    message = refusal(tmp_path, f"{GOOD}include 'part.gin'\n")
    assert message.startswith((f"{included}:2", f"{included}:3"))
    assert "cannot be read as gin" in message


@pytest.mark.parametrize("binding", ["gym_environment.env_name = CartPole-v1", "dqn.td_errors_loss=huber"])
def test_text_without_quotes_on_the_command_line_gets_a_hint(tmp_path, binding):
    """The shell eats one pair of quotes, which every newcomer to gin meets first."""
    message = refusal(tmp_path, GOOD, binding)
    assert message.startswith("--gin_bindings: ")
    assert binding in message
    assert "strings need quotes" in message


def test_a_wrong_binding_on_the_command_line_says_where_it_came_from(tmp_path):
    """A line number would send the user to a file that is right."""
    assert refusal(tmp_path, GOOD, "train.batch_sise = 1").startswith("--gin_bindings: 'train' has no parameter")
    assert refusal(tmp_path, GOOD, "train.batch_size = 0").startswith("--gin_bindings: train.batch_size = 0: expected")


def test_bindings_are_divided_alike_by_semicolons_and_new_lines():
    """Every launcher hands GIN_BINDINGS on as it is: what works in one must work in all."""
    text = " a.b = 1; c.d = 'x; y'\n\n;e.f = (1,\t2) ;"
    assert split_bindings(text) == ["a.b = 1", "c.d = 'x; y'", "e.f = (1,\t2)"]
    assert split_bindings(" ; \n") == []
    assert split_bindings("a.b = \"it's; fine\"; c.d = '") == ['a.b = "it\'s; fine"', "c.d = '"]


def test_a_later_binding_overrides_an_earlier_one(tmp_path):
    """Experiments are overrides of shipped ones, and the command line has the last word."""
    parse(
        tmp_path,
        f"{GOOD}train.batch_size = 7\ntrain.batch_size = 8\ntrain.log_interval = 9\n",
        "train.log_interval = 3",
    )
    assert gin.query_parameter("train.batch_size") == 8
    assert gin.query_parameter("train.log_interval") == 3
    assert gin.query_parameter("train.num_eval_episodes") == 20  # the shipped file's


def test_an_overridden_wrong_value_is_no_error(tmp_path):
    """Only what wins is used; a wrong value further up may have been overridden to mend it."""
    parse(tmp_path, f"{GOOD}train.batch_size = 0\n", "train.batch_size = 8")


def test_a_macro_may_be_overridden_on_the_command_line(tmp_path):
    """A seed's name that is a macro, such as replay_buffer_max_length, is a setting like any other."""
    parse(tmp_path, GOOD, "replay_buffer_max_length = 5_000")
    assert gin.query_parameter("replay_buffer_max_length/gin.macro.value") == 5_000


def test_include_finds_a_file_beside_the_experiment_before_a_shipped_one(tmp_path, monkeypatch):
    """gin looks into the working directory first: what was checked would not be what runs."""
    elsewhere = tmp_path / "elsewhere"
    beside = tmp_path / "beside"
    for folder, batch_size in ((elsewhere, 1), (beside, 2)):
        (folder / "agents").mkdir(parents=True)
        (folder / "agents" / "dqn.gin").write_text(f"train.batch_size = {batch_size}\n")
    monkeypatch.chdir(elsewhere)
    parse(beside, "include 'base.gin'\ninclude 'agents/dqn.gin'\n")
    assert gin.query_parameter("train.batch_size") == 2


def test_files_that_include_each_other_are_refused(tmp_path):
    """gin recurses until Python gives up."""
    (tmp_path / "other.gin").write_text("include 'mine.gin'\n")
    assert "includes itself" in refusal(tmp_path, "include 'other.gin'\n")


def test_a_refused_file_leaves_the_configuration_as_it_was(tmp_path):
    """Half a configuration must never be in force."""
    parse(tmp_path, GOOD, "train.batch_size = 11")
    refusal(tmp_path, GOOD, "train.batch_size = 12", "train.log_interval = 0")
    assert gin.query_parameter("train.batch_size") == 11


def test_what_is_not_text_is_refused(tmp_path):
    """A path to a checkpoint in the place of an experiment ends in a UnicodeDecodeError otherwise."""
    path = tmp_path / "weights.gin"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RoleError, match="cannot read the gin file"):
        parse_strictly(path, [], [])
