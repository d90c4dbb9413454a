"""What a power cut leaves: the old file whole or the new one whole, and a checkpoint always."""

from __future__ import annotations

import threading

import pytest
import tensorflow as tf

from actorlearner.runtime import durable_files
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.durable_files import InBackground, find_superfluous
from tests.power_cut import lay_out, watch


def test_a_power_cut_while_a_file_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    """`run.json` was found empty, and the run refused: renamed in memory, its content was never on disk."""
    folder = tmp_path / "run"
    folder.mkdir()
    durable_files.write(folder / "run.json", "old")
    with watch(folder) as cuts:
        durable_files.write(folder / "run.json", "old")
        durable_files.write(folder / "run.json", "new")
    found = [left["run.json"] for left in cuts.left if "run.json" in left]
    assert set(found[1:]) == {b"old", b"new"}
    assert found[-2:] == [b"new", b"new"], "when it returns, also the renaming is on disk"


def test_a_power_cut_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    """A SavedModel of which half is from one train step and half from another loads, and acts wrongly."""
    folder = tmp_path / "policies"
    target = folder / "policy"

    def put(text):
        new = folder / ".policy.new"
        (new / "variables").mkdir(parents=True)
        (new / "graph").write_text(text)
        (new / "variables" / "data").write_text(text)
        durable_files.put_in_place(new, target)

    folder.mkdir()
    with watch(folder) as cuts:
        put("1")
        put("2")
        put("3")
    found = [(left["policy"]["graph"], left["policy"]["variables"]["data"]) for left in cuts.left if "policy" in left]
    assert len(found) > 4
    assert set(found) <= {(b"1", b"1"), (b"2", b"2"), (b"3", b"3")}
    assert found[-2:] == [(b"3", b"3")] * 2
    assert [path.name for path in folder.iterdir()] == ["policy"], "the old one is gone"


def test_a_line_that_was_added_is_there_after_a_power_cut(tmp_path):
    """A result that was told and is lost would be evaluated again, and its weights are gone by then."""
    folder = tmp_path / "evaluated"
    folder.mkdir()
    with watch(folder) as cuts:
        durable_files.append(folder / "results.jsonl", "1\n")
    assert [left["results.jsonl"] for left in cuts.left] == [b"1\n", b"1\n"]


def make_checkpoints(folder):
    train_step = tf.Variable(0, dtype=tf.int64)
    module = tf.Module()
    module.weights = tf.Variable(tf.zeros(100))
    return Checkpoints(folder, train_step, {"agent": module}, max_to_keep=2), train_step


def test_a_power_cut_at_any_moment_of_saving_leaves_the_learners_checkpoint_before(tmp_path):
    """Older ones were deleted before new ones were on disk: 5 of 5 runs had nothing but empty files."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    checkpoints, train_step = make_checkpoints(folder)
    least: list[int] = []
    with watch(folder) as cuts:
        for step in range(1, 6):
            train_step.assign(step)
            checkpoints.save({"version": step})
            least += [max(0, step - 1)] * (len(cuts.left) - len(least))
    least += [5] * (len(cuts.left) - len(least))
    assert len(least) > 10
    for number, (left, step) in enumerate(zip(cuts.left, least)):
        again, restored = make_checkpoints(lay_out(left, tmp_path / str(number)))
        counts = again.restore()
        assert int(restored) >= step
        assert counts.get("version", 0) == int(restored)


@pytest.mark.parametrize(
    ("ages", "kept"),
    [
        ([0, 2, 4, 6], [0, 2, 6]),  # none is old yet: the oldest will be the first
        ([0, 2, 4, 61, 75], [0, 2, 4, 61]),
        ([0, 2, 59, 61, 75], [0, 2, 59, 61]),
        ([0, 60, 120], [0, 60]),  # saved once a minute: the newest two are enough
        ([0, 70, 140], [0, 70]),
        ([100, 200, 300], [100, 200]),
        ([0], [0]),
    ],
)
def test_one_checkpoint_older_than_a_minute_is_kept_beside_the_newest_few(tmp_path, ages, kept):
    """A dying disk or a bug that spoils all recent checkpoints must leave one to resume from."""
    written = [(tmp_path / str(age), 1_000.0 - age) for age in ages]
    removed = find_superfluous(written, 2, now=1_000.0)
    assert sorted(set(ages) - {int(path.name) for path in removed}) == kept


def test_work_for_the_disk_is_done_in_order_and_no_more_than_one_train_steps_is_open():
    """A disk slower than training would pile up snapshots until the memory is full."""
    done: list[object] = []
    may_go_on, background = threading.Event(), InBackground()
    background.begin(1)
    background.do(lambda: done.append(may_go_on.wait(30)))
    background.do(lambda: done.append("second"))
    background.begin(1)
    assert "second" not in done, "of the same train step nothing is waited for"
    threading.Timer(0.1, may_go_on.set).start()
    background.begin(2)
    assert done == [True, "second"]


def test_what_fails_in_the_background_is_raised_where_it_is_waited_for():
    """An unreported full disk looks like a saved run."""

    def fail():
        raise OSError("full")

    background = InBackground()
    background.begin(1)
    background.do(fail)
    with pytest.raises(OSError, match="full"):
        background.begin(2)
