"""One collect actor: on Minitaur against a raw gym loop, on CartPole against the tutorial's actor.

Ours is the real role, writing to a real replay server whose queue is read, with new weights every second. Nothing
trains.

On Minitaur the weights are zeros: SAC then acts by the tanh of a standard normal, and episodes are about as long as
with random actions. With initial weights they last 75 to 1,000 steps, depending on the seed; a reset takes the time of
20 steps, so the figure would depend on how often the robot falls.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

from benchmarks.measuring import Figures, Measure, Settings, Side, alternate, repeating, run_program
from benchmarks.results import Row


def compare_minitaur(settings: Settings) -> Sequence[Row]:
    """Returns one row: our speed as a share of the bare environment's."""
    return _compare(
        settings, "collect-minitaur", "sac_minitaur_tutorial", "raw_gym", "a raw gym loop with random actions", 0.9
    )


def compare_cartpole(settings: Settings) -> Sequence[Row]:
    """Returns one row: the shipped experiment's batch of environments against one at a time."""
    reference = "the tutorial's actor: one environment, PyTFEagerPolicy"
    return _compare(settings, "collect-cartpole", "dqn_cartpole", "tutorial_actor", reference, 12.0)


def _compare(settings: Settings, name: str, experiment: str, program: str, reference: str, bar: float) -> Sequence[Row]:
    start = functools.partial(Side, settings=settings)
    sides = [
        lambda: start(f"{name}-ours", program=("collecting", "ours", experiment)),
        lambda: start(f"{name}-reference", program=("collecting", program)),
    ]
    ours, theirs = alternate(settings, sides, window_secs=settings.window(8.0))
    measure = {
        "collect-minitaur": "one collect actor on Minitaur",
        "collect-cartpole": "one collect actor on CartPole, 16 environments",
    }[name]
    our_rates, their_rates = ([figures["environment_steps_per_sec"] for figures in found] for found in (ours, theirs))
    return [Row(name, measure, reference, "environment steps/s", bar, our_rates, their_rates, details={"ours": ours})]


@contextlib.contextmanager
def ours(experiment_name: str) -> Iterator[Measure]:
    """A replay server and a collect actor as processes; this process stands in for the learner."""
    from actorlearner.launcher.command import COLLECT_ACTOR, REPLAY_SERVER
    from benchmarks.roles import AS_THE_TUTORIAL, OURS, UNLIMITED, Roles, measure_collecting, standing_in_for_learner

    more = OURS if experiment_name == AS_THE_TUTORIAL else ()
    with Roles(experiment_name, [*UNLIMITED, *more, "collect_actor.report_interval_secs = 0.5"]) as roles:
        roles.start(REPLAY_SERVER)
        roles.start(COLLECT_ACTOR)
        from actorlearner.experiment import load_experiment
        from actorlearner.runtime.devices import hold_to_one_thread

        hold_to_one_thread()
        experiment = load_experiment(experiment_name, roles.bindings)
        with standing_in_for_learner(experiment, roles.address, zero_weights=experiment_name == AS_THE_TUTORIAL):
            measure_collecting(roles, 3.0)  # warm

            def measure(window_secs: float) -> Figures:
                return measure_collecting(roles, window_secs)

            yield measure


@contextlib.contextmanager
def raw_gym() -> Iterator[Measure]:
    """Minitaur alone, stepped with random actions."""
    import gym
    import pybullet_envs  # noqa: F401  (registers it)

    environment = gym.make("MinitaurBulletEnv-v0")
    environment.reset()

    def step() -> int:
        _, _, done, _ = environment.step(environment.action_space.sample())
        if done:
            environment.reset()
        return 1

    with repeating(step, "environment_steps_per_sec") as measure:
        yield measure


@contextlib.contextmanager
def tutorial_actor() -> Iterator[Measure]:
    """The tutorial's collect actor on CartPole, with the agent of dqn_cartpole."""
    from tf_agents.environments import suite_gym

    from actorlearner.experiment import load_experiment
    from benchmarks import tutorial

    agent, train_step = load_experiment("dqn_cartpole").make_agent()
    replay = tutorial.Replay(agent, sequence_length=agent.train_sequence_length)
    collect_env = suite_gym.load("CartPole-v1")
    collect_actor = tutorial.make_collect_actor(collect_env, agent, train_step, replay.rb_observer, ".")

    def step() -> int:
        collect_actor.run()
        return 1

    with repeating(step, "environment_steps_per_sec") as measure:
        yield measure


if __name__ == "__main__":
    run_program(ours=ours, raw_gym=raw_gym, tutorial_actor=tutorial_actor)
