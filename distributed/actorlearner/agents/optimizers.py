"""Adam for agents, with an optional step-size decay and decoupled weight decay."""

from __future__ import annotations

from typing import Any, Optional

import tensorflow as tf


def make_adam(
    learning_rate: float,
    *,
    final_learning_rate: Optional[float] = None,
    decay_steps: int = 0,
    weight_decay: float = 0.0,
) -> tf.keras.optimizers.legacy.Optimizer:
    """Returns Adam (Kingma and Ba, 2015), or AdamW (Loshchilov and Hutter, 2019) with `weight_decay`.

    Args:
      learning_rate: Step size at the first update.
      final_learning_rate: Step size from update `decay_steps` on, reached linearly; None keeps `learning_rate`.
      decay_steps: Updates over which the step size falls.
      weight_decay: Each update takes this times the step size off each kernel; biases and gains are left alone.

    Raises:
      ValueError: Only one of `final_learning_rate` and `decay_steps` is given.
    """
    if (final_learning_rate is None) != (not decay_steps):
        raise ValueError(
            f"final_learning_rate = {final_learning_rate} with learning_rate_decay_steps = {decay_steps}: the step "
            "size falls only where both are given. Give the other one too, or neither."
        )
    rate: Any = learning_rate
    if final_learning_rate is not None and decay_steps:
        rate = tf.keras.optimizers.schedules.PolynomialDecay(learning_rate, decay_steps, final_learning_rate)
    if weight_decay:
        return AdamW(rate, weight_decay)
    return tf.keras.optimizers.legacy.Adam(rate)


class AdamW(tf.keras.optimizers.legacy.Adam):
    """Adam with decoupled weight decay, as a legacy optimizer, which TF-Agents uses unchanged.

    `SacAgent` converts each new optimizer to a legacy one. On the way Keras' own AdamW becomes a string, and the new
    Adam loses its `weight_decay`, both silently.
    """

    def __init__(self, learning_rate: Any, weight_decay: float, name: str = "AdamW", **kwargs: Any):
        super().__init__(learning_rate, name=name, **kwargs)
        self._weight_decay = weight_decay

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "weight_decay": self._weight_decay}

    def _resource_apply_dense(self, grad: tf.Tensor, var: tf.Variable, apply_state: Any = None) -> Any:
        if "kernel" in var.name:
            var.assign_sub(self._decayed_lr(var.dtype) * self._weight_decay * var)
        return super()._resource_apply_dense(grad, var, apply_state)
