"""Several replicas on one machine without GPUs: logical CPU devices under MirroredStrategy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from tests.documented_commands import documented
from tests.e2e.conftest import FinishedRun
from tests.e2e.processes import RUN_SECS, START_SECS, Processes, bind

# Devices are split before TensorFlow computes anything, so this needs a process of its own.
ONE_UPDATE = """
import json
import numpy as np
import tensorflow as tf
import tree
from tf_agents.specs import tensor_spec
from actorlearner.experiment import load_experiment
from actorlearner.replay.server_sampled import ServerSampledSource
from actorlearner.training.step import TrainFunction
from actorlearner.runtime.devices import make_strategy

GLOBAL_BATCH = 8
bindings = ["dqn.n_step_update = 1", "dqn.gradient_clipping = None", "dqn.target_update_period = 2"]
experiment = load_experiment("dqn_cartpole", bindings, seed=0)
strategies = [make_strategy("mirrored", num_logical_cpus=2), make_strategy("default")]
initial = []
result = {"replicas": [], "weights": [], "loss": []}
batch = None
for strategy in strategies:
    with strategy.scope():
        agent, train_step = experiment.make_agent()
    variables = agent.collect_policy.variables()
    initial = initial or [np.array(v.numpy()) for v in variables]
    for variable, value in zip(variables, initial):
        variable.assign(value)
    for variable, value in zip(agent._target_q_network.variables, initial):
        variable.assign(value)
    spec = tensor_spec.from_spec(agent.collect_data_spec)
    if batch is None:
        batch = tensor_spec.sample_spec_nest(
            tensor_spec.add_outer_dims_nest(spec, [GLOBAL_BATCH, 2]), seed=1, outer_dims=())
        batch = batch._replace(
            observation=tf.random.stateless_normal([GLOBAL_BATCH, 2, 4], [1, 2]),
            step_type=tf.ones([GLOBAL_BATCH, 2], tf.int32),
            next_step_type=tf.ones([GLOBAL_BATCH, 2], tf.int32),
            reward=tf.random.stateless_uniform([GLOBAL_BATCH, 2], [3, 4]),
            discount=tf.ones([GLOBAL_BATCH, 2]),
        )
        batch = tree.map_structure(np.asarray, batch)

    def make_dataset(leaves_out, context):
        rows = (batch, np.zeros(GLOBAL_BATCH, np.int64), np.zeros(GLOBAL_BATCH, bool))
        data = tf.data.Dataset.from_tensor_slices(rows).repeat()
        return data.batch(context.get_per_replica_batch_size(GLOBAL_BATCH), drop_remainder=True)

    source = ServerSampledSource("localhost:1", GLOBAL_BATCH, strategy, make_dataset)
    train = TrainFunction(agent, train_step, source, strategy)
    scalars = train(source.handle, tf.constant(1))
    assert int(train_step.numpy()) == 1
    result["replicas"].append(strategy.num_replicas_in_sync)
    result["loss"].append(float(scalars["loss"]))
    result["weights"].append([np.array(v.numpy()).tolist() for v in variables])
result["initial"] = [value.tolist() for value in initial]
print("RESULT " + json.dumps(result))
"""


def test_two_replicas_with_two_replay_servers_train_to_the_end_with_the_same_global_batch(
    processes: Processes, finished_run: FinishedRun, tmp_path
):
    """Elsewhere the batch is per replica whatever the manual says, so two devices train a different experiment.

    Each server has an actor and checkpoints of its own; each replica's mirror gets chunks of both. The experiment is
    the configuration that another run saved: that it can be given back is shown here too.
    """
    command = documented(
        "When one replay server is not enough",
        ".venv/bin/actorlearner train dqn_cartpole --num_replay_servers=2 --num_collect_actors=4",
        **{"dqn_cartpole": str(finished_run.root_dir / "operative_config.gin"), "actors=4": "actors=2"},
    )
    train = processes.start(
        *command[1:],
        "--root_dir=run",
        "--seed=3",
        "--strategy=mirrored",
        "--num_logical_cpus=2",
        "--num_video_episodes=0",
        *bind("train.num_iterations = 100"),
    )
    assert train.wait(RUN_SECS) == 0, train.output
    train.await_line(r"batch size 32: 2 replica\(s\) of 16")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_steps"] == 100
    assert [evaluation["train_step"] for evaluation in summary["evaluations"]] == [0, 100]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["replay"]["servers"].keys() == {
        f"127.0.0.1:{port}" for port in re.findall(r"--port=(\d+)", train_logs(tmp_path, "replay-server-*"))
    }
    # Which of the actors is the first to fill its server depends on the machine.
    saved = [next((tmp_path / "run" / "checkpoints").glob(f"{name}/*-*/about.json")) for name in ("replay", "replay-1")]
    assert sum(json.loads(about.read_text())["num_items"] for about in saved) > 0


def train_logs(folder: Path, pattern: str) -> str:
    return "".join(path.read_text() for path in (folder / "run" / "logs").glob(f"{pattern}.log"))


def test_one_update_by_two_replicas_is_the_update_by_one_on_the_same_global_batch(processes: Processes):
    """Losses averaged per replica and then summed double the step, which a learning curve does not show."""
    script = processes.start_python("-c", ONE_UPDATE)
    result = json.loads(script.await_line("^RESULT (.*)", START_SECS).group(1))
    assert script.wait(START_SECS) == 0, script.output
    assert result["replicas"] == [2, 1]
    np.testing.assert_allclose(result["loss"][0], result["loss"][1], rtol=1e-5)
    for two, one in zip(*result["weights"]):
        np.testing.assert_allclose(two, one, rtol=0, atol=2e-6)
    assert max(np.abs(np.subtract(w, b)).max() for w, b in zip(result["weights"][0], result["initial"])) > 5e-4
