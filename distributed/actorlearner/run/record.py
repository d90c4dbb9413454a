"""The run's numbers: read from the actors' reports in a thread, and written for people and tools."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Optional

from actorlearner import reports
from actorlearner.cluster import Cluster
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.evaluations.queue import (
    EvaluationResult,
    count_evaluations_due,
    take_evaluation_progress,
    take_evaluation_results,
)
from actorlearner.experiment import Experiment
from actorlearner.run.directory import RunDirectory
from actorlearner.run.status import Delivered, Status, Summary
from actorlearner.runtime import messages
from actorlearner.runtime.messages import Unreachable
from actorlearner.runtime.row_checks import keep_plausible
from actorlearner.runtime.telemetry import Events, Rate

ALIVE_SECS = 15.0
"""A collect actor counts as alive if it reported within this time; it reports every few seconds unless blocked."""


class RunRecord:
    """Keeps the run's numbers: reads the actors' reports in a thread, and writes status, metrics and summary."""

    def __init__(
        self,
        experiment: Experiment,
        cluster: Cluster,
        directory: RunDirectory,
        ledger: EvaluationLedger,
        versions: dict[str, str],
        counts: dict[str, Any],
        account: Callable[[], dict[str, Any]] = dict,
    ):
        self._experiment = experiment
        self._cluster = cluster
        self._directory = directory
        self._ledger = ledger
        self._versions = versions
        self._account = account
        self._replay: dict[str, Any] = {}  # the replay's account, at most a second old
        self._wall_secs_before = counts.get("wall_secs", 0.0)
        self._collected: dict[str, int] = keep_plausible(counts.get("collected", {}))
        # Steps in the replay count as collected even if the actor died before reporting them.
        before = keep_plausible({name: counts.get(name, 0) for name in ("environment_steps", "inserts")})
        self._least_steps: int = max([0, *before.values()])
        self._crashes: dict[str, int] = keep_plausible(counts.get("crashes", {}))
        self._started_at = time.monotonic()
        self._train_step = 0
        self._train_step_time: Optional[float] = None
        self._phase = "waiting"
        self._waiting_for: Optional[str] = None
        self._heard_at: dict[int, float] = {}  # time of each collect actor's last report, by task
        self._blocked_share = reports.BlockedShare()
        self.attendance = reports.Attendance()
        self._train_rate, self._collect_rate = Rate(), Rate()
        self._rates_lock = threading.Lock()  # the loop and a thread both read the rates
        self._taking = threading.Lock()  # one thread takes reports at a time
        self._status_lock = threading.Lock()  # two threads write the status
        self._train_events, self._eval_events = Events(directory.train_events), Events(directory.eval_events)
        self._closing = threading.Event()
        # A thread each: two of them wait while a server is down, and the status must stay true meanwhile.
        work = {"reports": self._take_reports, "evaluations": ledger.send_unsent, "status": self._write_status}
        self._threads = [
            threading.Thread(target=self._every_second, args=(name, do), name=name, daemon=True)
            for name, do in work.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def environment_steps(self) -> int:
        """Environment steps that actors reported, but at least the number of transitions in the replay's account."""
        return max(sum(list(self._collected.values())), self._least_steps)  # a copy, because the thread adds actors

    def counts(self) -> dict[str, Any]:
        """Returns what a checkpoint stores of this record."""
        return {
            "wall_secs": self._wall_secs(),
            "collected": dict(self._collected),
            "environment_steps": self.environment_steps,
            "crashes": dict(self._crashes),
        }

    def _wall_secs(self) -> float:
        return self._wall_secs_before + time.monotonic() - self._started_at

    def note_restored(self, step: int) -> None:
        """Notes the train step that this learner resumes from."""
        self._train_step = step
        with self._rates_lock:
            self._train_rate.update(step)

    def note_train_step(self, step: int) -> None:
        if step > self._train_step:
            self._train_step_time = time.time()
        self._train_step = step
        with self._rates_lock:
            self._train_rate.update(step)

    def note_waiting(self, what: Optional[str]) -> None:
        self._waiting_for = what
        if self._phase in ("waiting", "training"):
            self._phase = "training" if what is None else "waiting"

    def describe_actors(self) -> str:
        """Returns the number of live collect actors and their total rate, in words."""
        now = time.monotonic()
        num_alive = sum(now - heard_at <= ALIVE_SECS for heard_at in list(self._heard_at.values()))
        return f"actors: {num_alive} alive, {self._rates()['environment_steps_per_sec']:,.0f} steps/s"

    def note_phase(self, phase: str) -> None:
        """Writes it to status.json at once: the launcher decides by it whether an actor that ended is restarted."""
        self._phase = phase
        self._write_status()

    def log_configuration(self, operative_config: str) -> None:
        """Writes the operative configuration to TensorBoard."""
        self._train_events.write_text("operative_config", operative_config)

    def log_training(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one point of training to the log, TensorBoard and metrics.jsonl."""
        values = {**scalars, **self._rates()}
        held = self._replay.get("held")
        if held is not None:
            values["replay_held"] = held
        blocked_share = self._blocked_share.take()
        if blocked_share is not None:
            values["collect_blocked_share"] = blocked_share
        logging.info(
            "train step %d: loss %.4f, %.0f train steps/s, %.0f environment steps/s, %.0f%% waiting for data, "
            "data %.0f train steps old",
            step,
            scalars["loss"],
            values["train_steps_per_sec"],
            values["environment_steps_per_sec"],
            100 * scalars["waiting_share"],
            scalars["staleness"],
        )
        self._train_events.write(step, values)
        self._directory.add_metrics(
            "train", {"train_step": step, "environment_steps": self.environment_steps, **values}
        )

    def _every_second(self, name: str, do: Callable[[], None]) -> None:
        while not self._closing.wait(1.0):
            self._try(name, do)

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except OSError as error:  # such as a full disk: the learner's next write ends the run with an error
            logging.warning("the record's %s: %s", name, error)
        except Exception:  # one bad row or write must not stop the record
            logging.exception("the record's %s", name)

    def take_last_reports(self, secs: float = 1.0) -> None:
        """Takes the reports that have arrived; blocks at most `secs` seconds and raises nothing."""
        last = threading.Thread(target=self._try, args=("last reports", self._take_reports), daemon=True)
        last.start()
        last.join(secs)

    def _take_reports(self) -> None:
        with self._taking:
            self._take_reports_alone()

    def _take_reports_alone(self) -> None:
        try:
            # A short probe first, so that a server that is back is noticed soon.
            messages.ask_for_life(self._cluster.variables_address, timeout_secs=2.0)
            for words in reports.take_exit_reasons(self._cluster.variables_address):
                self.attendance.note_end(words)
            for report in reports.take_collect_reports(self._cluster.variables_address):
                self.attendance.note_life("collect-actor")
                self._heard_at[report.task] = time.monotonic()
                self._blocked_share.note(report)
                key = str(report.actor)
                self._collected[key] = max(report.environment_steps, self._collected.get(key, 0))
                self._crashes[key] = report.environment_crashes
            for result in take_evaluation_results(self._cluster.variables_address):
                self._record_evaluation(result)
            for progress in take_evaluation_progress(self._cluster.variables_address):
                self.attendance.note_life("eval-actor")
                self._ledger.note_progress(progress)
            self._ledger.send_lost(count_evaluations_due(self._cluster.variables_address))
        except Unreachable as error:
            logging.debug("%s", error)

    def _record_evaluation(self, result: EvaluationResult) -> None:
        entry = self._ledger.record(result)
        if entry is None:
            return
        logging.info(
            "evaluation at train step %d: average return %.2f over %d episodes, average length %.1f",
            entry["train_step"],
            entry["average_return"],
            entry["num_episodes"],
            entry["average_episode_length"],
        )
        self._eval_events.write(
            entry["train_step"],
            {"AverageReturn": entry["average_return"], "AverageEpisodeLength": entry["average_episode_length"]},
        )
        self._directory.add_metrics("evaluation", entry)

    def _write_status(self) -> None:
        with self._status_lock:
            self._directory.write_json(self._directory.status, self._status().to_json())

    def _rates(self) -> dict[str, Any]:
        with self._rates_lock:
            return {
                "train_steps_per_sec": self._train_rate.update(self._train_step),
                "environment_steps_per_sec": self._collect_rate.update(self.environment_steps),
            }

    def _status(self) -> Status:
        num_iterations = self._experiment.schedule.num_iterations
        self._replay = replay = self._account()
        self._least_steps = max(self._least_steps, replay.get("inserts", 0))
        rates = self._rates()
        train_rate = rates["train_steps_per_sec"]
        return Status(
            phase=self._phase,
            train_step=self._train_step,
            train_step_time=self._train_step_time,
            num_iterations=num_iterations,
            environment_steps=self.environment_steps,
            **rates,
            environment_crashes=sum(self._crashes.values()),
            last_evaluation=self._ledger.newest(),
            seconds_left=(num_iterations - self._train_step) / train_rate if train_rate else None,
            waiting_for=self._waiting_for,
            replay=replay,
            pending_evaluations=self._ledger.pending(),
            process=os.getpid(),
            time=time.time(),
        )

    def write_summary(self) -> None:
        """Writes summary.json."""
        delivered = self._ledger.delivered()
        summary: Summary = {
            "experiment": self._experiment.name,
            "seed": self._experiment.seed,
            "versions": self._versions,
            "starts": self._directory.read_starts(),
            "wall_seconds": round(self._wall_secs(), 1),
            "train_steps": self._train_step,
            "has_ended": True,
            "environment_steps": self.environment_steps,
            "environment_crashes": sum(self._crashes.values()),
            "evaluations": self._ledger.results(),
            "delivered": _to_delivered(delivered) if delivered else None,
        }
        self._directory.write_json(self._directory.summary, summary)

    def sync(self) -> None:
        """Blocks until metrics.jsonl is on disk. Raises `OSError`."""
        self._directory.sync_metrics()

    def close(self) -> None:
        """Stops the threads and writes status.json a last time; blocks at most 15 seconds."""
        self._closing.set()
        deadline = time.monotonic() + 15
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._write_status()


def _to_delivered(result: EvaluationResult) -> Delivered:
    return {
        "train_step": result.train_step,
        "average_return": result.average_return,
        "return_std": result.return_std,
        "average_episode_length": result.average_episode_length,
        "min_episode_length": result.min_episode_length,
        "num_truncated": result.num_truncated,
        "num_episodes": result.num_episodes,
    }
