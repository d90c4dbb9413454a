"""Learner updates per second: SAC 28 -> 8, 256x256, batch 256, with the replay in the loop.

ours       the real learner role, its replay filled through a real server and sink
stock      TF-Agents' Learner with ReverbReplayBuffer, as in the tutorial
sb3, sbx   the `train` of Stable-Baselines3's and SBX's SAC, in an environment of their own

Every replay holds 10,000 transitions of noise. On a GPU ours also receives 2,000 environment steps/s meanwhile; the
stock learner, under MirroredStrategy, receives none.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.machine import find_gpu, finds_gpu_in_tensorflow, peer_versions
from benchmarks.measuring import Figures, Measure, Settings, Side, alternate, repeating, run_program
from benchmarks.results import Row

MEASURE = "learner updates, SAC 28 -> 8, 256x256, batch 256, replay in the loop"
UNIT = "updates/s"
CAPACITY = 10_000
BATCH_SIZE = 256
LOG_INTERVAL = 500  # train steps between two points in metrics.jsonl, from which ours is timed
GPU_INGEST = 2_000  # environment steps/s
LEAST_INGESTED = 0.95  # the share that must be ingested for the updates to count
GPU_BAR = 1_500  # updates/s


def compare(settings: Settings) -> Sequence[Row]:
    """Returns a row for each reference, all measured on the processor."""
    start = functools.partial(Side, settings=settings)
    peers = [("learner-sb3", "Stable-Baselines3 SAC.train", 2.0), ("learner-sbx", "SBX SAC.train", 1.0)]
    have_peers = bool(peer_versions(settings.peers_python))
    sides = [
        lambda: start("learner-ours", program=("learner", "ours", "0")),
        lambda: start("learner-stock", program=("learner", "stock", "cpu")),
    ]
    if have_peers:
        sides += [
            functools.partial(start, name, program=("learner", name[-3:]), python=str(settings.peers_python))
            for name, _, _ in peers
        ]
    ours, *theirs = (_rates(found) for found in alternate(settings, sides, window_secs=settings.window(6.0)))
    reference = "stock Learner with ReverbReplayBuffer"
    rows = [Row("learner-stock", MEASURE, reference, UNIT, 3.5, ours, theirs[0])]
    why = f"{settings.peers_python} lacks them; `./launch/bench.sh --only learner` makes .venv-bench, or says why not"
    for index, (name, reference, bar) in enumerate(peers, start=1):
        if have_peers:
            rows.append(Row(name, MEASURE, reference, UNIT, bar, ours, theirs[index]))
        else:
            rows.append(Row(name, MEASURE, reference, UNIT, bar, not_measured=why))
    return rows


PLAIN = (
    "sac.normalize_observations = None",
    "sac.n_step_update = 1",
    "sac.critic_layer_norm = False",
)


def compare_recipe(settings: Settings) -> Sequence[Row]:
    """Returns one row: the cost of normalisation, n-step returns and LayerNorm."""
    start = functools.partial(Side, settings=settings)
    sides = [
        lambda: start("learner-recipe", program=("learner", "recipe")),
        lambda: start("learner-plain", program=("learner", "recipe", *PLAIN)),
    ]
    ours, plain = (_rates(found) for found in alternate(settings, sides, window_secs=settings.window(6.0)))
    measure = "learner updates of sac_minitaur: normalised observations, 5-step returns, LayerNorm"
    return [Row("learner-recipe", measure, "the same without the three", UNIT, 0.85, ours, plain)]


def compare_on_gpu(settings: Settings) -> Sequence[Row]:
    """Returns ours against the stock learner, and against the required figure."""
    if find_gpu() is None:
        return judge_gpu(not_measured="no GPU here; on a machine with one: actorlearner bench --only learner-gpu")
    if not finds_gpu_in_tensorflow():  # otherwise both sides would run on the processor
        return judge_gpu(
            not_measured="TensorFlow finds no GPU: .venv/bin/python -m pip install --no-deps -r requirements-gpu.lock, "
            "then: actorlearner bench --only learner-gpu"
        )
    start = functools.partial(Side, settings=settings, environment={})
    sides = [
        lambda: start("learner-gpu-ours", program=("learner", "ours", str(GPU_INGEST))),
        lambda: start("learner-gpu-stock", program=("learner", "stock", "gpu")),
    ]
    ours, theirs = alternate(settings, sides, window_secs=settings.window(6.0))
    return judge_gpu(ours, theirs)


def judge_gpu(
    ours: Sequence[Figures] = (), theirs: Sequence[Figures] = (), not_measured: str | None = None
) -> Sequence[Row]:
    """Returns the rows for these figures; a bar is missed if too few steps were ingested, however fast training was."""
    ingested = [figures["environment_steps_per_sec"] for figures in ours]
    unmet = None
    if ingested and statistics.median(ingested) < LEAST_INGESTED * GPU_INGEST:
        unmet = f"took in {statistics.median(ingested):,.0f} environment steps/s of {GPU_INGEST:,}"
    measure = f"{MEASURE}, one GPU, taking in {GPU_INGEST:,} environment steps/s"
    references = [
        ("learner-gpu-stock", "stock Learner under MirroredStrategy", 8.0, _rates(theirs)),
        ("learner-gpu", f"{GPU_BAR:,} updates/s", 1.0, [GPU_BAR] if ours else []),
    ]
    return [
        Row(
            name,
            measure,
            reference,
            UNIT,
            bar,
            _rates(ours),
            rates,
            details={"environment_steps_per_sec": ingested},
            not_measured=not_measured,
            unmet=unmet,
        )
        for name, reference, bar, rates in references
    ]


def _rates(found: Sequence[Figures]) -> Sequence[float]:
    return [figures["updates_per_sec"] for figures in found]


# --- the programs ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ours(steps_per_sec: str) -> Iterator[Measure]:
    """The replay server and the learner as processes; this process plays the actors."""
    from benchmarks.roles import AS_THE_TUTORIAL, OURS

    with _learner_role(AS_THE_TUTORIAL, OURS, steps_per_sec) as measure:
        yield measure


@contextlib.contextmanager
def recipe(*bindings: str) -> Iterator[Measure]:
    """The learner of `sac_minitaur` with these bindings applied."""
    with _learner_role("sac_minitaur", bindings, "0") as measure:
        yield measure


@contextlib.contextmanager
def _learner_role(name: str, more: Sequence[str], steps_per_sec: str) -> Iterator[Measure]:
    from actorlearner.launcher.command import LEARNER, REPLAY_SERVER
    from benchmarks.roles import FOREVER, UNLIMITED, Feeder, Roles

    bindings = [*FOREVER, *UNLIMITED, f"train.log_interval = {LOG_INTERVAL}", *more]
    with Roles(name, bindings) as roles:
        roles.start(REPLAY_SERVER)
        roles.start(LEARNER)
        from actorlearner.experiment import load_experiment
        from actorlearner.replay.servers import ReplayServers
        from actorlearner.runtime.devices import hold_to_one_thread
        from actorlearner.runtime.lifecycle import Stop

        hold_to_one_thread()
        experiment = load_experiment(name, roles.bindings)
        ReplayServers([roles.address]).await_tables({}, stop=Stop(), deadline_secs=240)
        with Feeder(experiment, roles.address) as feeder:
            feeder.fill(CAPACITY + experiment.schedule.initial_collect_steps)
            if float(steps_per_sec):
                feeder.feed_in_background(float(steps_per_sec))
            roles.follow_training(secs=3.0)  # warm

            def measure(window_secs: float) -> Figures:
                before, start = feeder.num_steps, time.monotonic()
                updates_per_sec = roles.measure_training(window_secs)["train_steps_per_sec"]
                fed = (feeder.num_steps - before) / (time.monotonic() - start)
                return {"updates_per_sec": updates_per_sec, "environment_steps_per_sec": fed}

            yield measure


@contextlib.contextmanager
def stock(device: str) -> Iterator[Measure]:
    """The tutorial's learner on its replay, with 100 updates a call; the tutorial's own way, one a call, is slower."""
    from tf_agents.environments import suite_pybullet
    from tf_agents.train.utils import strategy_utils

    from benchmarks import tutorial
    from benchmarks.roles import make_noise_episode

    strategy = strategy_utils.get_strategy(tpu=False, use_gpu=device == "gpu")
    tf_agent, train_step = tutorial.make_agent(suite_pybullet.load(tutorial.env_name), strategy)
    replay = tutorial.Replay(tf_agent)
    episode = make_noise_episode(tf_agent.collect_data_spec)
    for index in range(CAPACITY + len(episode)):
        replay.rb_observer(episode[index % len(episode)])
    replay.rb_observer.flush()
    agent_learner = tutorial.make_learner(tf_agent, train_step, replay.experience_dataset_fn(), strategy, ".")

    def train() -> int:
        agent_learner.run(iterations=100)
        return 100

    with repeating(train, "updates_per_sec") as measure:
        yield measure


def sb3() -> contextlib.AbstractContextManager[Measure]:
    """Stable-Baselines3's SAC."""
    from stable_baselines3 import SAC

    return _training(SAC, device="cpu")


def sbx() -> contextlib.AbstractContextManager[Measure]:
    """SBX's SAC."""
    from sbx import SAC

    return _training(SAC)


def _training(algorithm: Any, **arguments: Any) -> contextlib.AbstractContextManager[Measure]:
    import gymnasium
    import numpy as np
    from stable_baselines3.common.logger import configure

    class Specs(gymnasium.Env):
        """An environment with Minitaur's shapes only."""

        observation_space = gymnasium.spaces.Box(-10, 10, (28,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (8,), np.float32)

    model = algorithm(
        "MlpPolicy",
        Specs(),
        learning_rate=3e-4,
        buffer_size=CAPACITY,
        batch_size=BATCH_SIZE,
        gamma=0.99,
        tau=0.005,
        policy_kwargs={"net_arch": [256, 256]},
        **arguments,
    )
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    for _ in range(CAPACITY):
        observation, next_observation = rng.uniform(-1, 1, (2, 1, 28)).astype(np.float32)
        action = rng.uniform(-1, 1, (1, 8)).astype(np.float32)
        reward = rng.uniform(-1, 1, 1).astype(np.float32)
        model.replay_buffer.add(observation, next_observation, action, reward, np.array([False]), [{}])

    def train() -> int:
        model.train(gradient_steps=50, batch_size=BATCH_SIZE)
        return 50

    return repeating(train, "updates_per_sec")


if __name__ == "__main__":
    run_program(ours=ours, recipe=recipe, stock=stock, sb3=sb3, sbx=sbx)
