"""What a run's summary looks like to people."""

import json
import subprocess
import sys

import numpy as np
import pytest

from actorlearner.tools import report

_EVALUATION = {
    "train_step": 0,
    "environment_steps": 1_000,
    "average_return": 9.4,
    "average_episode_length": 9.4,
    "num_episodes": 10,
    "wall_secs": 3.2,
}
_SUMMARY = {
    "experiment": "dqn_cartpole",
    "seed": 7,
    "train_steps": 20_000,
    "environment_steps": 21_000,
    "wall_seconds": 185.4,
    # Out of order, as two eval actors may finish them.
    "evaluations": [
        {**_EVALUATION, "train_step": 20_000, "average_return": 2_950.5},
        _EVALUATION,
        {**_EVALUATION, "train_step": 10_000, "average_return": 187.3},
    ],
    "delivered": {
        "train_step": 20_000,
        "average_return": 3_000.0,
        "average_episode_length": 3_000.0,
        "min_episode_length": 3_000,
        "num_episodes": 20,
    },
}


def _write(root_dir, summary):
    text = summary if isinstance(summary, str) else json.dumps(summary)
    (root_dir / "summary.json").write_text(text)


def test_curve_goes_through_every_evaluation_in_order_and_marks_the_delivered_policy():
    """Two eval actors finish out of order; drawn as listed the line would run back and forth."""
    (axes,) = report.make_learning_curve(_SUMMARY).axes
    curve, star = axes.get_lines()
    assert np.asarray(curve.get_xydata()).tolist() == [[0, 9.4], [10_000, 187.3], [20_000, 2_950.5]]
    assert np.asarray(star.get_xydata()).tolist() == [[20_000, 3_000.0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Train step", "Average return")
    assert axes.get_title() == "dqn_cartpole, seed 7"


_STARTS = [
    {"number": 1, "train_step": 0, "differs": {}},
    {"number": 2, "train_step": 5_000, "differs": {}},  # killed, and started again
    {"number": 3, "train_step": 12_000, "differs": {"dqn.learning_rate": ["0.001", "0.01"], "seed": [7, 8]}},
]


def test_a_resume_with_other_settings_is_marked_in_the_curve_and_said_in_the_report():
    """A curve that bends where somebody changed the learning rate looks like a discovery."""
    summary = {**_SUMMARY, "starts": _STARTS}
    (axes,) = report.make_learning_curve(summary).axes
    lines = [np.asarray(line.get_xdata()).tolist() for line in axes.get_lines()[2:]]
    assert lines == [[12_000, 12_000]]
    said = "resumed at train step 12,000 with other settings: dqn.learning_rate: 0.001 -> 0.01; seed: 7 -> 8"
    assert report.format_summary(summary).splitlines()[-1] == said


def test_the_report_of_a_run_that_goes_on_past_its_end_says_so():
    """Its figures are those of the end it had reached; policies/ has a newer policy than the delivered one."""
    lines = report.format_summary({**_SUMMARY, "has_ended": False}).splitlines()
    assert lines[-1].startswith("the run continues: the figures are of its end at train step 20,000; ")


def test_learning_curve_is_a_picture_of_more_than_one_colour(tmp_path):
    """An empty canvas would be a valid PNG too."""
    imageio = pytest.importorskip("imageio.v2")
    _write(tmp_path, _SUMMARY)
    path = report.write_learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    with_star = imageio.imread(path)
    assert with_star.shape[:2] == (600, 960)
    _write(tmp_path, {**_SUMMARY, "delivered": None})
    without_star = imageio.imread(report.write_learning_curve(tmp_path))

    def num_orange(picture):
        return int(((picture[..., 0] > 240) & (picture[..., 1] < 160) & (picture[..., 2] < 60)).sum())

    assert num_orange(without_star) == 0
    assert num_orange(with_star) > 50
    assert sorted(child.name for child in tmp_path.iterdir()) == ["learning_curve.png", "summary.json"]


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        (None, "does not exist"),
        ('{"experiment": "dqn_cart', "cannot be read as JSON"),
        ("[]", "expected an object, found list"),
        ({**_SUMMARY, "experiment": None}, "'experiment' should be a name"),
        ({**_SUMMARY, "evaluations": "none"}, "'evaluations' should be a list"),
        ({**_SUMMARY, "evaluations": [{**_EVALUATION, "average_return": "high"}]}, r"evaluations\[0\].average_return"),
        ({**_SUMMARY, "delivered": {"train_step": 3}}, "'delivered.average_return' should be a number"),
        ({**_SUMMARY, "evaluations": []}, "no evaluations"),
    ],
)
def test_broken_summary_is_named_with_its_fault(tmp_path, summary, said):
    """A KeyError from the middle of a plot tells nobody which file to look at."""
    if summary is not None:
        _write(tmp_path, summary)
    with pytest.raises(ValueError, match=said) as error:
        report.write_learning_curve(tmp_path)
    assert str(tmp_path / "summary.json") in str(error.value)
    assert not (tmp_path / "learning_curve.png").exists()


def test_table_lists_the_evaluations_and_the_delivered_policy():
    """A row out of line is a row misread."""
    lines = report.format_summary(_SUMMARY).splitlines()
    assert lines[0] == "dqn_cartpole, seed 7: 20,000 train steps, 21,000 environment steps, 3 min 05 s"
    table = lines[2:7]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table[2:]] == ["0", "10,000", "20,000"]
    assert [line.split()[2] for line in table[2:]] == ["9.4", "187.3", "2,950.5"]
    assert lines[-1].startswith("delivered: the policy of train step 20,000; over 20 fresh episodes")
    assert "shortest 3,000 steps" in lines[-1]


def test_table_of_a_run_without_evaluations_says_so():
    """The summary of a run stopped early is a result too."""
    text = report.format_summary({**_SUMMARY, "evaluations": [], "delivered": None})
    assert "no evaluations" in text
    assert text.endswith("delivered: nothing yet")


def test_table_refuses_what_it_cannot_show():
    """A missing field is named rather than printed as None."""
    with pytest.raises(ValueError, match="'seed' should be a number, found None"):
        report.format_summary({**_SUMMARY, "seed": None})


def test_import_needs_neither_tensorflow_nor_matplotlib():
    """Every start of the command imports the tools, and TensorFlow takes seconds."""
    code = (
        "import sys; from actorlearner.tools import report, video;"
        "from actorlearner.tools.recording import episodes, policies;"
        "sys.exit(', '.join({'tensorflow', 'tf_agents', 'matplotlib', 'pygame', 'gym'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
