"""A sweep's table and picture, of recorded results."""

import json

import numpy as np

from actorlearner.tools.sweeping import report as sweep_report
from actorlearner.tools.sweeping.grid import Grid, Variant
from actorlearner.tools.sweeping.report import report_sweep
from actorlearner.tools.sweeping.trials import Trial

STEPS = (0, 100, 200, 300)


def evaluations(*returns):
    return [
        {"train_step": step, "environment_steps": 10 * step, "average_return": value}
        for step, value in zip(STEPS, returns)
    ]


def ended(*returns):
    delivered = {"train_step": 300, "average_return": max(returns) - 1}
    return {"evaluations": evaluations(*returns), "delivered": delivered, "has_ended": True}


def unfinished(*returns):
    return {"evaluations": evaluations(*returns), "delivered": None, "has_ended": False}


RUNS = {
    "good": {0: ended(0, 1, 2, 3), 1: ended(0, 3, 4, 7), 2: ended(0, 2, 3, 5)},
    "bad|one": {0: ended(0, 0, 0, 1), 1: unfinished(0, 9), 2: unfinished()},
}
STATES = {
    "good": {0: "ended", 1: "ended", 2: "ended"},
    "bad|one": {0: "ended", 1: "failed: exit code 65, error: training has diverged", 2: "not started"},
}


def rows(text, heading):
    """Returns the cells of the table below `heading`, by variant."""
    table = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.replace("\\|", "!").strip("|").split("|")] for line in table]
    return {row[0]: row[1:] for row in cells}


def test_the_tables_have_every_seed_and_the_failures_beside_the_successes():
    """A mean of those that did not fail is no result unless it says so."""
    points = sweep_report.collect_points(RUNS, "train_step", [150])
    text = sweep_report.format_tables("Sweep", points, STATES)
    last = rows(text, "At the end: the last evaluation of each run")
    assert last["good"] == ["3", "5.00", "**5.00**", "3.00 to 7.00", "3.00", "3.00", "7.00", "5.00"]
    assert last["bad!one"] == ["1", "1.00", "**1.00**", "1.00 to 1.00", "1.00", "1.00", "failed", "not started"]
    between = rows(text, "At 150 train steps, interpolated on each seed's curve")
    assert between["good"][5:] == ["1.50", "3.50", "2.50"]
    assert between["bad!one"][5:] == ["0.00", "failed", "not started"]
    delivered = rows(text, "Delivered policies: the best evaluated one of each run, on fresh episodes")
    assert delivered["good"][5:] == ["2.00", "6.00", "4.00"]
    assert "* bad|one, seed 1: failed: exit code 65, error: training has diverged" in text
    assert "Few seeds (3): for two or three the interval is their range" in text


def test_the_picture_has_each_seed_and_the_middle_of_those_that_ended():
    """A seed that failed early would cut the others' curve off, or be left out of the picture without a word."""
    (axes,) = sweep_report.make_picture("Sweep", RUNS, STATES, "environment_steps").axes
    lines = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}
    assert lines["good (3 of 3 seeds)"] == [[0, 0], [1_000, 2], [2_000, 3], [3_000, 5]]
    assert lines["bad|one (1 of 3 seeds)"][-1] == [3_000, 1]
    assert [[0, 0], [1_000, 9]] in lines.values()  # thin, the seed that failed ...
    assert [[1_000, 9]] in lines.values()  # ... and its cross
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().bounds == (0, 0, 3_000, 7)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Environment steps", "Average return")


def test_a_report_is_made_of_the_run_directories_as_they_are_now(tmp_path, capsys):
    """Whoever waits for hours of training looks at what there is."""
    grid = Grid("dqn_cartpole", (), (Variant("good", ()),), (0, 1), ())
    (tmp_path / "sweep.json").write_text(json.dumps({"asked": grid.as_json(), "settings": {}}))
    for seed, name in ((0, "summary.json"), (1, "metrics.jsonl")):
        (tmp_path / "good" / f"seed-{seed}").mkdir(parents=True)
        run = ended(0, 1, 2, 3)
        content = json.dumps(run)
        if name == "metrics.jsonl":  # of a learner that was killed while it wrote
            lines = [json.dumps({"kind": "evaluation", **entry}) for entry in run["evaluations"][:2]]
            content = "\n".join(['{"kind": "train", "train_step": 5}', *lines, lines[0][:-9]])
        (tmp_path / "good" / f"seed-{seed}" / name).write_text(content)
    assert report_sweep(tmp_path, "train_step", [100]) == 0
    text = (tmp_path / "sweep.md").read_text()
    assert text in capsys.readouterr().out
    assert rows(text, "At 100 train steps, interpolated on each seed's curve")["good"][5:] == ["1.00", "1.00"]
    assert rows(text, "At the end: the last evaluation of each run")["good"][5:] == ["3.00", "not started"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "sweep.json").read_text())["results"][0]["variants"]["good"]["mean"] == 1.0


def test_a_report_on_what_is_no_sweep_says_so(tmp_path, capsys):
    """A run's own directory is easily taken for a sweep's."""
    assert report_sweep(tmp_path, "train_step", []) == 64
    assert f"error: {tmp_path} is not a sweep's folder" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_trials_last_error_is_that_of_its_newest_launcher(tmp_path):
    """An error that was mended, told beside a failure that has nothing to do with it, sends its reader astray."""
    trial = Trial("a", 0, tmp_path)
    assert trial.read_last_error() == ""
    first = "--- 2026-11-30 process 1: train\nlearner | I 10:00:00 fine\nerror: the disk is full\n  its log: x\n"
    trial.output.write_text(first)
    assert trial.read_last_error() == "error: the disk is full"
    trial.output.write_text(first + "--- 2026-11-30 process 2: train\nKilled\n\n")
    assert trial.read_last_error() == "Killed"
