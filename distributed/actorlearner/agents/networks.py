"""Networks of actors and critics: dense layers, with optional normalised input and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import tensorflow as tf
from tf_agents.agents.sac import tanh_normal_projection_network
from tf_agents.networks import network
from tf_agents.utils import nest_utils

from actorlearner.agents.normalized import Normalizer


class LayerNorm(tf.keras.layers.Layer):
    """Layer normalisation (Ba et al., 2016) over the last axis, with gain and bias.

    Keras' own uses a batch normalisation kernel, which takes twice as long for small batches on a CPU.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any):
        super().__init__(**kwargs)
        self._epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        num_units = int(input_shape[-1])
        self._gain = self.add_weight("gain", [num_units], initializer="ones")
        self._bias = self.add_weight("bias", [num_units], initializer="zeros")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        centered = inputs - tf.reduce_mean(inputs, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True)
        return centered * tf.math.rsqrt(variance + self._epsilon) * self._gain + self._bias


def make_dense_layers(num_units: Sequence[int], layer_norm: bool) -> list[tf.keras.layers.Layer]:
    """Returns dense layers with ReLU, each with LayerNorm before its ReLU if asked; Glorot uniform weights."""
    layers: list[tf.keras.layers.Layer] = []
    for units in num_units:
        if layer_norm:
            layers += [tf.keras.layers.Dense(units), LayerNorm(), tf.keras.layers.ReLU()]
        else:
            layers.append(tf.keras.layers.Dense(units, activation="relu"))
    return layers


class DenseCritic(network.Network):
    """Value of an observation and an action: [B, ...], [B, A] -> [B].

    Without options it is the SAC tutorial's critic.
    """

    def __init__(
        self,
        input_tensor_spec: Any,
        num_units: Sequence[int],
        normalizer: Optional[Normalizer] = None,
        layer_norm: bool = False,
        name: str = "DenseCritic",
    ):
        """Args:
        input_tensor_spec: Specs of an observation and an action.
        num_units: Units of each hidden layer.
        normalizer: Applied before the first layer; None leaves observations unchanged.
        layer_norm: Whether each hidden layer has a LayerNorm.
        name: Name of the network.
        """
        super().__init__(input_tensor_spec=input_tensor_spec, state_spec=(), name=name)
        self._normalize = normalizer.make_layer() if normalizer else None
        self._layers_in_order = [
            *make_dense_layers(num_units, layer_norm),
            tf.keras.layers.Dense(1, name="value"),
        ]

    def call(
        self, inputs: Any, step_type: Any = (), network_state: Any = (), training: bool = False
    ) -> tuple[tf.Tensor, Any]:
        del step_type, training
        observation, action = inputs
        hidden = tf.concat([_as_vectors(observation, self._normalize), tf.cast(_only(action), tf.float32)], axis=-1)
        for layer in self._layers_in_order:
            hidden = layer(hidden)
        return tf.reshape(hidden, [-1]), network_state


class DenseActor(network.DistributionNetwork):
    """Distribution of the action at an observation, squashed into the action's bounds by tanh.

    Without options it is the SAC tutorial's actor: `ActorDistributionNetwork` with a `TanhNormalProjectionNetwork`.
    """

    def __init__(
        self,
        input_tensor_spec: Any,
        action_spec: Any,
        num_units: Sequence[int],
        normalizer: Optional[Normalizer] = None,
        layer_norm: bool = False,
        std_transform: Callable[[tf.Tensor], tf.Tensor] = tf.exp,
        last_layer_scale: float = 1.0,
        name: str = "DenseActor",
    ):
        """Args:
        input_tensor_spec: Spec of an observation.
        action_spec: Spec of an action.
        num_units: Units of each hidden layer.
        normalizer: Applied before the first layer; None leaves observations unchanged.
        layer_norm: Whether each hidden layer has a LayerNorm.
        std_transform: Computes standard deviations from the last layer's output.
        last_layer_scale: Factor on the Glorot initialisation of the last layer.
        name: Name of the network.
        """
        projection = tanh_normal_projection_network.TanhNormalProjectionNetwork(_only(action_spec), None, std_transform)
        projection._projection_layer.kernel_initializer = _ScaledGlorot(last_layer_scale)
        super().__init__(
            input_tensor_spec=input_tensor_spec,
            state_spec=(),
            output_spec=tf.nest.pack_sequence_as(action_spec, [projection.output_spec]),
            name=name,
        )
        self._action_spec = action_spec
        self._normalize = normalizer.make_layer() if normalizer else None
        self._layers_in_order = make_dense_layers(num_units, layer_norm)
        self._projection = projection

    def call(
        self, observation: Any, step_type: Any = (), network_state: Any = (), training: bool = False, mask: Any = None
    ) -> tuple[Any, Any]:
        del step_type, mask
        outer_rank = nest_utils.get_outer_rank(observation, self.input_tensor_spec)
        hidden = _as_vectors(observation, self._normalize, outer_rank)
        for layer in self._layers_in_order:
            hidden = layer(hidden)
        distribution, _ = self._projection(hidden, outer_rank, training=training)
        return tf.nest.pack_sequence_as(self._action_spec, [distribution]), network_state


class BoundedStd:
    """Standard deviations exp(x), with x squashed between two bounds by tanh."""

    def __init__(self, min_log_std: float, max_log_std: float):
        self._min, self._max = min_log_std, max_log_std

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return tf.exp(self._min + 0.5 * (self._max - self._min) * (tf.tanh(x) + 1.0))


class _ScaledGlorot(tf.keras.initializers.Initializer):
    def __init__(self, scale: float):
        self._scale = scale

    def __call__(self, shape: Any, dtype: Any = None, **kwargs: Any) -> tf.Tensor:
        return self._scale * tf.keras.initializers.GlorotUniform()(shape, dtype, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {"scale": self._scale}


def _only(nest: Any) -> Any:
    (leaf,) = tf.nest.flatten(nest)
    return leaf


def _as_vectors(observation: Any, normalize: Optional[tf.keras.layers.Layer], outer_rank: int = 1) -> tf.Tensor:
    """Returns an observation of one leaf as float vectors: [..., D]."""
    leaf = _only(observation)
    leaf = tf.cast(leaf, tf.float32) if normalize is None else normalize(leaf)
    if leaf.shape.rank == outer_rank + 1:
        return leaf
    return tf.reshape(leaf, tf.concat([tf.shape(leaf)[:outer_rank], [-1]], axis=0))
