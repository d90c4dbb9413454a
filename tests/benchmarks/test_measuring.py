"""Sides: programs in processes of their own, which answer in time or are said to have failed."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from actorlearner import cli
from benchmarks import learner, run, weights
from benchmarks.measuring import Settings, Side, SideFailed, count_per_sec, find_family
from benchmarks.results import make_table


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(folder=tmp_path, peers_python=tmp_path / "nowhere", repeats=1, window_secs=0.1)


def test_a_side_that_ends_is_reported_with_its_last_words(settings):
    """A reader of 'it ended' needs the reason, not the path of a log in a deleted folder."""
    side = Side("broken", settings, ("learner", "no-such-program"))
    with contextlib.closing(side), pytest.raises(SideFailed) as raised:
        side.await_ready()
    assert "broken: it ended" in str(raised.value)
    assert "KeyError: 'no-such-program'" in str(raised.value)


def test_the_family_of_a_process_has_its_grandchildren():
    """Roles are children of a side: killing only the side leaves them running."""
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        grandchild = int(child.stdout.readline())
        assert find_family(os.getpid())[0] == os.getpid()
        assert {child.pid, grandchild} <= set(find_family(os.getpid()))
        os.kill(grandchild, 9)


def test_a_window_counts_whole_calls_only():
    """A call cut off by the window's end would count for more than was done."""
    calls: list[int] = []

    def call() -> int:
        calls.append(10)
        return 10

    assert 0 < count_per_sec(call, 0.05) <= sum(calls) / 0.05


def test_without_a_gpu_the_row_names_the_command_that_measures_it(settings, monkeypatch):
    """A missing row looks like a forgotten one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    rows = learner.compare_on_gpu(settings)
    assert [row.bar for row in rows] == [8.0, 1.0]
    assert all("actorlearner bench --only learner-gpu" in (row.not_measured or "") for row in rows)


def test_a_gpu_that_tensorflow_does_not_find_is_not_measured_and_says_what_to_install(settings, monkeypatch):
    """Without CUDA's libraries both sides run on the processor, and the table says that it was a GPU."""
    monkeypatch.setattr(learner, "find_gpu", lambda: "the driver's word")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    rows = learner.compare_on_gpu(settings)
    assert all("requirements-gpu.lock" in (row.not_measured or "") for row in rows)


def test_fast_updates_do_not_count_where_less_was_taken_in_than_asked_for():
    """Ingestion costs the learner time: without it, the figure is of a learner without actors."""
    stock = [{"updates_per_sec": 200.0}] * 3

    def judge(*ingested: float) -> list[bool | None]:
        ours = [{"updates_per_sec": 4_000.0, "environment_steps_per_sec": rate} for rate in ingested]
        return [row.is_reached for row in learner.judge_gpu(ours, stock)]

    assert judge(1_990.0, 1_901.0, 20.0) == [True, True]
    assert judge(1_990.0, 1_899.0, 20.0) == [False, False]


def test_the_longest_age_of_the_weights_is_told_beside_the_average():
    """An average of a third of a second may hide that an actor was left behind for ten."""
    bytes_ = {"bytes_per_step": 1.0, "bytes_of_full_pull": 1_000.0}
    ages = [(0.3, 0.6), (0.4, 12.0), (0.3, 0.7)]
    found = [{**bytes_, "average_age_secs": average, "longest_age_secs": longest} for average, longest in ages]
    _, age = weights.judge(found)
    assert age.is_reached is True
    assert age.details == {"longest_age_secs": [0.6, 12.0, 0.7]}
    printed = io.StringIO()
    Console(file=printed, width=300).print(make_table([age], "machine"))
    assert "Minitaur (the longest: 12 s)" in printed.getvalue()


def test_every_subject_is_listed_in_the_help(capsys, monkeypatch):
    """The command line is made before the benchmarks are imported, so it has a list of its own."""
    monkeypatch.setenv("COLUMNS", "1000")  # argparse breaks lines within a name
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(run.SUBJECTS) <= set(words)
