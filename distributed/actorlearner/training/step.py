"""The compiled call: several of the agent's own updates, each on a batch drawn inside the call."""

from __future__ import annotations

import logging
from typing import Any

import tensorflow as tf
from tf_agents.agents import tf_agent

from actorlearner.replay.base import BatchSource
from actorlearner.runtime.lifecycle import ExitCode, RoleError


def check_batch(batch_size: int, num_replicas: int) -> None:
    """Logs how the global batch is divided.

    Raises:
      RoleError: The replicas do not divide it (USAGE).
    """
    if batch_size % num_replicas:
        raise RoleError(
            f"train.batch_size = {batch_size} is the global batch and cannot be divided over {num_replicas} replicas. "
            f"Give a multiple of {num_replicas}.",
            ExitCode.USAGE,
        )
    logging.info("batch size %d: %d replica(s) of %d", batch_size, num_replicas, batch_size // num_replicas)


class TrainFunction:
    """`train(handle, num_updates)`: that many of the agent's own updates in one compiled call. It counts them.

    `train` returns the last update's scalars: `loss`, the agent's extra losses, and `staleness`, the mean number of
    train steps between the weights that collected the batch and the weights trained on it. With several replicas the
    losses are summed (TF-Agents scales each replica's by the global batch) and staleness is averaged.
    """

    def __init__(
        self,
        agent: tf_agent.TFAgent,
        train_step: tf.Variable,
        source: BatchSource,
        strategy: tf.distribute.Strategy,
        *,
        jit_compile: bool = False,
    ):
        """Args:
        agent: Whose `train` is called.
        train_step: Read, to say how old the data is.
        source: Of the batches.
        strategy: Whose replicas share each batch.
        jit_compile: Whether the call is one XLA program, batches and all: on a GPU the updates of a small network are
          bound by the launching of their many kernels otherwise. The source must be one that `can_fuse`.
        """
        update = tf.autograph.experimental.do_not_convert(agent.train)
        with strategy.scope():
            num_made = tf.Variable(0, dtype=tf.int64, trainable=False, name="num_updates_made")
        self._num_made = num_made

        def replica_step(*parts: Any) -> dict[str, tf.Tensor]:
            batch = source.unpack(*parts)
            acted = batch.acted_at >= 0
            age = tf.where(acted, tf.cast(train_step, tf.int64) - batch.acted_at, 0)
            staleness = tf.math.divide_no_nan(
                tf.cast(tf.reduce_sum(age), tf.float32), tf.reduce_sum(tf.cast(acted, tf.float32))
            )
            weights = () if batch.weights is None else (batch.weights,)
            loss_info = update(batch.experience, *weights)
            source.after_update(batch, loss_info)
            extra = loss_info.extra._asdict() if hasattr(loss_info.extra, "_asdict") else {}
            scalars = {name: value for name, value in extra.items() if tf.is_tensor(value) and value.shape.rank == 0}
            return {"loss": loss_info.loss, **scalars, "staleness": staleness / strategy.num_replicas_in_sync}

        def one_step(handle: Any) -> dict[str, tf.Tensor]:
            per_replica = strategy.run(replica_step, args=source.draw(handle))
            scalars = {
                name: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)
                for name, value in per_replica.items()
            }
            with tf.control_dependencies(list(scalars.values())):  # an update that fails is none
                num_made.assign_add(1)
            return scalars

        @tf.function(jit_compile=jit_compile or None)
        def train(handle: Any, num_updates: tf.Tensor) -> dict[str, tf.Tensor]:
            scalars = one_step(handle)  # the first update is outside the loop, so that autograph knows the shapes
            for _ in tf.range(num_updates - 1):
                scalars = one_step(handle)
            return scalars

        # Trace it now, so that the optimizers' variables exist before a checkpoint is restored.
        with strategy.scope():
            train.get_concrete_function(source.handle, tf.constant(1))
        self._train = train

    def __call__(self, handle: Any, num_updates: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._train(handle, num_updates)

    def num_made(self) -> int:
        """Returns how many updates were made so far, also while a call is under way."""
        return int(self._num_made.numpy())
