"""A process of its own: `python resumed_agents.py save|restore FOLDER OUTPUT.npz`.

Makes every algorithm of ours, some of TF-Agents' as a user would make them, and one that trains with every Keras
optimizer; trains each a little; then saves all of them, or restores what another process saved. The weights and moments
that it ends with go to the output, each under the name of its variable.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from tf_agents.agents.cql import cql_sac_agent
from tf_agents.agents.ddpg import actor_network, critic_network, ddpg_agent
from tf_agents.agents.ppo import ppo_clip_agent
from tf_agents.agents.sac import tanh_normal_projection_network
from tf_agents.agents.td3 import td3_agent
from tf_agents.networks import actor_distribution_network, network, value_network
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts

import actorlearner.agents
from actorlearner.runtime.checkpoints import Checkpoints

OBSERVATION = tensor_spec.TensorSpec((3,), tf.float32, "observation")
CONTINUOUS = tensor_spec.BoundedTensorSpec((2,), tf.float32, -1.0, 1.0, "action")
DISCRETE = tensor_spec.BoundedTensorSpec((), tf.int64, 0, 2, "action")
TIME_STEP = ts.time_step_spec(OBSERVATION)
LAYERS = (8, 8)  # of one shape, so that nothing but its place tells the moments of one from those of the other


def falling_rate():
    return tf.keras.optimizers.schedules.PolynomialDecay(1e-2, 10, 1e-3)


def new_adam():
    return tf.keras.optimizers.Adam(falling_rate())


def make_actor():
    return actor_network.ActorNetwork(OBSERVATION, CONTINUOUS, fc_layer_params=LAYERS)


def make_critic():
    return critic_network.CriticNetwork((OBSERVATION, CONTINUOUS), joint_fc_layer_params=LAYERS)


def make_stochastic_actor(**kwargs):
    return actor_distribution_network.ActorDistributionNetwork(
        OBSERVATION, CONTINUOUS, fc_layer_params=LAYERS, **kwargs
    )


def make_td3(make_optimizer):
    return td3_agent.Td3Agent(
        TIME_STEP,
        CONTINUOUS,
        actor_network=make_actor(),
        critic_network=make_critic(),
        actor_optimizer=make_optimizer(),
        critic_optimizer=make_optimizer(),
    )


def make_ddpg():
    return ddpg_agent.DdpgAgent(
        TIME_STEP,
        CONTINUOUS,
        actor_network=make_actor(),
        critic_network=make_critic(),
        actor_optimizer=new_adam(),
        critic_optimizer=tf.keras.optimizers.RMSprop(1e-3, momentum=0.9, centered=True),
    )


def make_ppo():
    return ppo_clip_agent.PPOClipAgent(
        TIME_STEP,
        CONTINUOUS,
        optimizer=new_adam(),
        actor_net=make_stochastic_actor(),
        value_net=value_network.ValueNetwork(OBSERVATION, fc_layer_params=LAYERS),
        num_epochs=1,
    )


def make_cql():
    return cql_sac_agent.CqlSacAgent(
        TIME_STEP,
        CONTINUOUS,
        critic_network=make_critic(),
        actor_network=make_stochastic_actor(
            continuous_projection_net=tanh_normal_projection_network.TanhNormalProjectionNetwork
        ),
        actor_optimizer=new_adam(),
        critic_optimizer=new_adam(),
        alpha_optimizer=new_adam(),
        cql_alpha=1.0,
        num_cql_samples=1,
        include_critic_entropy_term=False,
        use_lagrange_cql_alpha=False,
    )


def make_shipped():
    """Returns each algorithm beside `agents/base.py` with its defaults, for the actions that it takes."""
    agents = {}
    for module in pkgutil.iter_modules(actorlearner.agents.__path__, "actorlearner.agents."):
        for value in vars(importlib.import_module(module.name)).values():
            if value.__class__ is type and value.__module__ == module.name and hasattr(value, "make_agent"):
                factory = value
                if getattr(factory, "_is_protocol", False):
                    continue
                train_step = tf.Variable(0, dtype=tf.int64)
                try:
                    agents[module.name] = factory().make_agent(TIME_STEP, CONTINUOUS, train_step)
                except ValueError:
                    agents[module.name] = factory().make_agent(TIME_STEP, DISCRETE, train_step)
    return agents


def keras_optimizers():
    """Returns every optimizer that Keras exports, new and legacy, and variants that keep more."""
    found = {
        f"{kind} {name}": optimizer
        for kind, module in (("new", tf.keras.optimizers), ("legacy", tf.keras.optimizers.legacy))
        for name, optimizer in sorted(vars(module).items())
        if isinstance(optimizer, type) and name != "Optimizer"
    }
    made = {name: optimizer() for name, optimizer in found.items()}
    made["new Nadam with a schedule"] = tf.keras.optimizers.Nadam(falling_rate())
    made["legacy Adam with a schedule"] = tf.keras.optimizers.legacy.Adam(falling_rate())
    made["new Adam with all it has"] = tf.keras.optimizers.Adam(amsgrad=True, use_ema=True)
    made["new RMSprop with all it has"] = tf.keras.optimizers.RMSprop(momentum=0.9, centered=True)
    made["new SGD with momentum"] = tf.keras.optimizers.SGD(momentum=0.9)
    made["legacy SGD with momentum"] = tf.keras.optimizers.legacy.SGD(momentum=0.9)
    made["scaled Adam"] = tf.keras.mixed_precision.LossScaleOptimizer(tf.keras.optimizers.Adam())
    made["v1 Adam"] = tf.compat.v1.train.AdamOptimizer()
    return made


class EveryOptimizer(tf.Module):
    """Trains four variables with each optimizer; lists them backwards where it is told."""

    def __init__(self, backwards):
        super().__init__()
        self.optimizers = keras_optimizers()
        self._weights = {
            name: [tf.Variable(tf.random.normal(shape)) for shape in ((3, 3), (3, 3), (3,), (3,))]
            for name in self.optimizers
        }
        self._backwards = backwards

    def named_weights(self):
        return {f"{name}/{n}": weight for name, weights in self._weights.items() for n, weight in enumerate(weights)}

    def train(self):
        for name, optimizer in self.optimizers.items():
            weights = self._weights[name][:: -1 if self._backwards else 1]
            optimizer.apply_gradients([(tf.random.normal(weight.shape), weight) for weight in weights])


def batch_for(agent, batch_size=4):
    num_steps = agent.train_sequence_length or 3
    spec = tensor_spec.add_outer_dims_nest(agent.collect_data_spec, (batch_size, num_steps))
    batch = tf.nest.map_structure(
        lambda leaf: (
            tf.random.uniform(leaf.shape, 0.1, 0.9, leaf.dtype)
            if leaf.dtype.is_floating
            else tf.ones(leaf.shape, leaf.dtype)
        ),
        spec,
    )
    return batch._replace(discount=tf.ones_like(batch.discount))


def named_weights(agent):
    if isinstance(agent, EveryOptimizer):
        return agent.named_weights()
    return {
        f"{attribute}/{number}": weight
        for attribute, part in vars(agent).items()
        if isinstance(part, network.Network)
        for number, weight in enumerate(part.variables)
    }


def optimizers_of(agent):
    if isinstance(agent, EveryOptimizer):
        return agent.optimizers
    return {name: part for name, part in vars(agent).items() if hasattr(part, "apply_gradients")}


def moments_of(optimizer, weight):
    """Returns what `optimizer` keeps for `weight`, by kind, as its class looks it up."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, tf.keras.optimizers.Optimizer):  # legacy, and of TensorFlow 1
        slots = {name: slot_or_none(optimizer, weight, name) for name in optimizer.get_slot_names()}
        return {name: slot for name, slot in slots.items() if slot is not None}
    index = optimizer._index_dict.get(optimizer._var_key(weight))
    if index is None:
        return {}
    lists = {name: value for name, value in vars(optimizer).items() if isinstance(value, list) and name != "_variables"}
    return {name: value[index] for name, value in lists.items() if value and isinstance(value[0], tf.Variable)}


def slot_or_none(optimizer, weight, name):
    try:
        return optimizer.get_slot(weight, name)
    except KeyError:
        return None


def main(what, folder, output):
    tf.config.run_functions_eagerly(True)  # an update or two of each: compiling them would take longer
    tf.random.set_seed(1 if what == "save" else 2)
    agents = {
        **make_shipped(),
        "TD3": make_td3(new_adam),
        "TD3 with legacy optimizers": make_td3(tf.keras.optimizers.legacy.Adam),
        "DDPG": make_ddpg(),
        "PPO": make_ppo(),
        "CQL": make_cql(),
        "every optimizer": EveryOptimizer(backwards=what == "restore"),
    }
    for agent in agents.values():
        for _ in range(2):
            agent.train(*([] if isinstance(agent, EveryOptimizer) else [batch_for(agent)]))
    checkpoints = Checkpoints(Path(folder), tf.Variable(0, dtype=tf.int64), agents)
    if what == "save":
        checkpoints.save({})
    else:
        checkpoints.restore()
    found = {}
    for name, agent in agents.items():
        weights = named_weights(agent)
        found.update({f"{name}: {weight}": value.numpy() for weight, value in weights.items()})
        for optimizer_name, optimizer in optimizers_of(agent).items():
            for weight, variable in weights.items():
                for kind, moment in moments_of(optimizer, variable).items():
                    found[f"{name}: {optimizer_name} {kind} of {weight}"] = moment.numpy()
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
