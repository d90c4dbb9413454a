"""Observation normalisation for any algorithm: a layer that comes first in each of its networks.

Fixed centre and spread come from gin. Running ones are the mean and the standard deviation of all observations that the
learner has received, each counted once; they are variables of the policy, so they travel with the weights to actors,
checkpoints and SavedModels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Optional

import numpy as np
import tensorflow as tf

from actorlearner.agents.base import PositiveFloat


@dataclasses.dataclass(frozen=True)
class NormalizedObservations:
    """Bindings of every algorithm with normalised observations.

    Attributes:
      normalize_observations: None leaves observations unchanged; "fixed" uses `observation_center` and
        `observation_spread`; "running" the mean and standard deviation of the observations collected so far.
      observation_center, observation_spread: One number for all components of an observation, or one for each. Used by
        "fixed": the networks' input is (observation - center) / spread.
      observation_clip: Normalised components are clipped to plus and minus this.
    """

    normalize_observations: Optional[Literal["fixed", "running"]] = None
    observation_center: tuple[float, ...] = (0.0,)
    observation_spread: tuple[PositiveFloat, ...] = (1.0,)
    observation_clip: PositiveFloat = 5.0

    def make_normalizer(self, observation_spec: Any) -> Optional[Normalizer]:
        """Returns the factory of one agent's normalisation layers; None if observations stay unchanged.

        Raises:
          ValueError: The observation is not one array of floats, or centre and spread do not fit it.
        """
        if self.normalize_observations is None:
            return None
        leaves = tf.nest.flatten(observation_spec)
        if len(leaves) != 1 or not leaves[0].dtype.is_floating:
            raise ValueError(
                f"normalize_observations = '{self.normalize_observations}' needs one array of floats for an "
                f"observation, but the environment's is {observation_spec}. Leave it out."
            )
        shape = leaves[0].shape.as_list()
        if self.normalize_observations == "running":
            return Normalizer(self.observation_clip, statistics=RunningStatistics(shape))
        num_components = shape[-1] if shape else 1
        for name in ("observation_center", "observation_spread"):
            given = len(getattr(self, name))
            if given not in (1, num_components):
                raise ValueError(
                    f"{name} has {given} numbers, but an observation has {num_components} components. Give one number "
                    "for all, or one for each."
                )
        return Normalizer(
            self.observation_clip,
            center=np.array(self.observation_center, np.float32),
            scale=1.0 / np.array(self.observation_spread, np.float32),
        )


class RunningStatistics(tf.Module):
    """Mean and variance of observations, as variables. Before the first update they leave observations unchanged."""

    def __init__(self, shape: Any):
        super().__init__(name="observation_statistics")

        def make(name: str, value: Any, dtype: tf.DType) -> tf.Variable:
            return tf.Variable(value, dtype=dtype, trainable=False, name=name)

        self.mean = make("observation_mean", np.zeros(shape), tf.float32)
        self.variance = make("observation_variance", np.ones(shape), tf.float32)
        self.count = make("observation_count", 0.0, tf.float32)

    def update(self, moments: Any) -> None:
        """Adds more observations. Not for compiled code; call it between two compiled calls.

        Args:
          moments: Has `count`, `mean` and `squares` of the observations; `squares` is the sum of squared distances from
            `mean`.

        Source: Chan, Golub and LeVeque (1979), updating formulae for sample variances.
        """
        if not moments.count:
            return
        before, mean = float(self.count.numpy()), self.mean.numpy().astype(np.float64)
        squares = self.variance.numpy().astype(np.float64) * before
        count = before + moments.count
        distance = moments.mean - mean
        squares += moments.squares + np.square(distance) * (before * moments.count / count)
        self.mean.assign((mean + distance * (moments.count / count)).astype(np.float32))
        self.variance.assign((squares / count).astype(np.float32))
        self.count.assign(np.float32(count))


class Normalizer:
    """Makes the first layer of each network of one agent; all of them share the same statistics."""

    def __init__(
        self,
        clip: float,
        *,
        center: Any = 0.0,
        scale: Any = 1.0,
        statistics: Optional[RunningStatistics] = None,
    ):
        """Args:
        clip: Normalised components are clipped to plus and minus this.
        center, scale: The networks' input is (observation - center) * scale, unless `statistics` are given.
        statistics: Provide mean and standard deviation instead.
        """
        self.clip = clip
        self.center = center
        self.scale = scale
        self.statistics = statistics

    def make_layer(self) -> NormalizationLayer:
        return NormalizationLayer(self)


MIN_VARIANCE = 1e-6
"""Smallest standard deviation, so that a constant component is scaled by at most a thousand."""


class NormalizationLayer(tf.keras.layers.Layer):
    """Observations [..., D] -> normalised observations [..., D], float32, within plus and minus the normaliser's clip.

    A copy of the layer, in a copy of its network, shares the statistics.
    """

    def __init__(self, normalizer: Normalizer, name: str = "normalized", **kwargs: Any):
        super().__init__(**{"name": name, "trainable": False, **kwargs})
        self._normalizer = normalizer
        statistics = normalizer.statistics
        # As attributes, so that Keras tracks them as weights, and they become variables of the policy.
        self._statistics = [statistics.mean, statistics.variance, statistics.count] if statistics else []

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "normalizer": self._normalizer}

    def __deepcopy__(self, memo: Any) -> NormalizationLayer:
        return type(self).from_config(self.get_config())

    def call(self, observation: tf.Tensor) -> tf.Tensor:
        normalizer = self._normalizer
        center, scale = normalizer.center, normalizer.scale
        if normalizer.statistics is not None:
            center = normalizer.statistics.mean
            scale = tf.math.rsqrt(tf.maximum(normalizer.statistics.variance, MIN_VARIANCE))
        normalized = (tf.cast(observation, tf.float32) - center) * scale
        return tf.clip_by_value(normalized, -normalizer.clip, normalizer.clip)
