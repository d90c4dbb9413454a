"""`actorlearner bench`: a pair measured with real processes, of which none is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.processes import RUN_SECS


def processes_in(folder: Path) -> list[int]:
    """Returns the processes that work somewhere below `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is none of ours
            continue
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the sides work."""
    (tmp_path / "sides").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "sides"))
    return tmp_path / "sides"


def test_a_pair_is_measured_and_written_down(processes, folder, tmp_path):
    """Benchmarks that are run once a year do not work once a year."""
    subjects = ("collect-cartpole", "learner-gpu")
    bench = processes.start("bench", "--only", *subjects, "--repeats=1", "--window_secs=0.5", "--output=figures.json")
    assert bench.wait(2 * RUN_SECS) == 0, bench.output
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["failures"] == {} and report["repeats"] == 1
    assert report["machine"]["cores"] >= 1 and report["machine"]["versions"]["tensorflow"].startswith("2.15")
    row, *on_gpu = report["rows"]
    assert row["name"] == "collect-cartpole"
    assert len(row["ours"]) == len(row["theirs"]) == 1
    assert row["ratio"] == row["ours"][0] / row["theirs"][0] > 0
    assert row["is_reached"] == (row["ratio"] >= row["bar"] == 12.0)
    assert ["actorlearner bench --only learner-gpu" in row["not_measured"] for row in on_gpu] == [True, True]
    assert "collect-cartpole-ours 1/1: environment steps per sec" in bench.output
    printed = processes.start("bench", "--markdown=figures.json")
    assert printed.wait(60) == 0
    assert printed.output.count("\n| ") == 4
    assert not processes_in(folder)


def test_a_stopped_bench_leaves_no_process_and_no_file(processes, folder, eventually):
    """Processes left in the background distort every later measurement."""
    bench = processes.start("bench", "--only", "collect-cartpole")
    eventually(lambda: len(processes_in(folder)) >= 3, secs=60)  # the side, its server and its actor
    bench.send(signal.SIGTERM)
    assert bench.wait(60) == 143
    eventually(lambda: not processes_in(folder), secs=10)
    assert not list(folder.iterdir())


def test_an_unknown_subject_is_refused_with_the_list(processes):
    bench = processes.start("bench", "--only", "lerner")
    assert bench.wait(60) == 64
    assert "there is no lerner; there are learner, learner-gpu, " in bench.stderr
