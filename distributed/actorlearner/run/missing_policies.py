"""Numbered policies that a killed learner had not written; the restarted one writes them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import tensorflow as tf

from actorlearner.evaluations.ledger import EvaluationLedger
from actorlearner.run.policies import PolicyExport
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.variable_container import Snapshot


def make_up_missing(
    interval: int,
    train_step: tf.Variable,
    variables: Sequence[tf.Variable],
    checkpoints: Checkpoints,
    ledger: EvaluationLedger,
    export: PolicyExport,
) -> None:
    """Writes the missing numbered policies at multiples of `interval`, if their weights still exist.

    A learner that is killed between its checkpoint and the policy of the same train step never reaches that step again.
    The weights are the restored ones, those of older checkpoints, or of evaluations; afterwards all variables are as
    before.

    Raises:
      OSError, tf.errors.OpError: A policy could not be written.
    """
    restored = int(train_step.numpy())
    missing = export.find_missing(range(interval, restored + 1, interval))
    if not missing:
        return
    made = []
    if restored in missing:
        export.write_checkpoint()()
        made.append(restored)
    with contextlib.closing(checkpoints.visit([step for step in missing if step != restored])) as visited:
        for step in visited:
            export.write_checkpoint()()
            made.append(step)
    newest = Snapshot(-1, restored, [variable.numpy() for variable in variables])
    try:
        for step in sorted(set(missing) - set(made)):
            snapshot = ledger.weights(step)
            if snapshot is not None:
                snapshot.assign_to(variables)
                train_step.assign(step)
                export.write_checkpoint()()
                made.append(step)
    finally:
        newest.assign_to(variables)
        train_step.assign(restored)
    lost = sorted(set(missing) - set(made))
    if made:
        logging.info("wrote missing policies of train steps %s", ", ".join(f"{step:,}" for step in sorted(made)))
    if lost:
        logging.info(
            "%d numbered policies are missing, from train step %s to %s, because their weights no longer exist",
            len(lost),
            f"{lost[0]:,}",
            f"{lost[-1]:,}",
        )
