"""The replay server's checkpoints: what comes back, what does not, and what damaged files do."""

from __future__ import annotations

import json
import re
import resource
from typing import Any

import numpy as np
import pytest
import reverb
import tensorflow as tf

from actorlearner.replay.checkpoints import MAX_TO_KEEP, TableCheckpoints
from actorlearner.runtime import messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError
from tests.power_cut import lay_out, watch

SIGNATURE = {"x": tf.TensorSpec([None, 3], tf.float32)}
BOARD_SIGNATURE = {"phase": tf.TensorSpec((), tf.int64)}


def make_tables(max_size=10):
    kept = reverb.Table(
        "kept",
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=max_size,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=SIGNATURE,
    )
    return [kept], [messages.make_board("board", BOARD_SIGNATURE)]


@pytest.fixture
def start(serve, tmp_path):
    """`start(**settings)` begins a server's life on the folder; returns its checkpoints and a client."""
    lives: list[Any] = []

    def begin(**settings):
        if lives:
            lives[-1][0]._lock.close()  # as a process's end does
            lives[-1][1].stop()
        kept, others = make_tables(**settings)
        checkpoints = TableCheckpoints(tmp_path / "replay", kept)
        server = reverb.Server([*kept, *others], port=None, checkpointer=checkpoints.make_checkpointer())
        lives.append((checkpoints, server))
        return checkpoints, reverb.Client(f"localhost:{server.port}")

    yield begin
    if lives:
        lives[-1][1].stop()


def insert(client, *values):
    with client.trajectory_writer(num_keep_alive_refs=2) as writer:
        for value in values:
            writer.append({"x": np.full(3, value, np.float32)})
            writer.create_item("kept", 1.0, {"x": writer.history["x"][-1:]})
        writer.flush(timeout_ms=5_000)


def held(client):
    size = client.server_info(timeout=5)["kept"].current_size
    if not size:
        return set()
    return {float(sample.data[0][0, 0]) for sample in client.sample("kept", num_samples=200, emit_timesteps=False)}


def test_what_was_saved_comes_back_and_what_only_the_living_understand_does_not(start):
    """An old board would tell actors that training is over; replay lost on restart is tensorflow/agents#475."""
    checkpoints, client = start()
    insert(client, 1, 2, 3)
    messages.Sender(client.server_address).put("board", {"phase": np.int64(2)}, timeout_secs=5)
    saved = checkpoints.save(client, train_step=7)
    assert json.loads((saved / "about.json").read_text())["items"] == {"kept": 3}
    _, client = start()
    assert held(client) == {1.0, 2.0, 3.0}
    info = client.server_info(timeout=5)
    assert info["kept"].rate_limiter_info.insert_stats.completed == 3, "the limiter's account goes on"
    assert info["board"].current_size == 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "unfinished"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(start, caplog, damage):
    """Reverb would not start at all, or bring back half; killed while saving is when servers die."""
    checkpoints, client = start()
    insert(client, 1, 2)
    checkpoints.save(client, train_step=1)
    insert(client, 3)
    newest = checkpoints.save(client, train_step=2)
    chunks = newest / "chunks.tfrecord"
    if damage == "truncated":
        chunks.write_bytes(chunks.read_bytes()[:-7])
    elif damage == "flipped":
        content = bytearray(chunks.read_bytes())
        content[len(content) // 2] ^= 0xFF
        chunks.write_bytes(content)
    else:
        newest.rename(newest.with_name(newest.name + ".new"))
    _, client = start()
    assert held(client) == {1.0, 2.0}
    assert ("skipping" in caplog.text) == (damage != "unfinished")


def test_a_disk_that_fills_up_while_the_replay_is_saved_leaves_the_checkpoint_before(start):
    """Half a checkpoint taken for the newest would lose the replay; and a server that died of it, the run."""
    checkpoints, client = start()
    insert(client, 1, 2)
    saved = checkpoints.save(client, train_step=1)
    with client.trajectory_writer(num_keep_alive_refs=4_000) as writer:
        for step in np.random.default_rng(1).random((4_000, 3), np.float32):  # of which compressing makes no less
            writer.append({"x": step})
        writer.create_item("kept", 1.0, {"x": writer.history["x"][:]})
        writer.flush(timeout_ms=10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # files cannot grow beyond this, as if the disk was full
    try:
        with pytest.raises(RoleError, match=r"--root_dir: the replay could not be saved in '.*/replay': ") as raised:
            checkpoints.save(client, train_step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.exit_code == ExitCode.CANNOT_CREATE
    assert raised.value.message.endswith(
        "The checkpoints before it are kept; free some space, or give a directory that can be written."
    )
    assert "File too large" in raised.value.message, "it says why"
    left = [path for path in checkpoints.folder.iterdir() if path.name != ".lock"]
    assert sorted(left) == [saved, checkpoints.folder / "writing"]
    assert not list((checkpoints.folder / "writing").iterdir())
    insert(client, 3)
    assert client.server_info(timeout=5)["kept"].current_size == 4, "it goes on"
    checkpoints, client = start()
    assert held(client) == {1.0, 2.0}
    checkpoints.save(client, train_step=3)


def test_a_power_cut_at_any_moment_of_saving_leaves_the_replays_checkpoint_before(start, tmp_path, caplog):
    """Reverb syncs nothing: after a power cut every file of every checkpoint was empty, and the replay lost."""
    checkpoints, client = start()
    least: list[int] = []
    with watch(checkpoints.folder) as cuts:
        for step in range(1, MAX_TO_KEEP + 3):
            insert(client, step)
            checkpoints.save(client, train_step=step)
            least += [step - 1] * (len(cuts.left) - len(least))
    least += [MAX_TO_KEEP + 2] * (len(cuts.left) - len(least))
    assert len(least) > 10
    for number, (left, step) in enumerate(zip(cuts.left, least)):
        caplog.clear()
        with caplog.at_level("INFO"):
            TableCheckpoints(lay_out(left, tmp_path / str(number)), make_tables()[0]).make_checkpointer()
        found = re.search(r"restoring the replay's checkpoint .*: train step (\d+)", caplog.text)
        assert int(found[1] if found else 0) >= step


def test_another_capacity_is_refused_with_the_difference(start):
    """Reverb would silently continue with the old one (reverb#103, #118, #137)."""
    checkpoints, client = start()
    insert(client, 1)
    checkpoints.save(client, train_step=1)
    with pytest.raises(RoleError, match=r"'kept', max_size: the checkpoint has 10, this experiment 20\n") as raised:
        start(max_size=20)
    assert raised.value.exit_code == ExitCode.DATA


def test_the_disk_holds_a_bounded_number_of_checkpoints_and_no_leftovers(start):
    """A run of weeks saves ten thousand times."""
    checkpoints, client = start()
    for step in range(MAX_TO_KEEP + 3):
        insert(client, step)
        checkpoints.save(client, train_step=step)
    (checkpoints.folder / "9-9.new").mkdir()
    checkpoints, client = start()
    assert held(client) == {float(step) for step in range(MAX_TO_KEEP + 3)}
    left = sorted(path.name for path in checkpoints.folder.iterdir() if path.name not in (".lock", "writing"))
    assert left == ["0-1", "3-4", "4-5"], "the first will be the one that is older than a minute"
    assert not list((checkpoints.folder / "writing").iterdir())


def test_a_second_replay_server_is_kept_out_of_the_folder(start, tmp_path):
    """Each would delete the other's checkpoints."""
    start()
    with pytest.raises(RoleError, match="another replay server keeps its checkpoints") as raised:
        TableCheckpoints(tmp_path / "replay", make_tables()[0])
    assert raised.value.exit_code == ExitCode.OCCUPIED


def test_the_ratio_of_a_server_that_samples_goes_on_where_it_was(serve, tmp_path):
    """A limiter restored with another account blocks one side for ever (reverb#64), or lets it run ahead."""
    lives = []

    def begin():
        table = reverb.Table(
            "kept",
            sampler=reverb.selectors.Uniform(),
            remover=reverb.selectors.Fifo(),
            max_size=100,
            rate_limiter=reverb.rate_limiters.SampleToInsertRatio(
                samples_per_insert=2.0, min_size_to_sample=2, error_buffer=4.0
            ),
            signature=SIGNATURE,
        )
        checkpoints = TableCheckpoints(tmp_path / "replay", [table])
        server = reverb.Server([table], port=None, checkpointer=checkpoints.make_checkpointer())
        lives.append(server)
        return checkpoints, reverb.Client(f"localhost:{server.port}")

    checkpoints, client = begin()
    insert(client, 1, 2, 3)
    assert len(list(client.sample("kept", num_samples=4, emit_timesteps=False))) == 4
    checkpoints.save(client, train_step=1)
    checkpoints._lock.close()
    lives.pop().stop()

    _, client = begin()
    limiter = client.server_info(timeout=5)["kept"].rate_limiter_info
    assert (limiter.insert_stats.completed, limiter.sample_stats.completed) == (3, 4)
    insert(client, 4)
    assert len(list(client.sample("kept", num_samples=4, emit_timesteps=False))) == 4
    lives.pop().stop()
