"""Moments of observations in server-sampled batches: each item counts when it is drawn for the first time."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from actorlearner.replay.moments import Moments


class FirstLooks:
    """Accumulates observations inside the compiled loop; the sums are read between two calls."""

    def __init__(self, strategy: tf.distribute.Strategy, observation_spec: Any):
        """`observation_spec` is the spec of a batch of windows, with one leaf: [B, T, ...]."""
        (leaf,) = tf.nest.flatten(observation_spec)
        shape = leaf.shape.as_list()[2:]

        def make(of: list[int]) -> tf.Variable:
            return tf.Variable(
                np.zeros(of),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )

        with strategy.scope():
            self._sums = [make([]), make(shape), make(shape)]  # count, sum, sum of squares

    def count(self, observation: Any, is_first_look: tf.Tensor) -> None:
        """Adds the first observation of each window marked in `is_first_look`; called inside each replica.

        Shapes: `observation` has one leaf, [B, T, ...]; `is_first_look` is [B].
        """
        (leaf,) = tf.nest.flatten(observation)
        first = tf.cast(leaf[:, 0], tf.float64)
        weight = tf.cast(is_first_look, tf.float64)
        spread = tf.reshape(weight, [-1] + [1] * (first.shape.rank - 1))
        count, total, squares = self._sums
        count.assign_add(tf.reduce_sum(weight))
        total.assign_add(tf.reduce_sum(spread * first, axis=0))
        squares.assign_add(tf.reduce_sum(spread * tf.square(first), axis=0))

    def take(self) -> list[Moments]:
        """Returns the moments of the observations counted since the last call."""
        count, total, squares = (variable.read_value().numpy() for variable in self._sums)
        for variable in self._sums:
            variable.assign(tf.zeros_like(variable.read_value()))
        if not count:
            return []
        mean = total / count
        return [Moments(int(count), mean, np.maximum(squares - count * np.square(mean), 0.0))]
