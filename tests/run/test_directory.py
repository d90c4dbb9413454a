"""One learner at a time in a run directory, and never half a file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import actorlearner
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.lifecycle import ExitCode, RoleError

IDENTITY = {"agent": "SacAgent", "environment": "A-v0", "variables": ["w [2]"]}


def test_a_second_learner_is_kept_out_until_the_first_one_ends(tmp_path):
    """Two learners would overwrite each other's checkpoints."""
    code = """
import pathlib, sys
from actorlearner.run.directory import RunDirectory
directory = RunDirectory(pathlib.Path(sys.argv[1]))
directory.hold()
print("held", flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(actorlearner.__file__).parent.parent)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RoleError, match=f"another learner is running in --root_dir = '{tmp_path}'") as raised:
            RunDirectory(tmp_path).hold()
        assert raised.value.exit_code == ExitCode.OCCUPIED
        first.kill()  # a lock that a killed learner left behind would need a user to remove it
    RunDirectory(tmp_path).hold()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    """Found out an hour later, at the first checkpoint, it would cost the hour."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RoleError, match=f"--root_dir = '{tmp_path}/file' cannot be written") as raised:
        RunDirectory(tmp_path / "file").hold()
    assert raised.value.exit_code == ExitCode.CANNOT_CREATE


def test_the_same_run_may_start_again(tmp_path):
    """Identity goes through JSON, which makes lists of tuples."""
    directory = RunDirectory(tmp_path)
    directory.check_identity({**IDENTITY, "shape": (1, 2)})
    directory.check_identity({**IDENTITY, "shape": (1, 2)})


def test_another_run_is_refused_with_what_differs_and_nothing_is_changed(tmp_path):
    """Restoring another experiment's checkpoint fails in the depths of TensorFlow, or does not fail."""
    RunDirectory(tmp_path).check_identity(IDENTITY)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RoleError) as raised:
        RunDirectory(tmp_path).check_identity({**IDENTITY, "environment": "B-v0"})
    assert raised.value.exit_code == ExitCode.DATA
    assert "environment: the directory has 'A-v0', this run 'B-v0'" in str(raised.value)
    assert "SacAgent" not in str(raised.value)
    assert (tmp_path / "run.json").read_bytes() == before


def test_an_unreadable_identity_is_refused(tmp_path):
    """Taken for a new run, the checkpoints in it would be overwritten."""
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RoleError, match="run.json cannot be read") as raised:
        RunDirectory(tmp_path).check_identity(IDENTITY)
    assert raised.value.exit_code == ExitCode.DATA


def test_a_reader_never_sees_half_a_file(tmp_path):
    """The launcher reads status.json once a second while the learner writes it."""
    directory = RunDirectory(tmp_path)
    directory.write_json(directory.status, [0] * 3_000)
    done = threading.Event()

    def write():
        for number in range(30):
            directory.write_json(directory.status, [number] * 3_000)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert len(set(json.loads(directory.status.read_text()))) == 1
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_what_json_cannot_hold_becomes_null(tmp_path):
    """`NaN` is no JSON: one diverged loss would make every reader fail."""
    directory = RunDirectory(tmp_path)
    directory.write_json(directory.status, {"loss": math.nan, "rates": (math.inf, 1.5), "step": 3})
    assert json.loads(directory.status.read_text()) == {"loss": None, "rates": [None, 1.5], "step": 3}
    directory.add_metrics("train", {"loss": math.nan})
    directory.add_metrics("train", {"loss": 0.5})
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [(line["kind"], line["loss"]) for line in lines] == [("train", None), ("train", 0.5)]


def test_a_run_moved_aside_is_whole_and_its_place_is_free(tmp_path):
    """Starting over must not destroy the existing run."""
    directory = RunDirectory(tmp_path / "run")
    assert directory.move_aside() is None
    directory.hold()
    directory.summary.write_text("{}")
    aside = RunDirectory(tmp_path / "run")
    directory._lock.close()
    moved = aside.move_aside()
    assert moved is not None
    assert (moved / "summary.json").read_text() == "{}"
    assert not (tmp_path / "run").exists()


def test_a_run_at_work_is_not_moved_aside(tmp_path):
    """Its learner would continue to write in the renamed directory."""
    directory = RunDirectory(tmp_path / "run")
    directory.hold()
    with pytest.raises(RoleError, match="another learner is running") as raised:
        RunDirectory(tmp_path / "run").move_aside()
    assert raised.value.exit_code == ExitCode.OCCUPIED


def test_the_next_learner_knows_the_numbers_of_those_before_it(tmp_path):
    """It would have to watch for a dead one's heartbeat, six seconds at every restart."""
    first = RunDirectory(tmp_path)
    first.hold()
    assert first.past_learners() == []
    first.note_learner(7)
    first._lock.close()
    second = RunDirectory(tmp_path)
    second.hold()
    assert second.past_learners() == [7]


def test_processes_that_number_themselves_never_share_a_number(tmp_path):
    """Two collect actors with one task number would repeat each other's episodes and write into one another's files."""
    code = """
import pathlib, sys
from actorlearner.run.directory import RunDirectory
print(RunDirectory(pathlib.Path(sys.argv[1])).claim_task("collect-actor"), flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(actorlearner.__file__).parent.parent)}

    def start():
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    processes = [start() for _ in range(4)]
    try:
        numbers = [int(process.stdout.readline()) for process in processes]
        assert sorted(numbers) == [0, 1, 2, 3]
        gone = numbers.index(1)
        processes[gone].kill()
        processes[gone].wait(10)
        processes.append(start())
        assert int(processes[-1].stdout.readline()) == 1  # its events and its seeds go on under the number that is free
    finally:
        for process in processes:
            process.kill()
            process.communicate()
