"""The ledger of evaluations: each train step once, the best policy's weights kept."""

from __future__ import annotations

import dataclasses
import resource

import numpy as np
import portpicker
import pytest
import tensorflow as tf

from actorlearner.evaluations import queue
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.evaluations.queue import (
    EvaluationProgress,
    EvaluationRequests,
    EvaluationResult,
    Purpose,
    take_evaluation,
)
from actorlearner.run.directory import RunDirectory
from actorlearner.variable_container import Snapshot
from tests.power_cut import lay_out, watch

VARIABLES = [tf.Variable([0.0, 0.0]), tf.Variable(0.0)]


def snapshot(step):
    return Snapshot(step, step, [np.full(2, step, np.float32), np.array(step, np.float32)])


def result(step, average_return=0.0):
    return EvaluationResult(
        train_step=step,
        version=step,
        purpose=int(Purpose.PERIODIC),
        average_return=average_return,
        return_std=0.5,
        average_episode_length=5.0,
        min_episode_length=4,
        num_truncated=2,
        num_episodes=20,
        wall_secs=1.0,
        task=0,
    )


@pytest.fixture
def address(serve):
    return f"localhost:{serve(queue.make_tables(VARIABLES)).port}"


def make(address, folder):
    return EvaluationLedger(EvaluationRequests(address), folder)


def take(address):
    request = take_evaluation(address, VARIABLES)
    return request and (request.snapshot.train_step, request.purpose)


def kept(folder):
    return sorted(int(path.stem) for path in folder.glob("*.npz"))


def test_each_train_step_is_requested_and_recorded_once(address, tmp_path):
    """Two points at one train step, from two eval actors, make an unreadable curve."""
    ledger = make(address, tmp_path)
    ledger.request(snapshot(10), environment_steps=77)
    ledger.request(snapshot(10))
    assert ledger.pending() == [10]
    ledger.send_unsent()
    assert take(address) == (10, Purpose.PERIODIC)
    assert take(address) is None
    entry = ledger.record(result(10, 2.0))
    assert entry == {
        "train_step": 10,
        "environment_steps": 77,
        "average_return": 2.0,
        "return_std": 0.5,
        "average_episode_length": 5.0,
        "min_episode_length": 4,
        "num_truncated": 2,
        "num_episodes": 20,
        "wall_secs": 1.0,
    }
    assert ledger.record(result(10, 3.0)) is None
    ledger.request(snapshot(10))
    ledger.send_unsent()
    assert take(address) is None
    assert ledger.results() == [entry]
    assert ledger.pending() == []


def test_a_power_cut_at_any_moment_leaves_the_best_policys_weights_and_every_result_that_was_told(
    address, tmp_path, unused_address
):
    """`np.savez` syncs nothing: the policy that the run was to deliver would be a file without content."""
    folder = tmp_path / "evaluated"
    folder.mkdir()
    ledger = make(address, folder)
    told: list[int] = []
    with watch(folder) as cuts:
        for step, average_return in ((10, 1.0), (20, 5.0), (30, 3.0)):
            ledger.request(snapshot(step))
            ledger.record(result(step, average_return))
            told += [step - 10] * (len(cuts.left) - len(told))
    told += [30] * (len(cuts.left) - len(told))
    assert len(told) > 6
    for number, (left, step) in enumerate(zip(cuts.left[::2], told[::2])):  # the names that were there
        after = make(unused_address, lay_out(left, tmp_path / str(number)))
        assert [entry["train_step"] for entry in after.results()][: step // 10] == list(range(10, step + 1, 10))
        best = max(step for step in (10, 20) if step <= max(10, after.newest()["train_step"])) if step else None
        assert best is None or after.best().variables[1] == best


def test_only_the_best_policys_weights_stay_on_disk(address, tmp_path):
    """A run of a thousand evaluations would keep a thousand copies of the weights."""
    ledger = make(address, tmp_path)
    for step, average_return in ((0, 1.0), (10, 5.0), (20, 3.0)):
        ledger.request(snapshot(step))
        ledger.record(result(step, average_return))
    assert kept(tmp_path) == [10]
    best = ledger.best()
    assert best.train_step == 10
    assert [np.asarray(value).tolist() for value in best.variables] == [[10.0, 10.0], 10.0]
    assert ledger.newest()["train_step"] == 20


def test_of_equals_the_later_is_the_best(address, tmp_path):
    """Where many policies reach the highest return, the one that trained longest is the safest."""
    ledger = make(address, tmp_path)
    for step in (0, 10, 20):
        ledger.request(snapshot(step))
    for step in (0, 20, 10):  # as two eval actors may finish
        ledger.record(result(step, 7.0))
    assert ledger.best().train_step == 20
    assert kept(tmp_path) == [20]


def test_weights_stay_while_their_result_is_awaited(address, tmp_path):
    """They may turn out to be the best."""
    ledger = make(address, tmp_path)
    ledger.request(snapshot(0))
    ledger.request(snapshot(10))
    ledger.record(result(0, 9.0))
    assert kept(tmp_path) == [0, 10]
    assert ledger.best().train_step == 0


def test_results_and_best_weights_survive_a_restart(address, tmp_path):
    """A restarted learner would otherwise evaluate again, and hand over a worse policy."""
    ledger = make(address, tmp_path)
    for step, average_return in ((0, 1.0), (10, 8.0), (20, 2.0)):
        ledger.request(snapshot(step))
        ledger.record(result(step, average_return))
    again = make(address, tmp_path)
    assert again.results() == ledger.results()
    assert again.best().train_step == 10
    again.request(snapshot(10))
    again.send_unsent()
    assert take(address) is None


def test_the_delivered_policys_result_is_no_point_of_the_curve(address, tmp_path):
    """It has the train step of a point that is there already."""
    ledger = make(address, tmp_path)
    ledger.request(snapshot(10))
    ledger.record(result(10, 2.0))
    ledger.request(ledger.best(), Purpose.DELIVERED)
    ledger.send_unsent()
    assert take(address) == (10, Purpose.DELIVERED)
    assert take(address) is None
    assert ledger.delivered() is None
    delivered = dataclasses.replace(result(10, 2.5), purpose=int(Purpose.DELIVERED))
    assert ledger.record(delivered) is None
    assert ledger.delivered() == delivered
    assert [entry["average_return"] for entry in ledger.results()] == [2.0]


def test_a_ledger_without_results_has_no_best(address, tmp_path):
    """The learner asks at the end, also of a run that evaluates nothing."""
    ledger = make(address, tmp_path)
    assert ledger.best() is None
    assert ledger.newest() is None
    assert ledger.results() == []


def test_a_request_made_while_the_server_is_away_is_sent_later(serve, tmp_path, eventually):
    """The point would be missing from the curve."""
    port = portpicker.pick_unused_port()
    ledger = make(f"localhost:{port}", tmp_path)
    ledger.request(snapshot(0))
    ledger.request(snapshot(10))
    serve(queue.make_tables(VARIABLES), port)

    steps = set()

    def both_arrived():  # perhaps twice: a row whose confirmation was late counts as not sent
        ledger.send_unsent()
        taken = take(f"localhost:{port}")
        steps.update(taken[:1] if taken else ())
        return steps == {0, 10}

    eventually(both_arrived, secs=90)


def test_an_evaluation_that_nobody_is_at_work_on_is_queued_again(address, tmp_path, eventually):
    """An eval actor that dies takes the only copy of the request with it."""
    ledger = EvaluationLedger(EvaluationRequests(address), tmp_path, lease_secs=0.5)
    ledger.request(snapshot(10))
    ledger.send_unsent()
    assert take(address) == (10, Purpose.PERIODIC)
    ledger.note_progress(EvaluationProgress(train_step=10, purpose=int(Purpose.PERIODIC), task=0))
    ledger.send_lost(num_queued=0)
    assert take(address) is None, "it is in work"

    def is_queued_again():
        ledger.send_lost(num_queued=0)
        return take(address) == (10, Purpose.PERIODIC)

    eventually(is_queued_again, secs=30)


def test_an_evaluation_in_the_queue_or_in_work_is_not_queued_again(address, tmp_path, eventually):
    """Every eval actor would play it, and fall further behind."""
    ledger = EvaluationLedger(EvaluationRequests(address), tmp_path, lease_secs=0.3)
    ledger.request(snapshot(10))
    ledger.request(snapshot(20))
    ledger.send_unsent()
    assert take(address) == (10, Purpose.PERIODIC)
    looks = []

    def look():
        ledger.note_progress(EvaluationProgress(train_step=10, purpose=int(Purpose.PERIODIC), task=0))
        ledger.send_lost(num_queued=1)
        looks.append(1)
        return len(looks) > 40  # one every 0.02 s: several leases long

    eventually(look)
    assert take(address) == (20, Purpose.PERIODIC)
    assert take(address) is None


def test_the_environment_steps_of_an_evaluation_survive_a_restart(address, tmp_path):
    """The curve over environment steps would have a point at 0."""
    make(address, tmp_path).request(snapshot(10), environment_steps=77)
    again = make(address, tmp_path)
    again.request_owed(10)
    assert again.record(result(10))["environment_steps"] == 77


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"train_step": 0, "env',
        b"\0" * 700,
        b"\xff\xfe\n",
        b'{"train_step": 0}\n',
        b'[{"train_step": 0}]\n',
        b'{"train_step": 0, "average_return": 1.0}',  # the next line would be written behind it
    ],
)
def test_results_come_back_from_the_metrics_when_their_file_is_damaged(address, tmp_path, caplog, content):
    """A disk that lost its power ended the learner in a traceback, at every start; the curve is in a second file."""
    directory = RunDirectory(tmp_path)
    directory.hold()
    ledger = make(address, directory.evaluated)
    for step, average_return in ((0, 1.0), (10, 8.0), (20, 2.0)):
        ledger.request(snapshot(step), environment_steps=5 * step)
        directory.add_metrics("train", {"train_step": step, "loss": 0.5})
        directory.add_metrics("evaluation", ledger.record(result(step, average_return)))
    with open(directory.metrics, "a") as file:
        file.write('{"kind": "evaluation", "train_st')  # as a learner leaves it that was killed
    results = directory.evaluated / "results.jsonl"
    results.write_bytes(content)
    for _ in range(2):  # the next learner finds them as well
        again = EvaluationLedger(EvaluationRequests(address), directory.evaluated, metrics=directory.metrics)
        assert again.results() == ledger.results()
        best = again.best()
        assert best is not None and best.train_step == 10
    (warning,) = caplog.messages
    assert f"{results} is damaged (unreadable lines: 1) and was renamed" in warning
    assert f"3 results were found there and in {directory.metrics}" in warning
    assert results.with_name("results.jsonl.damaged").read_bytes() == content


def test_results_come_back_from_the_metrics_when_their_file_is_gone(address, tmp_path, caplog):
    """The curve would restart in the middle, and the best policy would be evaluated again."""
    directory = RunDirectory(tmp_path)
    directory.hold()
    ledger = make(address, directory.evaluated)
    for step, average_return in ((0, 1.0), (10, 8.0)):
        ledger.request(snapshot(step))
        directory.add_metrics("evaluation", ledger.record(result(step, average_return)))
    (directory.evaluated / "results.jsonl").unlink()
    for _ in range(2):
        again = EvaluationLedger(EvaluationRequests(address), directory.evaluated, metrics=directory.metrics)
        assert again.results() == ledger.results()
        assert again.best().train_step == 10
    assert len(caplog.messages) == 1 and "results.jsonl is missing. 2 results were found" in caplog.text


def test_a_run_that_begins_again_without_its_checkpoints_evaluates_again(address, tmp_path):
    """Its metrics belong to other policies."""
    directory = RunDirectory(tmp_path)
    directory.hold()
    directory.add_metrics("evaluation", {"train_step": 0, "average_return": 9.0})
    ledger = EvaluationLedger(EvaluationRequests(address), directory.evaluated, metrics=directory.metrics)
    assert ledger.results() == []


def test_a_damaged_line_costs_no_other_result(address, tmp_path):
    """Also without metrics.jsonl, which the same disk may have damaged."""
    ledger = make(address, tmp_path)
    for step in (0, 10, 20):
        ledger.request(snapshot(step))
        ledger.record(result(step, float(step)))
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
    again = make(address, tmp_path)
    assert [entry["train_step"] for entry in again.results()] == [0, 20]
    assert again.best().train_step == 20


def test_a_result_of_which_the_disk_took_a_part_does_not_spoil_the_next(address, tmp_path):
    """The next would be written behind the part, into the same line."""
    ledger = make(address, tmp_path)
    for step in (0, 10):
        ledger.request(snapshot(step))
    ledger.record(result(0))
    size = (tmp_path / "results.jsonl").stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, unlimited[1]))
    try:
        with pytest.raises(OSError):
            ledger.record(result(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert ledger.pending() == [10]
    ledger.record(result(10))
    assert [entry["train_step"] for entry in make(address, tmp_path).results()] == [0, 10]


def test_a_result_is_written_once(address, tmp_path):
    """Rewriting all results each time took half a percent of a learner's time after two hours, and kept growing."""
    ledger = make(address, tmp_path)
    for step in range(10):
        ledger.request(snapshot(step))
        before = (tmp_path / "results.jsonl").read_bytes() if step else b""
        ledger.record(result(step))
        content = (tmp_path / "results.jsonl").read_bytes()
        assert content.startswith(before)
        assert content.count(b"\n") == step + 1


def test_a_result_that_cannot_be_written_stays_awaited(address, tmp_path):
    """Taken off the list before it is on the disk, it would be in neither."""
    ledger = make(address, tmp_path)
    ledger.request(snapshot(10))
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(OSError, match="results.jsonl"):
        ledger.record(result(10))
    assert ledger.pending() == [10]
    (tmp_path / "results.jsonl").rmdir()
    assert ledger.record(result(10))["train_step"] == 10
    assert [entry["train_step"] for entry in make(address, tmp_path).results()] == [10]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04"])
def test_a_best_policy_whose_weights_are_lost_is_followed_by_the_best_after_it(address, tmp_path, caplog, content):
    """The learner ended in an AssertionError after its last train step, and again at every start."""
    ledger = make(address, tmp_path)
    ledger.request(snapshot(10))
    ledger.record(result(10, 9.0))
    if content is None:
        (tmp_path / "10.npz").unlink()
    else:
        (tmp_path / "10.npz").write_bytes(content)
    again = make(address, tmp_path)
    assert "the best policy's weights are lost" in caplog.text
    assert again.best() is None
    for step, average_return in ((20, 3.0), (30, 1.0)):
        again.request(snapshot(step))
        again.record(result(step, average_return))
    assert again.best().train_step == 20
    assert [entry["train_step"] for entry in again.results()] == [10, 20, 30]


def test_weights_lost_while_the_learner_lives_do_not_stay_the_best(address, tmp_path):
    """Each later policy would be dropped as worse than one whose weights are lost."""
    ledger = make(address, tmp_path)
    for step in (10, 20):
        ledger.request(snapshot(step))
    ledger.record(result(10, 9.0))
    (tmp_path / "10.npz").unlink()
    ledger.record(result(20, 3.0))
    assert ledger.best().train_step == 20
