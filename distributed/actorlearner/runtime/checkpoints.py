"""Checkpoints of TensorFlow objects, with numbers of ours beside them under the same step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import tensorflow as tf

from actorlearner.runtime.lifecycle import ExitCode, RoleError


class Checkpoints:
    """Keeps the newest few checkpoints in one folder."""

    def __init__(self, folder: Path, train_step: tf.Variable, objects: dict[str, Any], max_to_keep: int = 3):
        """Args:
        folder: Where they are.
        train_step: Counts what a checkpoint is named after.
        objects: TensorFlow trackables by name.
        max_to_keep: Older ones are deleted.
        """
        # Ours travel as JSON in a string variable, so that they are saved and restored in one piece with the weights.
        self._counts = tf.Variable("{}", dtype=tf.string, trainable=False, name="counts")
        self._train_step = train_step
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(train_step=train_step, counts=self._counts, **objects),
            str(folder),
            max_to_keep=max_to_keep,
            step_counter=train_step,
        )

    def restore(self) -> dict[str, Any]:
        """Returns the counts saved with the newest checkpoint after restoring it; an empty dict when there is none.

        Raises:
          RoleError: The checkpoint does not fit the objects (DATA).
        """
        newest = self._manager.latest_checkpoint
        if newest is None:
            return {}
        try:
            self._manager.checkpoint.restore(newest).assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            raise RoleError(
                f"the checkpoint {newest} does not fit this experiment: {str(error).splitlines()[0]} "
                "Give the settings it was made with, or another --root_dir.",
                ExitCode.DATA,
            ) from error
        logging.info("restored %s", newest)
        return json.loads(self._counts.numpy())

    def save(self, counts: dict[str, Any]) -> None:
        """Writes a checkpoint under the present train step; blocks until it is on disk."""
        self._counts.assign(json.dumps(counts))
        self._manager.save(checkpoint_number=self._train_step)
