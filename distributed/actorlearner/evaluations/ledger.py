"""The learner's ledger of evaluations: pending requests, results, and the best policy's weights."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, Optional

import numpy as np

from actorlearner.evaluations.queue import (
    EvaluationProgress,
    EvaluationRequest,
    EvaluationRequests,
    EvaluationResult,
    Purpose,
)
from actorlearner.runtime import durable_files
from actorlearner.runtime.messages import Unreachable
from actorlearner.variable_container import Snapshot


@dataclasses.dataclass
class _Pending:
    """A request without a result so far; `sent_at` is None until it is in the queue. Times are monotonic."""

    request: EvaluationRequest
    environment_steps: int = 0
    sent_at: Optional[float] = None
    alive_at: float = -math.inf  # last time it was known to be queued or evaluated
    is_taken: bool = False


class EvaluationLedger:
    """Queues each due snapshot once and keeps its weights on disk until it is known whether they are the best.

    Thread-safe: the learner's loop requests; the record's threads send, record and find lost requests.
    """

    def __init__(
        self,
        requests: EvaluationRequests,
        folder: Path,
        *,
        retry_secs: float = 900.0,
        lease_secs: float = 6.0,
        metrics: Optional[Path] = None,
    ):
        """Args:
        requests: The queue from which eval actors take snapshots.
        folder: Holds the snapshots' weights, one file each, and the results so far.
        retry_secs: A request without a result is queued again after this time, even if its eval actor sends heartbeats.
        lease_secs: A request is queued again if it was neither queued nor had a heartbeat for this time: its eval actor
          died, or the queue did with its server.
        metrics: The run's metrics.jsonl, which holds the results too; read if their own file is damaged or missing.
        """
        self._requests = requests
        self._folder = folder
        self._retry_secs = retry_secs
        self._lease_secs = lease_secs
        self._looked_at = -math.inf
        self._sending = threading.Lock()
        self._results_file = folder / "results.jsonl"
        self._lock = threading.Lock()
        self._results = self._read_results(metrics)
        self._best = max(filter(self._has_weights, self._results), key=self._rank, default=None)
        if self._results and self._best is None:
            logging.warning("%s: the best policy's weights are lost; keeping the best from now on", folder)
        self._pending: dict[int, _Pending] = {}
        self._pending_delivered: Optional[_Pending] = None
        self._delivered: Optional[EvaluationResult] = None
        self._heard_at = time.monotonic()

    def _read_results(self, metrics: Optional[Path]) -> dict[int, dict[str, Any]]:
        results, num_damaged = _find_results(self._results_file)
        is_missing = not self._results_file.exists()
        found = _find_results(metrics)[0] if metrics and (num_damaged or is_missing) else {}
        if is_missing and not (found and any(self._folder.glob("*.npz"))):
            return {}  # a new run, or one that restarts without its checkpoints
        if num_damaged or is_missing:
            results = {**found, **results}
            if not is_missing:
                self._results_file.replace(self._results_file.with_name(self._results_file.name + ".damaged"))
            logging.warning(
                "%s is %s. %d results were found there and in %s; a policy without a result is evaluated again if its "
                "weights still exist.",
                self._results_file,
                "missing" if is_missing else f"damaged (unreadable lines: {num_damaged}) and was renamed",
                len(results),
                metrics,
            )
            durable_files.write(self._results_file, "".join(json.dumps(result) + "\n" for result in results.values()))
        return results

    def request(self, snapshot: Snapshot, purpose: Purpose = Purpose.PERIODIC, *, environment_steps: int = 0) -> None:
        """Makes a snapshot, taken after `environment_steps`, due for evaluation; each train step once.

        Never blocks on the network: `send_unsent` queues it. The weights are on disk when this returns.
        """
        pending = _Pending(EvaluationRequest(snapshot, purpose), environment_steps)
        with self._lock:
            if purpose is Purpose.DELIVERED:
                self._pending_delivered = pending
            elif snapshot.train_step in self._results or snapshot.train_step in self._pending:
                return
            else:
                content = io.BytesIO()
                np.savez(content, *snapshot.variables, environment_steps=environment_steps)
                durable_files.write(self._weights_file(snapshot.train_step), content.getvalue())
                self._pending[snapshot.train_step] = pending

    def request_owed(self, train_step: int) -> None:
        """Requests again what the previous learner, which ended at `train_step`, still waited for.

        Its server and eval actors may be gone. If not, a snapshot may be evaluated twice; it is recorded once.
        """
        for file in sorted(self._folder.glob("*.npz"), key=lambda file: int(file.stem)):
            step = int(file.stem)
            with self._lock:
                if step in self._results or step in self._pending:
                    continue
                read = _read_weights(file, step) if step <= train_step else None
                if read is None:  # half written, or of train steps that will be repeated
                    file.unlink()
                    continue
                snapshot, environment_steps = read
                self._pending[step] = _Pending(EvaluationRequest(snapshot, Purpose.PERIODIC), environment_steps)

    def send_unsent(self) -> None:
        """Queues requests; again if the server was down, or no result arrived for `retry_secs`.

        Blocks at most about five seconds.
        """
        with self._sending:  # one caller at a time, so that no request is queued twice
            now = time.monotonic()
            for pending in self._everything():
                # Eval actors that still deliver results are only late; more requests would make them later.
                if pending.sent_at is not None and now - max(pending.sent_at, self._heard_at) < self._retry_secs:
                    continue
                train_step = pending.request.snapshot.train_step
                if pending.sent_at is not None:
                    logging.warning(
                        "no result for train step %d in %.0f s: evaluating it again", train_step, self._retry_secs
                    )
                try:
                    self._requests.put(pending.request)
                except Unreachable as error:
                    logging.warning("evaluation of train step %d not queued yet: %s", train_step, error)
                    return
                pending.sent_at = pending.alive_at = time.monotonic()
                pending.is_taken = False

    def _everything(self) -> list[_Pending]:
        with self._lock:
            return [*self._pending.values(), *filter(None, [self._pending_delivered])]

    def note_progress(self, progress: EvaluationProgress) -> None:
        """Notes an eval actor's heartbeat."""
        for pending in self._everything():
            request = pending.request
            if (request.snapshot.train_step, request.purpose) == (progress.train_step, progress.purpose):
                pending.is_taken, pending.alive_at = True, time.monotonic()

    def send_lost(self, num_queued: int) -> None:
        """Queues lost requests again: those whose eval actor died, or whose queue was lost with its server.

        Call it about every second while the server answers; time without an answer does not count. Blocks as
        `send_unsent`.

        Args:
          num_queued: Number of snapshots in the queue now.
        """
        with self._sending:
            now = time.monotonic()
            could_hear = now - self._looked_at < self._lease_secs / 2
            self._looked_at = now
            sent = [pending for pending in self._everything() if pending.sent_at is not None]
            untaken = sorted((p for p in sent if not p.is_taken), key=lambda p: p.sent_at or 0.0)
            for pending in sent if not could_hear else untaken[max(0, len(untaken) - num_queued) :]:
                pending.alive_at = now
            for pending in sent:
                if now - pending.alive_at > self._lease_secs:
                    logging.warning(
                        "the evaluation of train step %d has no heartbeat any more: evaluating it again",
                        pending.request.snapshot.train_step,
                    )
                    pending.sent_at = None
        self.send_unsent()

    def record(self, result: EvaluationResult) -> Optional[dict[str, Any]]:
        """Returns the result as summary.json lists it; None if it was not pending."""
        with self._lock:
            self._heard_at = time.monotonic()
            if result.is_delivered:
                waited_for = self._pending_delivered
                if waited_for is not None and waited_for.request.snapshot.train_step == result.train_step:
                    self._delivered, self._pending_delivered = result, None
                return None
            if result.train_step not in self._pending:
                return None
            entry = {
                "train_step": result.train_step,
                "environment_steps": self._pending[result.train_step].environment_steps,
                "average_return": result.average_return,
                "return_std": round(result.return_std, 4),
                "average_episode_length": result.average_episode_length,
                "min_episode_length": result.min_episode_length,
                "num_truncated": result.num_truncated,
                "num_episodes": result.num_episodes,
                "wall_secs": round(result.wall_secs, 3),
            }
            # Appended, not rewritten: a run of days has tens of thousands.
            durable_files.append(self._results_file, json.dumps(entry) + "\n")
            self._results[result.train_step] = entry
            del self._pending[result.train_step]
            if self._best is not None and not self._weights_file(self._best).exists():
                logging.warning("%s: the best policy's weights are lost; keeping the best from now on", self._folder)
                self._best = None
            known = [result.train_step] if self._best is None else [self._best, result.train_step]
            self._best = max(known, key=self._rank)
            for train_step in set(known) - {self._best}:
                self._weights_file(train_step).unlink(missing_ok=True)
            return entry

    def _weights_file(self, train_step: int) -> Path:
        return self._folder / f"{train_step}.npz"

    def _has_weights(self, train_step: int) -> bool:
        return _read_weights(self._weights_file(train_step), train_step) is not None

    def _rank(self, train_step: int) -> tuple[float, int]:
        """Returns what is highest for the best; of equal returns the later policy wins."""
        return self._results[train_step]["average_return"], train_step

    def results(self) -> list[dict[str, Any]]:
        """Returns the results known so far, by train step."""
        with self._lock:
            return [self._results[train_step] for train_step in sorted(self._results)]

    def newest(self) -> Optional[dict[str, Any]]:
        """Returns the result of the latest train step that has one."""
        with self._lock:
            return self._results[max(self._results)] if self._results else None

    def pending(self) -> list[int]:
        """Returns the train steps whose results have not come back."""
        with self._lock:
            return sorted(self._pending)

    def delivered(self) -> Optional[EvaluationResult]:
        """Returns the result of the delivered policy, once it has arrived."""
        return self._delivered

    def weights(self, train_step: int) -> Optional[Snapshot]:
        """Returns the weights of a pending or best train step; None if they are missing."""
        read = _read_weights(self._weights_file(train_step), train_step)
        return read and read[0]

    def best(self) -> Optional[Snapshot]:
        """Returns the weights of the policy with the highest average return; None if there are none, or lost."""
        with self._lock:
            if self._best is None:
                return None
            read = _read_weights(self._weights_file(self._best), self._best)
            return read and read[0]


def _find_results(lines: Path) -> tuple[dict[int, dict[str, Any]], int]:
    """Returns the results in results.jsonl or metrics.jsonl, by train step, and the number of damaged lines."""
    results: dict[int, dict[str, Any]] = {}
    num_damaged = 0
    if not lines.exists():
        return results, num_damaged
    for line in lines.read_bytes().splitlines(keepends=True) or [b""]:
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut short")
            values = json.loads(line)
            if values.pop("kind", "evaluation") == "evaluation":
                values.pop("time", None)
                int(values["train_step"]), float(values["average_return"])
                results[values["train_step"]] = values
        except (ValueError, TypeError, KeyError, AttributeError):
            num_damaged += 1
    return results, num_damaged


def _read_weights(path: Path, train_step: int) -> Optional[tuple[Snapshot, int]]:
    """Returns a file's snapshot and its environment steps; None if the file is damaged."""
    try:
        with np.load(path) as file:
            variables = [file[name] for name in file.files if name != "environment_steps"]
            environment_steps = int(file["environment_steps"]) if "environment_steps" in file.files else 0
            return Snapshot(version=-1, train_step=train_step, variables=variables), environment_steps
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
