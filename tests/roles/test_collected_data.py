"""What reaches the replay is what the environment was given and gave."""

from __future__ import annotations

import numpy as np
import pytest
from tf_agents.environments import wrappers
from tf_agents.specs import tensor_spec

from actorlearner import reports, variable_container
from actorlearner.cluster import Cluster
from actorlearner.environments.gym import GymEnvironment
from actorlearner.experiment import load_experiment
from actorlearner.replay.durable_table import read_chunks
from actorlearner.roles.collect_actor import run_collect_actor
from actorlearner.runtime.lifecycle import Stop
from actorlearner.variable_container import Phase, Publisher
from tests.roles import recording_environments
from tests.roles.recording_environments import NOTES, ON_STEP, Recording

BINDINGS = ["train.num_environments = 1", "resident_replay.chunk_length = 50", "resident_replay.stream_length = 1_000"]


class ThroughWrappers(GymEnvironment):
    """Below one more of TF-Agents' wrappers, so that the batch cannot step gym itself."""

    def make_environment(self, seed):
        return wrappers.PyEnvironmentBaseWrapper(super().make_environment(seed))


def expected_rows():
    """Returns what a trajectory's rows should hold, from what the environment wrote down."""
    rows: list[tuple] = []
    observation, step_type = None, 0
    for kind, *note in NOTES:
        if kind == "reset":
            if rows:  # from the last time step of an episode to the first of the next, whatever the action
                rows.append((2, observation, None, 0, 0.0, 1.0))
            (observation,) = note
            step_type = 0
            continue
        action, after, reward, discount, is_last = note
        rows.append((step_type, observation, action, 2 if is_last else 1, reward, discount))
        observation, step_type = after, 1
    return rows


@pytest.mark.parametrize(
    ("experiment", "suite", "env_name"),
    [
        ("dqn_cartpole", None, "CountsFromMinusTwo"),
        ("dqn_cartpole", ThroughWrappers, "LimitsItself"),
        ("dqn_cartpole", None, "LimitsItself"),
        ("sac_minitaur_tutorial", None, "WorksInPlace"),
        ("dqn_cartpole", ThroughWrappers, "SmallNumbers"),
    ],
)
def test_the_values_in_the_replay_are_those_of_the_environment(serve, tmp_path, experiment, suite, env_name):
    """An action that is one off, a byte that wrapped or an end that was a limit silently spoils training."""
    name = "gym_environment" if experiment.startswith("dqn") else "pybullet_environment"
    experiment = load_experiment(experiment, [*BINDINGS, f"{name}.env_name = '{env_name}-v0'"])
    if suite:
        object.__setattr__(experiment, "environment", suite(f"{env_name}-v0"))
    agent, _ = experiment.make_agent()
    variables = agent.collect_policy.variables()
    tables = experiment.replay.make_tables(
        tensor_spec.from_spec(agent.collect_data_spec), experiment.sampling(agent)
    )
    server = serve([*tables, *variable_container.make_tables(variables), *reports.make_tables()])
    address = f"localhost:{server.port}"
    publisher = Publisher(address, learner=1)
    publisher.publish(7, variables)
    stop = Stop()
    NOTES.clear()
    Recording.num_steps = 0

    def on_step(number):
        if number == 30:  # at random until then; within a fifth of a second the actor sees that training goes on
            publisher.announce(Phase.TRAINING)
        if number == 3_000:
            stop.set()

    ON_STEP[0] = on_step
    run_collect_actor(experiment, Cluster(address, address), tmp_path, stop)
    publisher.close()

    chunks = sorted(read_chunks(address, silent_secs=30).items())
    rows: list[tuple] = []
    acted_at: set[int] = set()
    for number, (_, chunk) in enumerate(chunks):
        # A chunk begins with the last rows of the one before.
        first, length = (agent.train_sequence_length - 1 if number else 0), int(chunk["length"])
        acted_at |= set(chunk["acted_at"][first:length].tolist())
        step = chunk["step"]
        leaves = (step.step_type, step.observation, step.action, step.next_step_type, step.reward, step.discount)
        rows += zip(*(leaf[0, first:length] for leaf in leaves))
    assert len(rows) > 2_500
    assert acted_at == {-1, 7}, "by the random policy, then by the collect policy"
    start = getattr(getattr(recording_environments, env_name).action_space, "start", 0)
    for number, (row, expected) in enumerate(zip(rows, expected_rows())):
        for leaf, value in zip(row, expected):
            if value is not None:
                value = value - start if value is expected[2] else value
                np.testing.assert_array_equal(leaf, value, f"row {number}: {row}")
                assert np.shape(leaf) == np.shape(value)
