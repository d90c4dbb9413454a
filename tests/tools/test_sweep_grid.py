"""What a sweep takes for its grid, and what it refuses before anything runs."""

import contextlib

import pytest

from actorlearner import cli
from actorlearner.tools.sweeping.grid import (
    Grid,
    Variant,
    describe_differences,
    find_settings,
    grid_from_json,
    make_variants,
    parse_seeds,
    parse_set,
)

GRID = Grid("dqn_cartpole", ("train.batch_size = 8",), (Variant("a", ("x.y = 1",)),), (0, 1), ("--num_eval_actors=2",))


@pytest.mark.parametrize(
    ("text", "bindings"),
    [
        ("a.b=1,3,5", ["a.b = 1", "a.b = 3", "a.b = 5"]),
        ("dqn.fc_layer_params=(64, 64),(128,)", ["dqn.fc_layer_params = (64, 64)", "dqn.fc_layer_params = (128,)"]),
        ("a.b='x,y',\"it's\"", ["a.b = 'x,y'", "a.b = \"it's\""]),
        (r"a.b='it\'s, so',2", [r"a.b = 'it\'s, so'", "a.b = 2"]),
        ("a.b={'k': (1, [2, 3])},None", ["a.b = {'k': (1, [2, 3])}", "a.b = None"]),
        ("experiment.replay=@resident_replay(), @uniform_replay()",
         ["experiment.replay = @resident_replay()", "experiment.replay = @uniform_replay()"]),
        ("scope/a.b = 'c=d'", ["scope/a.b = 'c=d'"]),
    ],
)  # fmt: skip
def test_values_are_split_at_commas_outside_brackets_and_quotes(text, bindings):
    """A tuple of layers cut in two would be refused, or worse, be another experiment."""
    assert parse_set(text) == bindings


@pytest.mark.parametrize("text", ["a.b", "=1", "a.b=", "a.b=1,,2", "a.b=(1,2", "a.b=1),2", "a.b='x", "a.b=1,1"])
def test_what_is_no_list_of_values_is_refused_with_its_text(text):
    """The message must say which of many --set it means."""
    with pytest.raises(ValueError, match="--set '") as error:
        parse_set(text)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("text", "seeds"), [("5", (0, 1, 2, 3, 4)), ("3,7,9", (3, 7, 9)), ("7,", (7,)), ("1", (0,)), (" 2 , 0", (2, 0))]
)
def test_seeds_are_a_number_of_them_or_those_listed(text, seeds):
    """--seeds=5 for the one seed 5 would be a sweep without spread."""
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "a", "1,1", "1,,2", ","])
def test_what_is_no_seeds_is_refused(text):
    """A sweep of no trials would end at once, and well."""
    with pytest.raises(ValueError, match="--seeds="):
        parse_seeds(text)


def test_variants_are_every_combination_and_the_named_ones():
    """Leave-one-out tables need several bindings changed at once beside a grid."""
    variants = make_variants(["a.b=1,2", "c=(3, 4),'x'"], ["all out: a.b = 0; c = ';'", "full:"])
    assert [variant.name for variant in variants] == [
        "a.b=1,c=(3, 4)", "a.b=1,c='x'", "a.b=2,c=(3, 4)", "a.b=2,c='x'", "all out", "full",
    ]  # fmt: skip
    assert variants[1].bindings == ("a.b = 1", "c = 'x'")
    assert variants[4].bindings == ("a.b = 0", "c = ';'")
    assert variants[5].bindings == ()
    assert [variant.bindings for variant in make_variants([], [])] == [()]


def test_folders_differ_and_hold_no_letters_that_others_misread():
    """TensorFlow cannot read a checkpoint below a folder with [ in its name."""
    folders = [variant.folder for variant in make_variants(["a.b=[1],(1,),'1',1"], ["../x: a.b = 2"])]
    assert len(set(folders)) == 5
    assert folders[3] == "a.b=1"
    assert not set("".join(folders)) & set("[](){}'\"\\/* ")


@pytest.mark.parametrize(
    ("sets", "variants"),
    [(["a.b=1", "a.b=2"], []), ([], ["x: a = 1", "x: a = 2"]), ([], ["x"]), ([], ["a.b=1: c = 2"])],
)
def test_variants_that_cannot_be_told_apart_or_read_are_refused(sets, variants):
    """Two variants in one folder would be one run with two names."""
    with pytest.raises(ValueError):
        make_variants(sets, variants)


def test_a_sweep_may_be_given_more_variants_and_seeds_and_nothing_else():
    """Half a table made with other settings than the rest is worse than none."""
    more = Grid(GRID.experiment, GRID.gin_bindings, (*GRID.variants, Variant("b", ())), (0, 1, 2), GRID.train_flags)
    assert describe_differences(grid_from_json(GRID.as_json()), more) == []
    other = Grid("sac_minitaur", (), (Variant("a", ("x.y = 2",)),), (1,), ())
    differences = "\n".join(describe_differences(GRID, other))
    for said in ("experiment: the sweep has 'dqn_cartpole', this command 'sac_minitaur'", "gin_bindings", "train_flags",
                 "variant 'a': the sweep has ('x.y = 1',)", "seeds: the sweep has 0"):  # fmt: skip
        assert said in differences
    gone = "variant 'b': the sweep has it, this command does not"
    assert gone in describe_differences(more, GRID)[0]


def test_flags_behind_the_dashes_go_to_every_trial():
    """argparse drops them where options stand before, and takes a trial's --seed for the sweep's."""
    parser = cli.make_parser()
    parsed = parser.parse_args(["sweep", "dqn_cartpole", "--seeds=2", "--", "--num_collect_actors=2", "--hang_secs=9"])
    assert (parsed.experiment, parsed.seeds) == ("dqn_cartpole", "2")
    assert parsed.behind_dashes == ["--num_collect_actors=2", "--hang_secs=9"]
    assert parser.parse_args(["sweep", "x"]).behind_dashes == []


@pytest.mark.parametrize(
    "words",
    [
        ["x", "--", "--num_colect_actors=2"],
        ["x", "--", "--num_collect_actors=0"],
        ["x", "--", "--seed=3"],
        ["x", "--", "--root_dir=y"],
        ["x", "--", "--fresh"],
        ["x", "--", "--num_eval_actors=0"],
        ["x", "--jobs=0"],
        ["x", "--nice=20"],
        ["x", "--seeds=0"],
        ["x", "--at=a"],
        ["x", "--report=y"],
        [],
        ["--report=y"],
    ],
)
def test_a_wrong_command_is_refused_at_once(words, capsys, tmp_path, monkeypatch):
    """Every trial would refuse it, one after the other."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):  # argparse's own refusals
        assert cli.main(["sweep", *words]) == 64
    assert "error: " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_every_variant_is_read_as_train_reads_it_before_anything_runs():
    """The third variant's misspelling would show after hours of the first two."""
    variants = make_variants([], ["fine:", "misspelt: dqn.n_step_updat = 1", "range: dqn.gamma = 'x'",
                                  "no evaluations: train.eval_interval = 0",
                                  "no environment: gym_environment.env_name = 'NoSuch-v0'"])  # fmt: skip
    with pytest.raises(ValueError) as error:
        find_settings(Grid("dqn_cartpole", (), variants, (0,), ()))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"variant '{variant.name}'" for variant in variants[1:]]
    assert "Did you mean 'dqn.n_step_update'?" in lines[0]
