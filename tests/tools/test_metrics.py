"""What Prometheus is told: the run's newest numbers, in the format it reads."""

from __future__ import annotations

import json
import signal
import time
import urllib.request

import portpicker
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from actorlearner.run.directory import RunDirectory
from actorlearner.tools.metrics import make_registry
from tests.e2e.processes import Processes


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path)
    numbers = {"train_step": 7, "train_steps_per_sec": 9.5, "seconds_left": None}
    replay = {"held": 3, "servers": {"a:1": True, "b:2": False}}
    status = {"phase": "training", **numbers, "replay": replay, "time": 100.0}
    directory.write_json(directory.status, status)
    directory.add_metrics("train", {"train_step": 5, "loss": 1.5})
    directory.add_metrics("train", {"train_step": 7, "loss": 0.5})
    directory.add_metrics("evaluation", {"train_step": 6, "average_return": float("nan")})
    with directory.metrics.open("a") as file:
        file.write('{"kind": "train", "loss"')  # as a reader sees it that comes while the learner writes
    return directory


def read(directory: RunDirectory) -> dict[str, float]:
    """Returns what Prometheus would: the samples by name, read by its own parser."""
    text = generate_latest(make_registry(directory)).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {f"{sample.name}{sample.labels or ''}": sample.value for sample in samples}


def test_the_newest_numbers_are_told_and_what_is_no_number_is_left_out(directory):
    times = {"time": time.time() - 30.0, "train_step_time": time.time() - 90.0}
    directory.write_json(directory.status, {**directory.read_json(directory.status), **times})
    values = read(directory)
    assert 30 <= values.pop("actorlearner_status_age_seconds") < 60
    assert 90 <= values.pop("actorlearner_train_step_age_seconds") < 120
    assert values == {
        "actorlearner_phase{'phase': 'training'}": 1,
        "actorlearner_train_step": 7,
        "actorlearner_train_steps_per_second": 9.5,
        "actorlearner_replay_held": 3,
        "actorlearner_replay_server_answers{'address': 'a:1'}": 1,
        "actorlearner_replay_server_answers{'address': 'b:2'}": 0,
        "actorlearner_train_train_step": 7,
        "actorlearner_train_loss": 0.5,
        "actorlearner_evaluation_train_step": 6,
    }


def test_a_run_that_has_not_begun_has_no_numbers(tmp_path):
    """Prometheus comes up before the learner does."""
    assert read(RunDirectory(tmp_path / "missing")) == {}


def test_the_command_serves_them_and_stops_when_told(directory, tmp_path, eventually):
    port = portpicker.pick_unused_port()
    with Processes(tmp_path) as processes:
        server = processes.start("metrics", directory.root, f"--port={port}")
        server.await_line("serving metrics")
        with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
            assert "actorlearner_train_step 7.0\n" in answer.read().decode()
        assert json.loads(directory.status.read_text())["train_step"] == 7  # it reads only
        server.send(signal.SIGTERM)
        assert server.wait(10) == 143
