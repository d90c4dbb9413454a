"""The shipped experiments say what the seeds say; one object gives every role the same."""

from __future__ import annotations

import gin
import pytest
import tensorflow as tf

from actorlearner.experiment import find_experiment, load_experiment, shipped_experiments_folder
from actorlearner.runtime.lifecycle import ExitCode, RoleError
from benchmarks import tutorial

# The TF-Agents tutorial "SAC minitaur with the Actor-Learner API".
TUTORIAL = {
    "env_name": "MinitaurBulletEnv-v0",
    "num_iterations": 100_000,
    "initial_collect_steps": 10_000,
    "collect_steps_per_iteration": 1,
    "batch_size": 256,
    "critic_learning_rate": 3e-4,
    "actor_learning_rate": 3e-4,
    "alpha_learning_rate": 3e-4,
    "target_update_tau": 0.005,
    "target_update_period": 1,
    "gamma": 0.99,
    "actor_fc_layer_params": (256, 256),
    "critic_joint_fc_layer_params": (256, 256),
    "log_interval": 5_000,
    "num_eval_episodes": 20,
    "eval_interval": 10_000,
    "policy_save_interval": 5_000,
}

# The assignment, whose values are placeholders for the student to replace.
ASSIGNMENT = (
    "num_iterations",
    "initial_collect_steps",
    "collect_steps_per_iteration",
    "replay_buffer_max_length",
    "batch_size",
    "learning_rate",
    "log_interval",
    "num_eval_episodes",
    "eval_interval",
    "env_name",
    "fc_layer_params",
)


def bound(name):
    """Returns the different values that the loaded gin files bind to parameters, and macros, of this name."""
    # gin offers no public list of bindings; gin-config is pinned.
    values = [
        values["value"] if selector == "gin.macro" else values[name]
        for (scope, selector), values in gin.config._CONFIG.items()
        if (scope == name if selector == "gin.macro" else name in values)
    ]
    return [value for value in values if not isinstance(value, gin.config.ConfigurableReference)]


@pytest.mark.parametrize("name", TUTORIAL)
def test_sac_minitaur_tutorial_has_the_tutorials_value_under_the_tutorials_name(name):
    """Users who know the tutorial must find its settings, and get its run."""
    load_experiment("sac_minitaur_tutorial")
    assert bound(name) == [TUTORIAL[name]]


def test_sac_minitaur_tutorial_makes_the_tutorials_agent():
    """Its options are for our own recipe: none of them may be on in what ours is compared with."""
    experiment = load_experiment("sac_minitaur_tutorial")
    assert bound("replay_buffer_capacity") == [10_000]
    assert experiment.schedule.num_environments == 1
    ours, _ = experiment.make_agent()
    theirs, _ = tutorial.make_agent(experiment.make_environment(0), tf.distribute.get_strategy())
    for name in ("_actor_network", "_critic_network_1", "_critic_network_2", "_target_critic_network_1"):
        one, other = getattr(ours, name).variables, getattr(theirs, name).variables
        assert [variable.shape for variable in one] == [variable.shape for variable in other]
        for variable, expected in zip(one, other):  # drawn from the same distributions: biases are zero
            assert float(tf.math.reduce_std(variable)) == pytest.approx(float(tf.math.reduce_std(expected)), rel=0.2)
    assert float(ours._log_alpha) == float(theirs._log_alpha) == 0.0
    for name in ("_target_entropy", "_gamma", "_reward_scale_factor", "train_sequence_length"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("name", ASSIGNMENT)
def test_dqn_cartpole_binds_every_name_of_the_assignment(name):
    """The hand-in is this list of hyperparameters."""
    load_experiment("dqn_cartpole")
    (value,) = bound(name)
    assert value


def test_dqn_cartpole_lasts_longer_than_the_forty_seconds_asked(experiment):
    """CartPole's registered limits, 4 and 10 seconds, can never show it."""
    environment = experiment.make_environment(0)
    assert environment.gym.tau == 0.02  # seconds per step
    environment.close()
    assert gin.query_parameter("gym_environment.max_episode_steps") * 0.02 == 60


def test_every_shipped_experiment_loads():
    """A gin file that is never parsed breaks unseen."""
    names = {path.stem for path in shipped_experiments_folder().glob("*.gin")} - {"base"}
    assert names >= {"sac_minitaur", "dqn_cartpole"}
    for name in names:
        assert load_experiment(name).name == name


def test_a_users_file_may_include_a_shipped_experiment(tmp_path):
    """The shortest experiment of one's own is a shipped one and one line."""
    path = tmp_path / "my_own.gin"
    path.write_text("include 'dqn_cartpole.gin'\ntrain.num_iterations = 77\n")
    experiment = load_experiment(str(path), ["train.batch_size = 8\n\ntrain.log_interval = 5"], seed=3)
    assert (experiment.name, experiment.seed) == ("my_own", 3)
    assert experiment.schedule.num_iterations == 77
    assert experiment.schedule.batch_size == 8
    assert experiment.schedule.log_interval == 5
    assert experiment.schedule.samples_per_insert == 8 / experiment.schedule.collect_steps_per_iteration


def test_an_unknown_experiment_is_refused_with_what_there_is():
    """The name is the first thing a newcomer types."""
    with pytest.raises(RoleError, match="no experiment 'sac_minotaur'.*dqn_cartpole, sac_minitaur") as raised:
        find_experiment("sac_minotaur")
    assert raised.value.exit_code == ExitCode.USAGE


INCOMPLETE = {
    "": "environment",
    "include 'base.gin'\ninclude 'agents/dqn.gin'\ninclude 'environments/cartpole.gin'\n": "num_iterations",
}


@pytest.mark.parametrize("text", INCOMPLETE)
def test_an_incomplete_experiment_is_refused_with_what_is_missing(tmp_path, text):
    """Python's message about missing arguments does not say which file leaves them out."""
    path = tmp_path / "mine.gin"
    path.write_text(text)
    with pytest.raises(RoleError, match=f"{path}: .*{INCOMPLETE[text]}|{path}: .*num_iterations") as raised:
        load_experiment(str(path))
    assert raised.value.exit_code == ExitCode.USAGE


def test_a_replay_too_small_for_the_first_sample_is_refused():
    """Learner and actors would wait for each other for ever."""
    with pytest.raises(RoleError, match="initial_collect_steps = 500.*training would never start") as raised:
        load_experiment("dqn_cartpole", ["replay_buffer_max_length = 100", "train.initial_collect_steps = 500"])
    assert raised.value.exit_code == ExitCode.USAGE


def test_an_unknown_environment_is_refused_with_the_nearest_id():
    """gym's own message ends in a traceback."""
    experiment = load_experiment("dqn_cartpole", ["gym_environment.env_name = 'CartPool-v1'"])
    with pytest.raises(RoleError, match="env_name = 'CartPool-v1'.*Did you mean 'CartPole-v1'") as raised:
        experiment.make_agent()
    assert raised.value.exit_code == ExitCode.USAGE


MISMATCHED = {
    "dqn": ("Pendulum-v1", "dqn needs one discrete"),
    "sac": ("CartPole-v1", "sac needs one continuous"),
}


@pytest.mark.parametrize("agent", MISMATCHED)
def test_an_agent_that_cannot_act_in_the_environment_is_refused(tmp_path, agent):
    """TF-Agents fails inside a network, minutes later in some roles."""
    env_name, message = MISMATCHED[agent]
    path = tmp_path / "mine.gin"
    path.write_text(
        f"include 'base.gin'\ninclude 'agents/{agent}.gin'\ninclude 'environments/cartpole.gin'\n"
        f"train.num_iterations = 1\ngym_environment.env_name = '{env_name}'\n"
    )
    with pytest.raises(RoleError, match=message) as raised:
        load_experiment(str(path)).make_agent()
    assert raised.value.exit_code == ExitCode.USAGE


@pytest.fixture(scope="module")
def experiment():
    return load_experiment("dqn_cartpole", seed=5)


def first_observations(environments):
    return environments.reset().observation.tolist()


def test_the_same_seed_gives_the_same_episodes(experiment):
    """A run that cannot be repeated cannot be debugged."""
    twice = [first_observations(experiment.make_environments(2, "collect-actor", 0)) for _ in range(2)]
    assert twice[0] == twice[1]


def test_roles_tasks_and_environments_have_different_seeds(experiment):
    """Four actors that play the same episodes collect a quarter of the data."""
    observations = [
        tuple(observation)
        for path in (("collect-actor", 0), ("collect-actor", 1), ("eval-actor", 0))
        for observation in first_observations(experiment.make_environments(3, *path))
    ]
    assert len(set(observations)) == 9
    assert experiment.derive_seed("x", 1) != load_experiment("dqn_cartpole", seed=6).derive_seed("x", 1)


def test_seeds_fit_every_library(experiment):
    """numpy takes 32 bits, gym's own seeding 31."""
    seeds = {experiment.derive_seed("actor", task) for task in range(1_000)}
    assert len(seeds) == 1_000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_every_role_makes_an_agent_of_the_same_specs(experiment):
    """Nothing is exchanged to start: tables, weights and trajectories must fit all the same."""
    (first, _), (second, _) = experiment.make_agent(), experiment.make_agent()
    assert first.collect_data_spec == second.collect_data_spec
    shapes = [[v.shape for v in agent.collect_policy.variables()] for agent in (first, second)]
    assert shapes[0] == shapes[1]


def test_lock_step_refuses_a_replay_that_draws_otherwise_in_every_run():
    """Reverb's selectors cannot be seeded: two runs would differ for no visible reason."""
    with pytest.raises(RoleError, match=r"train\.lock_step = True needs .*@resident_replay\(\)") as refused:
        load_experiment("dqn_cartpole", ["train.lock_step = True", "experiment.replay = @uniform_replay()"])
    assert refused.value.exit_code == ExitCode.USAGE
