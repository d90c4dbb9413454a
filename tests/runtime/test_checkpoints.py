"""Checkpoints with numbers of ours beside the weights."""

from __future__ import annotations

import resource

import pytest
import tensorflow as tf

from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.lifecycle import ExitCode, RoleError, find_reason


def make(folder, shape=(2,), step=0, value=0.0, name="weights", max_to_keep=3):
    train_step = tf.Variable(step, dtype=tf.int64)
    weights = tf.Variable(tf.fill(shape, value))
    objects = {"agent": tf.Module()}
    setattr(objects["agent"], name, weights)
    return Checkpoints(folder, train_step, objects, max_to_keep), train_step, weights


def test_a_folder_without_a_checkpoint_restores_nothing(tmp_path):
    """The first start of a run is no error."""
    checkpoints, train_step, weights = make(tmp_path / "none", step=3, value=1.5)
    assert checkpoints.restore() == {}
    assert (int(train_step), weights.numpy().tolist()) == (3, [1.5, 1.5])


def test_weights_train_step_and_counts_come_back_together(tmp_path):
    """Counts from one moment and weights from another give a wrong ratio of updates after a restart."""
    checkpoints, train_step, weights = make(tmp_path, step=10, value=1.0)
    checkpoints.save({"version": 1, "collected": {"7": 100}})
    train_step.assign(20)
    weights.assign([2.0, 3.0])
    checkpoints.save({"version": 2, "collected": {"7": 250}})
    again, train_step, weights = make(tmp_path)
    assert again.restore() == {"version": 2, "collected": {"7": 250}}
    assert (int(train_step), weights.numpy().tolist()) == (20, [2.0, 3.0])


def test_the_variables_it_knows_are_all_that_it_writes_but_its_own(tmp_path):
    """An optimizer's moments that are not finite spoil what is restored, however sound the weights look."""
    weights = tf.Variable([1.0, 2.0], name="weights")
    optimizer = tf.keras.optimizers.Adam()
    agent = tf.Module()
    agent.weights, agent.optimizer = weights, optimizer
    checkpoints = Checkpoints(tmp_path, tf.Variable(0, dtype=tf.int64), {"agent": agent})
    optimizer.build([weights])
    checkpoints.save({})
    written = tf.train.load_checkpoint(tf.train.latest_checkpoint(tmp_path)).get_variable_to_shape_map()
    names = {name for name in written if name.endswith("VARIABLE_VALUE")} - {"counts/.ATTRIBUTES/VARIABLE_VALUE"}
    moments = [variable for variable in checkpoints.variables() if variable.shape == [2] and variable is not weights]
    assert len(checkpoints.variables()) == len(names)
    assert len(moments) == 2


def test_only_the_newest_checkpoints_are_kept_also_over_restarts(tmp_path):
    """A disk filled by checkpoints ends the run."""
    for step in range(5):
        checkpoints, train_step, _ = make(tmp_path, max_to_keep=2)
        checkpoints.restore()
        train_step.assign(step)
        checkpoints.save({})
    left = sorted(path.name for path in tmp_path.glob("*.index"))
    assert left == ["ckpt-0.index", "ckpt-3.index", "ckpt-4.index"], "the first will be older than a minute"


def test_the_reason_is_found_among_what_tensorflow_puts_around_it():
    """As it writes it of a full disk, from a compiled function."""
    message = (
        "Graph execution error:\n\nDetected at node SaveV2_1 defined at (most recent call last):\n"
        '  File "learner.py", line 9, in <module>\n\nckpt-2_temp/part-0; No space left on device\n'
        "\t [[{{node SaveV2_1}}]]\nHint: If you want to see a list of allocated tensors when OOM happens ...\n"
        " [Op:__inference_write_49]"
    )
    error = tf.errors.ResourceExhaustedError(None, None, message)
    assert find_reason(error) == "ckpt-2_temp/part-0; No space left on device"


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_names_the_reason(tmp_path):
    """Half a checkpoint taken for the newest, or one that took the last good one with it, ends a run of days."""
    checkpoints, train_step, _ = make(tmp_path, shape=(10_000,), step=4, value=1.0)
    checkpoints.save({"version": 1})
    train_step.assign(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # files cannot grow beyond this, as if the disk was full
    try:
        with pytest.raises(tf.errors.OpError) as raised:
            checkpoints.save({"version": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in find_reason(raised.value)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("ckpt-5")]
    again, train_step, weights = make(tmp_path, shape=(10_000,))
    assert again.restore() == {"version": 1}
    assert (int(train_step), weights.numpy()[-1]) == (4, 1.0)


def test_a_checkpoint_that_was_not_finished_is_passed_over_and_cleared_away(tmp_path, caplog):
    """A learner killed while it saves leaves files without their index; taken for a checkpoint, none would start."""
    checkpoints, train_step, _ = make(tmp_path, step=4, value=1.0)
    checkpoints.save({"version": 1})
    train_step.assign(5)
    checkpoints.save({"version": 2})
    (tmp_path / "ckpt-5.index").unlink()  # written last
    (tmp_path / "ckpt-6_temp").mkdir()
    (tmp_path / "ckpt-6_temp" / "part-00000-of-00001.data-00000-of-00001").write_bytes(b"half")
    again, train_step, _ = make(tmp_path)
    assert again.restore() == {"version": 1}
    assert int(train_step) == 4
    assert f"skipping the checkpoint {tmp_path}/ckpt-5, which was not finished" in caplog.messages
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"checkpoint", "ckpt-4"}


def damage(folder, name, kind):
    """Damages a checkpoint's weights or its index."""
    files = folder.glob(f"{name}.data-*" if kind.startswith("data") else f"{name}.index")
    path = max(files, key=lambda file: file.stat().st_size)  # the other one has strings
    content = bytearray(path.read_bytes())
    if kind.endswith("removed"):
        path.unlink()
        return
    if kind.endswith("cut"):
        del content[len(content) // 2 :]
    elif kind.endswith("emptied"):
        content.clear()
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["data removed", *(f"{file} {how}" for file in ("data", "index") for how in ("cut", "emptied", "flipped"))]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_cleared_away(tmp_path, caplog, kind):
    """A flipped bit is silently restored as wrong weights; half a file gives a page of TensorFlow's errors."""
    checkpoints, train_step, weights = make(tmp_path, shape=(1_000,), step=4, value=1.0)
    checkpoints.save({"version": 1})
    train_step.assign(5)
    weights.assign(tf.fill((1_000,), 2.0))
    checkpoints.save({"version": 2})
    damage(tmp_path, "ckpt-5", kind)
    again, train_step, weights = make(tmp_path, shape=(1_000,))
    assert again.restore() == {"version": 1}
    assert (int(train_step), set(weights.numpy())) == (4, {1.0})
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"skipping the checkpoint {tmp_path}/ckpt-5, which is damaged: ")
    assert "\n" not in warning
    assert not list(tmp_path.glob("ckpt-5*")), "else it would be the newest again, and count among those kept"


def test_a_run_whose_every_checkpoint_is_damaged_is_refused_and_nothing_is_removed(tmp_path):
    """Starting over silently would lose days that a copy of one file might restore."""
    checkpoints, train_step, _ = make(tmp_path, step=4, value=1.0)
    for step in (4, 5):
        train_step.assign(step)
        checkpoints.save({})
        damage(tmp_path, f"ckpt-{step}", "data cut")
    before = sorted(path.name for path in tmp_path.iterdir())
    again, train_step, weights = make(tmp_path)
    with pytest.raises(RoleError) as raised:
        again.restore()
    assert raised.value.exit_code == ExitCode.DATA
    assert str(raised.value) == (
        f"every checkpoint in {tmp_path} is damaged (ckpt-5, ckpt-4). Restore one from a copy, or start over with "
        "another --root_dir (train: or with --fresh)."
    )
    assert (int(train_step), weights.numpy().tolist()) == (0, [0.0, 0.0])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("other", [{"shape": (3,)}, {"name": "biases"}])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence(tmp_path, other):
    """TensorFlow restores what it can and ignores the rest, or prints a page about it."""
    make(tmp_path, step=4, value=1.0)[0].save({})
    with pytest.raises(RoleError) as raised:
        make(tmp_path, **other)[0].restore()
    assert raised.value.exit_code == ExitCode.DATA
    message = str(raised.value)
    assert f"{tmp_path}/ckpt-4 does not fit this experiment: " in message
    assert message.endswith("Give the settings it was made with, or another --root_dir.")
    assert "\n" not in message
