"""The end of a run: pending evaluations, the delivered policy, and the summary."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from actorlearner.agents.policies import Policies
from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.evaluations.queue import Purpose
from actorlearner.experiment import Experiment
from actorlearner.run.policies import PolicyExport
from actorlearner.run.record import RunRecord
from actorlearner.runtime.lifecycle import Stop, wait_until
from actorlearner.variable_container import Phase, Publisher, Snapshot


def finish(
    experiment: Experiment,
    policies: Policies,
    export: PolicyExport,
    ledger: EvaluationLedger,
    record: RunRecord,
    stop: Stop,
    patience_secs: float,
) -> None:
    """Chooses the best evaluated policy, evaluates it once more, and saves it as the run's policy.

    Raises:
      Stopped: `stop` was set.
      RoleError: A result did not come within `patience_secs` seconds after the previous one (UNAVAILABLE).
    """
    if experiment.schedule.eval_interval:
        record.note_phase("final evaluation")
        while pending := ledger.pending():
            _await_result(
                functools.partial(_has_fewer_pending, ledger, len(pending)),
                f"evaluations of {pending}",
                record,
                ledger,
                stop,
                patience_secs,
            )
        variables, train_step = policies.variables, policies.train_step
        newest = Snapshot(-1, int(train_step.numpy()), [variable.numpy() for variable in variables])
        best = ledger.best() or newest
        if best is newest:
            logging.warning("no evaluated policy's weights are available: delivering the last train step's policy")
        ledger.request(best, Purpose.DELIVERED)
        _await_result(
            lambda: ledger.delivered() is not None,
            "the delivered policy's evaluation",
            record,
            ledger,
            stop,
            patience_secs,
        )
        best.assign_to(variables)
        train_step.assign(best.train_step)
    record.note_phase("reporting")
    export.save_policies()
    record.write_summary()


def _has_fewer_pending(ledger: EvaluationLedger, num_pending: int) -> bool:
    return len(ledger.pending()) < num_pending


def _await_result(
    poll: Callable[[], bool], what: str, record: RunRecord, ledger: EvaluationLedger, stop: Stop, patience_secs: float
) -> None:
    def poll_and_send() -> bool:
        record.attendance.raise_if_all_failed("eval-actor")
        ledger.send_unsent()
        return poll()

    record.note_waiting(what)
    wait_until(
        poll_and_send,
        lambda: f"eval actors: {what}",
        stop=stop,
        deadline_secs=patience_secs,
        setting="learner.evaluation_patience_secs",
    )
    record.note_waiting(None)


def await_announced(publisher: Publisher, phase: Phase, stop: Stop, patience_secs: float) -> None:
    """Returns when the variable container says that training is in this phase.

    Raises:
      Stopped: `stop` was set.
      RoleError: The container did not answer within `patience_secs` seconds (UNAVAILABLE).
    """
    wait_until(
        lambda: publisher.announce(phase),
        lambda: f"the variable container at {publisher.address} to accept the end of training",
        stop=stop,
        deadline_secs=patience_secs,
        setting="--peer_patience_secs",
    )
