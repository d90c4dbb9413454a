"""Whoever accompanies a run ends with it, neither before nor never."""

from __future__ import annotations

import threading

import pytest

from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.lifecycle import ExitCode, Stop
from actorlearner.tools.await_end import await_end


class _CountingStop(Stop):
    """Counts the looks between which it is asked."""

    num_looks = 0

    def wait(self, secs):
        self.num_looks += 1
        return super().wait(secs)


@pytest.fixture
def stop():
    return _CountingStop()


@pytest.fixture
def waiting(tmp_path, stop):
    """`waiting(settle_secs)` starts the wait in a thread and returns its results as they come."""
    threads = []

    def start(settle_secs=3600.0):
        results = []
        wait = lambda: results.append(await_end(tmp_path, stop, settle_secs=settle_secs, every_secs=0.01))  # noqa: E731
        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        return results

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_it_waits_for_the_run_to_begin_and_to_end(waiting, stop, tmp_path, eventually):
    directory = RunDirectory(tmp_path)
    results = waiting()
    directory.write_json(directory.status, {"phase": "reporting", "time": 1e12})
    looks = stop.num_looks
    eventually(lambda: stop.num_looks > looks + 1)  # so one began after the write
    assert not results
    directory.note_end()
    eventually(lambda: results == [ExitCode.DONE])


def test_the_end_before_a_run_goes_on_is_none(waiting, tmp_path, eventually):
    """TensorBoard would be gone before a learner that goes on with a finished run has begun."""
    directory = RunDirectory(tmp_path)
    directory.write_json(directory.status, {"phase": "over", "time": 1.0})
    results = waiting()
    settled = waiting(settle_secs=0.05)
    eventually(lambda: settled == [ExitCode.DONE])
    assert not results
    directory.note_end()
    eventually(lambda: results == [ExitCode.DONE])
