"""The reference: the pieces of TF-Agents' "SAC minitaur with the Actor-Learner API" tutorial, unchanged.

Names, numbers and order are the tutorial's; its cells are functions here. Source:
https://www.tensorflow.org/agents/tutorials/7_SAC_minitaur_tutorial
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import reverb
import tensorflow as tf
from tf_agents.agents import tf_agent as tf_agent_lib
from tf_agents.agents.ddpg import critic_network
from tf_agents.agents.sac import sac_agent, tanh_normal_projection_network
from tf_agents.environments import py_environment
from tf_agents.metrics import py_metrics
from tf_agents.networks import actor_distribution_network
from tf_agents.policies import py_tf_eager_policy
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils
from tf_agents.train import actor, learner, triggers
from tf_agents.train.utils import spec_utils, train_utils

env_name = "MinitaurBulletEnv-v0"
replay_buffer_capacity = 10000
batch_size = 256
critic_learning_rate = 3e-4
actor_learning_rate = 3e-4
alpha_learning_rate = 3e-4
target_update_tau = 0.005
target_update_period = 1
gamma = 0.99
reward_scale_factor = 1.0
actor_fc_layer_params = (256, 256)
critic_joint_fc_layer_params = (256, 256)
policy_save_interval = 5000
table_name = "uniform_table"


def make_agent(
    collect_env: py_environment.PyEnvironment, strategy: tf.distribute.Strategy
) -> tuple[tf_agent_lib.TFAgent, tf.Variable]:
    """Returns the SAC agent and its train step."""
    observation_spec, action_spec, time_step_spec = spec_utils.get_tensor_specs(collect_env)
    with strategy.scope():
        critic_net = critic_network.CriticNetwork(
            (observation_spec, action_spec),
            observation_fc_layer_params=None,
            action_fc_layer_params=None,
            joint_fc_layer_params=critic_joint_fc_layer_params,
            kernel_initializer="glorot_uniform",
            last_kernel_initializer="glorot_uniform",
        )
    with strategy.scope():
        actor_net = actor_distribution_network.ActorDistributionNetwork(
            observation_spec,
            action_spec,
            fc_layer_params=actor_fc_layer_params,
            continuous_projection_net=tanh_normal_projection_network.TanhNormalProjectionNetwork,
        )
    with strategy.scope():
        train_step = train_utils.create_train_step()
        tf_agent = sac_agent.SacAgent(
            time_step_spec,
            action_spec,
            actor_network=actor_net,
            critic_network=critic_net,
            actor_optimizer=tf.keras.optimizers.Adam(learning_rate=actor_learning_rate),
            critic_optimizer=tf.keras.optimizers.Adam(learning_rate=critic_learning_rate),
            alpha_optimizer=tf.keras.optimizers.Adam(learning_rate=alpha_learning_rate),
            target_update_tau=target_update_tau,
            target_update_period=target_update_period,
            td_errors_loss_fn=tf.math.squared_difference,
            gamma=gamma,
            reward_scale_factor=reward_scale_factor,
            train_step_counter=train_step,
        )
        tf_agent.initialize()
    return tf_agent, train_step


class Replay:
    """The Reverb server in this process, its replay buffer and the observer that writes to it."""

    def __init__(self, tf_agent: tf_agent_lib.TFAgent, sequence_length: int = 2):
        table = reverb.Table(
            table_name,
            max_size=replay_buffer_capacity,
            sampler=reverb.selectors.Uniform(),
            remover=reverb.selectors.Fifo(),
            rate_limiter=reverb.rate_limiters.MinSize(1),
        )
        self.reverb_server = reverb.Server([table])
        self.reverb_replay = reverb_replay_buffer.ReverbReplayBuffer(
            tf_agent.collect_data_spec,
            sequence_length=sequence_length,
            table_name=table_name,
            local_server=self.reverb_server,
        )
        self.rb_observer = reverb_utils.ReverbAddTrajectoryObserver(
            self.reverb_replay.py_client, table_name, sequence_length=sequence_length, stride_length=1
        )

    def experience_dataset_fn(self) -> Callable[[], tf.data.Dataset]:
        dataset = self.reverb_replay.as_dataset(sample_batch_size=batch_size, num_steps=2).prefetch(50)
        return lambda: dataset


def make_collect_actor(
    collect_env: py_environment.PyEnvironment,
    tf_agent: tf_agent_lib.TFAgent,
    train_step: tf.Variable,
    rb_observer: Callable[[Any], None],
    tempdir: str,
) -> actor.Actor:
    """Returns the actor that makes one step per call with the collect policy."""
    tf_collect_policy = tf_agent.collect_policy
    collect_policy = py_tf_eager_policy.PyTFEagerPolicy(tf_collect_policy, use_tf_function=True)
    env_step_metric = py_metrics.EnvironmentSteps()
    return actor.Actor(
        collect_env,
        collect_policy,
        train_step,
        steps_per_run=1,
        metrics=actor.collect_metrics(10),
        summary_dir=os.path.join(tempdir, learner.TRAIN_DIR),
        observers=[rb_observer, env_step_metric],
    )


def make_learner(
    tf_agent: tf_agent_lib.TFAgent,
    train_step: tf.Variable,
    experience_dataset_fn: Callable[[], tf.data.Dataset],
    strategy: tf.distribute.Strategy,
    tempdir: str,
) -> learner.Learner:
    """Returns the stock learner with the tutorial's triggers."""
    saved_model_dir = os.path.join(tempdir, learner.POLICY_SAVED_MODEL_DIR)
    learning_triggers = [
        triggers.PolicySavedModelTrigger(saved_model_dir, tf_agent, train_step, interval=policy_save_interval),
        triggers.StepPerSecondLogTrigger(train_step, interval=1000),
    ]
    return learner.Learner(
        tempdir, train_step, tf_agent, experience_dataset_fn, triggers=learning_triggers, strategy=strategy
    )
