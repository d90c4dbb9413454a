"""docker/monitoring read by a real Prometheus, of Debian's package `prometheus`; `tests/run.sh deploy`."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import portpicker
import pytest
import yaml

from tests.deploy.infrastructure import CHECKOUT, await_that, needed_command, run
from tests.e2e.processes import START_SECS, TINY, Processes, bind

MONITORING = CHECKOUT / "docker" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "actorlearner.json").read_text())

pytestmark = pytest.mark.deploy

PHASE = "actorlearner_phase{phase='%s'}"


def alerts_after(minutes: int, series: dict[str, str], folder: Path) -> set[str]:
    """Returns which alerts promtool says fire so long after `series`, in its notation, began, a value each minute."""
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    firing = set()
    for alert in (rule["alert"] for rule in rules):
        question = {
            "rule_files": [str(MONITORING / "alerts.yml")],
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [{"series": name, "values": values} for name, values in series.items()],
                    "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": []}],
                }
            ],
        }
        (folder / "question.yml").write_text(yaml.safe_dump(question))
        answer = subprocess.run(
            ["promtool", "test", "rules", str(folder / "question.yml")], capture_output=True, text=True, timeout=60
        )
        if answer.returncode:
            assert f"alertname: {alert}" in answer.stdout + answer.stderr, answer.stdout + answer.stderr
            firing.add(alert)
    return firing


def test_an_alert_fires_for_a_learner_that_is_silent_and_for_none_that_is_through(tmp_path):
    """An alert at the end of every training would soon be ignored."""
    needed_command("promtool", "prometheus")
    age, step = "actorlearner_status_age_seconds", "actorlearner_train_step"
    silent, fresh, stuck, trains = "0+60x30", "5x30", "700x30", "0+1000x30"
    assert alerts_after(2, {age: silent, PHASE % "training": "1x30"}, tmp_path) == set()
    assert alerts_after(5, {age: silent, PHASE % "training": "1x30"}, tmp_path) == {"LearnerSilent"}
    assert alerts_after(25, {age: silent, PHASE % "over": "1x30"}, tmp_path) == set()
    assert alerts_after(25, {age: fresh, step: stuck, PHASE % "waiting": "1x30"}, tmp_path) == {"NoTraining"}
    assert alerts_after(25, {age: fresh, step: trains, PHASE % "training": "1x30"}, tmp_path) == set()


class Prometheus:
    """A Prometheus with the shipped configuration, but for the addresses."""

    def __init__(self, processes: Processes, metrics_port: int, folder: Path):
        configuration = (MONITORING / "prometheus.yml").read_text()
        for shipped, here in {
            "metrics:9464": f"localhost:{metrics_port}",
            "/etc/prometheus/alerts.yml": str(MONITORING / "alerts.yml"),
        }.items():
            assert shipped in configuration
            configuration = configuration.replace(shipped, here)
        (folder / "prometheus.yml").write_text(configuration)
        run("promtool", "check", "config", folder / "prometheus.yml")
        self._address = f"localhost:{portpicker.pick_unused_port()}"
        self._process = processes.start_program(
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/prometheus",
            f"--web.listen-address={self._address}",
        )
        self._process.await_line("Server is ready to receive web requests")

    def ask(self, path: str, **parameters: str) -> Any:
        """Returns the data of an answer of its HTTP API."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]


def test_every_panel_finds_its_numbers_of_a_run_at_work(tmp_path):
    """A metric that was renamed leaves an empty panel, and no error."""
    needed_command("prometheus", "prometheus")
    queries = {target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    assert len(queries) >= 10
    with Processes(tmp_path) as processes:
        bindings = bind(*TINY, "train.num_iterations = 1_000_000")
        training = processes.start("train", "dqn_cartpole", "--root_dir=run", *bindings)
        port = portpicker.pick_unused_port()
        metrics = processes.start("metrics", "run", f"--port={port}")
        metrics.await_line("serving metrics")
        prometheus = Prometheus(processes, port, tmp_path)
        found: set[str] = set()

        def every_panel_has_some() -> bool:
            found.update(query for query in queries - found if prometheus.ask("query", query=query)["result"])
            return found == queries

        await_that(
            every_panel_has_some, "every panel's numbers", START_SECS, lambda: f"{queries - found}\n{training.output}"
        )
        (target,) = prometheus.ask("targets")["activeTargets"]
        assert target["health"] == "up", target

        def rules() -> dict[str, str]:
            (group,) = prometheus.ask("rules")["groups"]
            return {rule["name"]: rule["health"] for rule in group["rules"]}

        await_that(lambda: "unknown" not in rules().values(), "the rules' first evaluation", 60, lambda: str(rules()))
        assert rules() == {"LearnerSilent": "ok", "NoTraining": "ok"}
