"""What each role says while it waits: for whom, on which table and address, and how the account stands."""

from __future__ import annotations

import dataclasses
import re
import threading

import numpy as np
import pytest
import tensorflow as tf
import tree

from actorlearner.cluster import Cluster
from actorlearner.collecting import collector
from actorlearner.experiment import load_experiment
from actorlearner.replay.servers import ReplayServers
from actorlearner.reports import CollectReport
from actorlearner.roles import collect_actor, eval_actor, learner, replay_server
from actorlearner.runtime import lifecycle
from actorlearner.runtime.lifecycle import Stop
from actorlearner.runtime.rows import Reporter
from actorlearner.training import waiting
from tests.replay.episodes import RANDOM

BINDINGS = ["train.initial_collect_steps = 1000", "train.num_environments = 1", "dqn.fc_layer_params = (8,)"]
SOON_SECS = 0.2  # half a minute, in these tests


@pytest.fixture
def experiment():
    return load_experiment("dqn_cartpole", BINDINGS)


@pytest.fixture
def server(serve, experiment):
    return serve(sum(replay_server._make_tables(experiment), []))


@pytest.fixture
def cluster(server):
    return Cluster(f"localhost:{server.port}", f"localhost:{server.port}")


@pytest.fixture
def run(server, monkeypatch, caplog):
    """`run(role, ...)` runs a role in a thread, for which half a minute is short; it is stopped before its server."""
    caplog.set_level("INFO")
    for module in (lifecycle, collector, eval_actor, waiting):
        monkeypatch.setattr(module, "SAY_EVERY_SECS", SOON_SECS)
    stop = Stop()
    threads = []

    def start(role, *arguments):
        threads.append(threading.Thread(target=role, args=(*arguments, stop), daemon=True))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def said(caplog, pattern):
    return any(re.search(pattern, message) for message in caplog.messages)


def test_a_learner_that_waits_says_how_much_is_collected_and_what_its_actors_do(
    run, cluster, experiment, tmp_path, caplog, eventually
):
    """Whether to wait on, or to look after actors that died or are too few, is seen from nothing else."""
    address = cluster.replay_address
    agent, _ = experiment.make_agent()
    sink = experiment.replay.make_sink(ReplayServers([address]), experiment.sampling(agent))
    spec = agent.collect_data_spec
    step = tree.map_structure(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype.as_numpy_dtype), spec)
    step = step._replace(step_type=np.ones(1, np.int32), next_step_type=np.ones(1, np.int32))  # of the middle
    while not sink.num_chunks:
        sink.append(step, RANDOM, np.array([False]))
    sink.close(timeout_secs=10)
    run(learner.run_learner, experiment, cluster, tmp_path, tf.distribute.get_strategy(), {})
    reporter = Reporter(address)
    reports = [CollectReport(task + 1, task, 0, 0, 0, 0.0, 0.0, 1.0) for task in (0, 1)]

    def is_said():
        for number, report in enumerate(reports):
            reports[number] = dataclasses.replace(report, environment_steps=report.environment_steps + 10)
            assert reporter.send(reports[number])
        return said(
            caplog,
            rf"waiting for collect actors to fill the replay at {address} \(tables 'experience', 'stream'\): "
            r"\d\d of 1,000 steps collected; actors: 2 alive, [1-9][\d,]* steps/s \(\d+ s\)",
        )

    eventually(is_said, secs=60)


def test_a_collect_actor_that_is_held_back_says_how_the_tables_stand(
    run, cluster, experiment, tmp_path, caplog, eventually
):
    """A learner that trains too slowly and one that is away look the same from here, but for the account."""
    run(collect_actor.run_collect_actor, experiment, cluster, tmp_path)
    line = (
        rf"waiting \d+ s for the replay at {cluster.replay_address} to take more: .*\(table 'experience': \d held, .*; "
        r"table 'stream': 4 held, 4 inserted, 0 sampled; actors are as far ahead as samples per insert allow\)"
    )
    eventually(lambda: said(caplog, line), secs=60)


def test_an_eval_actor_whose_server_is_away_says_so(run, server, cluster, experiment, caplog, eventually):
    """It said nothing until its patience was over: a silent process is taken for one that is idle."""
    run(eval_actor.run_eval_actor, experiment, cluster)
    eventually(lambda: said(caplog, "ready to evaluate"), secs=60)
    server.stop()
    line = (
        rf"waiting for the variable container at {cluster.variables_address} to send an evaluation, in its table "
        rf"'evaluations_due' \(\d+ s\): no Reverb server answers at {cluster.variables_address} within 5 s"
    )
    eventually(lambda: said(caplog, line), secs=60)
