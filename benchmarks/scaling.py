"""Environment steps per second with 1, 2, 4, 8 and 16 collect actors, on an environment that sleeps 5 ms a step.

In each repeat actors are added until all are running. Linear is the rate of one actor, in the same repeat, times their
number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from benchmarks.measuring import CHECKOUT, Figures, Measure, Settings, Side, describe, run_program
from benchmarks.results import Row

NUM_ACTORS = (1, 2, 4, 8, 16)
BAR = 0.9  # of linear, with all of them


def compare(settings: Settings, num_actors: Sequence[int] = NUM_ACTORS) -> Sequence[Row]:
    """Returns a row for each number of actors above one."""
    rates: dict[int, list[float]] = {number: [] for number in num_actors}
    for repeat in range(settings.repeats):
        with contextlib.closing(Side("scaling", settings, ("scaling", "actors"))) as side:
            side.await_ready()
            for number in num_actors:
                figures = side.measure(window_secs=settings.window(8.0), num_actors=number)
                rates[number].append(figures["environment_steps_per_sec"])
                settings.say(f"scaling, {number} actors {repeat + 1}/{settings.repeats}: {describe(figures)}")
    return [
        Row(
            f"scaling-{number}",
            f"{number} collect actors, environment of 5 ms",
            f"{number} times one actor",
            "environment steps/s",
            BAR,
            rates[number],
            [number * rate for rate in rates[1]],
        )
        for number in num_actors
        if number > 1
    ]


@contextlib.contextmanager
def actors() -> Iterator[Measure]:
    """A replay server and collect actors as processes; this process stands in for the learner."""
    from actorlearner.launcher.command import COLLECT_ACTOR, REPLAY_SERVER
    from benchmarks.roles import UNLIMITED, Roles, measure_collecting, standing_in_for_learner

    experiment_file = str(CHECKOUT / "benchmarks" / "sleeping.gin")
    with Roles(experiment_file, [*UNLIMITED, "collect_actor.report_interval_secs = 1.0"]) as roles:
        roles.start(REPLAY_SERVER)
        roles.start(COLLECT_ACTOR)
        from actorlearner.experiment import load_experiment
        from actorlearner.runtime.devices import hold_to_one_thread

        hold_to_one_thread()
        experiment = load_experiment(experiment_file, roles.bindings)
        with standing_in_for_learner(experiment, roles.address):

            def measure(window_secs: float, num_actors: int) -> Figures:
                for task in range(roles.count(COLLECT_ACTOR), num_actors):
                    roles.start(COLLECT_ACTOR, task)
                measure_collecting(roles, 2.0, num_actors, poll_secs=0.25)  # until all are working
                return measure_collecting(roles, window_secs, num_actors, poll_secs=0.1)

            yield measure


if __name__ == "__main__":
    run_program(actors=actors)
