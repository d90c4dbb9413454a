"""End to end on Minitaur at one update per environment step: the real roles against the tutorial's loop.

Both have an environment that steps and a learner that trains; neither evaluates, and both warm up with 1,000 random
steps instead of the tutorial's 10,000. Ours collects and trains at once, so the slower of the two counts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

from benchmarks.measuring import Figures, Measure, Settings, Side, alternate, repeating, run_program
from benchmarks.results import Row

INITIAL_COLLECT_STEPS = 1_000
BINDINGS = (
    f"train.initial_collect_steps = {INITIAL_COLLECT_STEPS}",
    "train.log_interval = 100",
    "collect_actor.report_interval_secs = 0.5",
)


def compare(settings: Settings) -> Sequence[Row]:
    """Returns one row."""
    start = functools.partial(Side, settings=settings)
    sides = [
        lambda: start("minitaur-ours", program=("minitaur", "ours")),
        lambda: start("minitaur-tutorial", program=("minitaur", "tutorial_loop")),
    ]
    ours, theirs = alternate(settings, sides, window_secs=settings.window(20.0))
    return [
        Row(
            "minitaur",
            "end to end on Minitaur, one update per environment step",
            "the tutorial's loop",
            "iterations/s",
            2.5,
            [figures["iterations_per_sec"] for figures in ours],
            [figures["iterations_per_sec"] for figures in theirs],
            details={"ours": ours},
        )
    ]


@contextlib.contextmanager
def ours() -> Iterator[Measure]:
    """The processes of `actorlearner train`, without an eval actor, with the tutorial's numbers."""
    from actorlearner.launcher.command import COLLECT_ACTOR, LEARNER, REPLAY_SERVER
    from benchmarks.roles import AS_THE_TUTORIAL, FOREVER, OURS, Roles

    with Roles(AS_THE_TUTORIAL, [*FOREVER, *OURS, *BINDINGS]) as roles:
        for kind in (REPLAY_SERVER, LEARNER, COLLECT_ACTOR):
            roles.start(kind)
        roles.follow_training(secs=10.0)  # until the actor's lead is used up

        def measure(window_secs: float) -> Figures:
            rates = roles.measure_training(window_secs)
            return {"iterations_per_sec": min(rates.values()), **rates}

        yield measure


@contextlib.contextmanager
def tutorial_loop() -> Iterator[Measure]:
    """The tutorial from its environment to its training loop, without its evaluations."""
    from tf_agents.environments import suite_pybullet
    from tf_agents.policies import random_py_policy
    from tf_agents.train import actor
    from tf_agents.train.utils import strategy_utils

    from benchmarks import tutorial

    strategy = strategy_utils.get_strategy(tpu=False, use_gpu=False)
    collect_env = suite_pybullet.load(tutorial.env_name)
    tf_agent, train_step = tutorial.make_agent(collect_env, strategy)
    replay = tutorial.Replay(tf_agent)
    random_policy = random_py_policy.RandomPyPolicy(collect_env.time_step_spec(), collect_env.action_spec())
    initial_collect_actor = actor.Actor(
        collect_env,
        random_policy,
        train_step,
        steps_per_run=INITIAL_COLLECT_STEPS,
        observers=[replay.rb_observer],
    )
    initial_collect_actor.run()
    collect_actor = tutorial.make_collect_actor(collect_env, tf_agent, train_step, replay.rb_observer, ".")
    agent_learner = tutorial.make_learner(tf_agent, train_step, replay.experience_dataset_fn(), strategy, ".")
    tf_agent.train_step_counter.assign(0)

    def iterate() -> int:
        collect_actor.run()
        agent_learner.run(iterations=1)
        return 1

    with repeating(iterate, "iterations_per_sec") as measure:
        yield measure


if __name__ == "__main__":
    run_program(ours=ours, tutorial_loop=tutorial_loop)
