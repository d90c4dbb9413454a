"""What a user can get wrong: one clear message, a non-zero exit within the deadline, nothing damaged.

Each kind of error is met by at least one real process; its variants by the function that finds it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reverb
import tensorflow as tf

from actorlearner import variable_container
from actorlearner.cluster import Cluster
from actorlearner.experiment import load_experiment
from actorlearner.replay.servers import ReplayServers
from actorlearner.roles import replay_server
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.checkpoints import Checkpoints
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.variable_container import Publisher
from tests.e2e.conftest import FinishedRun
from tests.e2e.processes import START_SECS, Processes, bind

NUM_AT_ONCE = 3  # a process is busy with one core while it imports TensorFlow


@dataclasses.dataclass(frozen=True)
class Case:
    """A command with a mistake in it; words in {braces} are filled in by `surroundings`.

    Attributes:
      command: Subcommand, experiment, flags.
      exit_code: Expected.
      says: Regular expressions that the message matches, the cause first, then the remedy.
    """

    command: list[str]
    exit_code: ExitCode
    says: tuple[str, ...]


SOON = "--peer_patience_secs=2"
CASES = {
    "misspelt_gin_name": Case(
        ["learner", "dqn_cartpole", "--root_dir={tmp}/a", *bind("train.num_iteration = 100")],
        ExitCode.USAGE,
        (r"--gin_bindings: 'train' has no parameter 'num_iteration'", r"Did you mean 'train\.num_iterations'\?"),
    ),
    "misspelt_gin_name_in_a_file": Case(
        ["collect-actor", "{tmp}/misspelt.gin"],
        ExitCode.USAGE,
        (r"misspelt\.gin:2: ", r"there is no configurable 'trian'", r"Did you mean 'train\.batch_size'"),
    ),
    "wrong_type": Case(
        ["learner", "dqn_cartpole", *bind("train.batch_size = 'many'")],
        ExitCode.USAGE,
        (r"train\.batch_size = 'many'", r"expected a whole number"),
    ),
    "missing_experiment": Case(
        ["train", "dqn_cartpool", "--root_dir={tmp}/b"],
        ExitCode.USAGE,
        (r"there is no experiment 'dqn_cartpool'", r"dqn_cartpole, sac_minitaur"),
    ),
    "malformed_address": Case(
        ["collect-actor", "dqn_cartpole", "--replay_address=localhost"],
        ExitCode.USAGE,
        (r"--replay_address = 'localhost'", r"expected HOST:PORT"),
    ),
    "unreachable_address_for_a_collect_actor": Case(
        ["collect-actor", "dqn_cartpole", SOON, "--replay_address=localhost:{free_port}"],
        ExitCode.UNAVAILABLE,
        (r"the replay server at localhost:{free_port}", r"--peer_patience_secs = 2", r"Start what is missing"),
    ),
    "unreachable_address_for_an_eval_actor": Case(
        ["eval-actor", "dqn_cartpole", SOON, "--variables_address=localhost:{free_port}"],
        ExitCode.UNAVAILABLE,
        (r"the variable container at localhost:{free_port}", r"--peer_patience_secs = 2", r"correct the address"),
    ),
    "port_of_something_that_is_no_reverb_server": Case(
        ["learner", "dqn_cartpole", "--root_dir={tmp}/c", SOON, "--replay_address=localhost:{mute_port}"],
        ExitCode.UNAVAILABLE,
        (r"the replay server at localhost:{mute_port}", r"correct the address"),
    ),
    "port_of_another_reverb_server": Case(
        ["collect-actor", "dqn_cartpole", "--replay_address=localhost:{foreign_port}"],
        ExitCode.DATA,
        (r"localhost:{foreign_port} has no table '\w+' but somebody_elses", r"Correct --replay_address"),
    ),
    "server_of_another_experiment": Case(
        ["collect-actor", "sac_minitaur", "--replay_address=localhost:{cartpole_port}"],
        ExitCode.DATA,
        (r"belongs to another experiment", r"observation: .*\b4\].*\b64\]", r"Start the replay server with"),
    ),
    "unknown_environment": Case(
        ["replay-server", "dqn_cartpole", "--port={free_port}", *bind("gym_environment.env_name = 'CartPole-v7'")],
        ExitCode.USAGE,
        (r"'CartPole-v7' is not registered with gym", r"Did you mean 'CartPole-v"),
    ),
    "discrete_agent_on_continuous_actions": Case(
        ["learner", "dqn_cartpole", "--root_dir={tmp}/d", *bind("gym_environment.env_name = 'Pendulum-v1'")],
        ExitCode.USAGE,
        (r"dqn needs one discrete", r"include 'agents/sac\.gin'"),
    ),
    "root_dir_below_a_file_for_the_launcher": Case(
        ["train", "dqn_cartpole", "--root_dir={tmp}/file/run"],
        ExitCode.CANNOT_CREATE,
        (r"--root_dir=\S*/file/run cannot hold a run", r"name a directory"),
    ),
    "root_dir_below_a_file_for_the_learner": Case(
        ["learner", "dqn_cartpole", "--root_dir={tmp}/file/run", SOON],
        ExitCode.CANNOT_CREATE,
        (r"--root_dir = '\S*/file/run' cannot be written", r"Give a directory"),
    ),
    "root_dir_below_a_file_for_a_collect_actor": Case(
        ["collect-actor", "dqn_cartpole", "--root_dir={tmp}/file/run", "--replay_address=localhost:{cartpole_port}"],
        ExitCode.CANNOT_CREATE,
        (r"--root_dir = '\S*/file/run' cannot be written", r"Give a directory"),
    ),
    "root_dir_of_another_experiment": Case(
        ["learner", "sac_minitaur", "--root_dir={finished}", SOON],
        ExitCode.DATA,
        (r"--root_dir = '\S*' holds the run of another", r"environment: .*CartPole", r"Give another directory"),
    ),
    "second_learner_on_the_run_directory": Case(
        ["learner", "dqn_cartpole", "--root_dir={held}", SOON],
        ExitCode.OCCUPIED,
        (r"another learner is running in --root_dir = '\S*held'", r"Stop it, or give another directory"),
    ),
    "second_learner_on_the_servers": Case(
        ["learner", "dqn_cartpole", "--root_dir={tmp}/e", "--replay_address=localhost:{cartpole_port}"],
        ExitCode.OCCUPIED,
        (r"another learner publishes to the variable container at localhost:{cartpole_port}", r"Stop it, or give"),
    ),
    "port_in_use": Case(
        ["replay-server", "dqn_cartpole", "--port={mute_port}"],
        ExitCode.UNAVAILABLE,
        (r"--port = {mute_port}: the replay server cannot listen there", r"Stop what uses the port, or give another"),
    ),
}  # fmt: skip


def _digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".learner.lock"
    }


@pytest.fixture(scope="module")
def cartpole_server() -> Iterator[tuple[str, reverb.Server]]:
    """The address of a replay server of `dqn_cartpole`."""
    server = reverb.Server(sum(replay_server._make_tables(load_experiment("dqn_cartpole")), []), port=None)
    yield f"localhost:{server.port}", server
    server.stop()


@pytest.fixture(scope="module")
def foreign_server() -> Iterator[str]:
    """The address of a Reverb server that serves something else."""
    server = reverb.Server([reverb.Table.queue("somebody_elses", max_size=10)], port=None)
    yield f"localhost:{server.port}"
    server.stop()


@pytest.fixture(scope="module")
def surroundings(
    tmp_path_factory: pytest.TempPathFactory,
    cartpole_server: tuple[str, reverb.Server],
    foreign_server: str,
    finished_run: FinishedRun,
) -> Iterator[dict[str, str]]:
    """What the commands meet: servers, a listener that never answers, directories."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "file").write_text("not a directory")
    (folder / "misspelt.gin").write_text("include 'dqn_cartpole.gin'\ntrian.batch_size = 32\n")
    shutil.copytree(finished_run.root_dir, folder / "finished")
    held = RunDirectory(folder / "held")
    held.hold()
    address, _ = cartpole_server
    agent, _ = load_experiment("dqn_cartpole").make_agent()
    publisher = Publisher(address, learner=1)
    publisher.publish(7, agent.collect_policy.variables())
    with socket.socket() as mute, socket.socket() as free:
        mute.bind(("", 0))
        mute.listen()
        free.bind(("", 0))  # bound but not listening: nobody else gets it, nobody answers
        yield {
            "tmp": str(folder),
            "finished": str(folder / "finished"),
            "held": str(folder / "held"),
            "cartpole_port": address.rpartition(":")[2],
            "foreign_port": foreign_server.rpartition(":")[2],
            "mute_port": str(mute.getsockname()[1]),
            "free_port": str(free.getsockname()[1]),
        }
    publisher.close()
    assert held.root.is_dir()


def _fill(text: str, surroundings: dict[str, str]) -> str:
    for name, value in surroundings.items():
        text = text.replace("{" + name + "}", value)
    return text


@pytest.fixture(scope="module")
def endings(
    request: pytest.FixtureRequest, surroundings: dict[str, str]
) -> Iterator[dict[str, concurrent.futures.Future[tuple[int, str, str]]]]:
    """Exit code, stderr and all output of each case asked for, by its name; they run a few at a time."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    folder = Path(surroundings["tmp"])

    def run(processes: Processes, case: Case) -> tuple[int, str, str]:
        process = processes.start(*[_fill(word, surroundings) for word in case.command], cwd=folder)
        return process.wait(START_SECS), process.stderr, process.output

    with Processes(folder) as processes, concurrent.futures.ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        yield {name: pool.submit(run, processes, case) for name, case in CASES.items() if name in wanted}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_the_command_with_one_clear_message(name: str, endings, surroundings, finished_run):
    """A traceback, a wait without an end or a bare exit code leaves the user guessing."""
    case = CASES[name]
    exit_code, stderr, output = endings[name].result(START_SECS * len(CASES))
    assert exit_code == case.exit_code, output
    assert "Traceback" not in output
    assert "In call to configurable" not in stderr, "gin's words for programmers"
    assert len(re.findall("^error: ", stderr, re.MULTILINE)) == 1, stderr
    message = stderr[stderr.index("error: ") :]
    for pattern in case.says:
        assert re.search(_fill(pattern, surroundings), message), f"no '{pattern}' in:\n{message}"


def test_a_refused_learner_changes_nothing_in_the_directory(endings, surroundings, finished_run: FinishedRun):
    """A learner that writes before it looks has destroyed the run it then refuses."""
    if "root_dir_of_another_experiment" in endings:
        endings["root_dir_of_another_experiment"].result(START_SECS * len(CASES))
    assert _digest(Path(surroundings["finished"])) == _digest(finished_run.root_dir)


def test_a_refused_learner_leaves_the_other_ones_weights_published(endings, cartpole_server):
    """The second learner must not publish before it has checked for another one."""
    if "second_learner_on_the_servers" in endings:
        endings["second_learner_on_the_servers"].result(START_SECS * len(CASES))
    version = variable_container.read_version(cartpole_server[0])
    assert version is not None and (version.learner, version.train_step) == (1, 7)


@pytest.mark.parametrize(
    "binding, says",
    [
        ("trian.batch_size = 1", r"there is no configurable 'trian'.*Did you mean 'train\.batch_size'"),
        ("dqn.gama = 0.9", r"'dqn' has no parameter 'gama'.*Did you mean 'dqn\.gamma'"),
        ("replay_bufer_max_length = 3", r"Did you mean 'replay_buffer_max_length'"),
        ("experiment.agent = @dqm()", r"there is no configurable 'dqm'"),
        ("train.num_iterations = 1.5", r"train\.num_iterations = 1\.5: expected a whole number"),
        ("train.num_iterations = 0", r"train\.num_iterations = 0: expected a number >= 1"),
        ("dqn.gamma = 1.5", r"dqn\.gamma = 1\.5: expected a number >= 0 and <= 1"),
        ("dqn.td_errors_loss = 'hubber'", r"expected one of 'squared', 'huber'"),
        ("dqn.fc_layer_params = 100", r"expected a tuple"),
        ("uniform_replay.rate_limiter = 'none'", r"expected one of 'sample_to_insert_ratio'"),
        ("train.num_iterations = ", r"cannot be read as gin"),
        ("replay_buffer_capacity = 10", r"smaller than train\.initial_collect_steps"),
    ],
)
def test_a_wrong_binding_is_refused_before_anything_starts(binding: str, says: str):
    """gin itself swallows a misspelt macro, any type and any value."""
    with pytest.raises(RoleError, match=says) as refused:
        load_experiment("dqn_cartpole", [binding])
    assert refused.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":8008", "localhost:http", "localhost:0", "h:70000"])
def test_a_malformed_address_is_refused(address: str):
    """gRPC would wait for such a peer for ever."""
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        Cluster(replay_address="localhost:8008", variables_address=address)


def test_a_continuous_agent_on_discrete_actions_is_refused():
    """SAC would round its actions, or fail deep inside a network."""
    bindings = ["import actorlearner.agents.sac", "experiment.agent = @sac()"]
    with pytest.raises(RoleError, match="sac needs one continuous.*include 'agents/dqn.gin'") as refused:
        load_experiment("dqn_cartpole", bindings).make_agent()
    assert refused.value.exit_code == ExitCode.USAGE


def test_every_role_refuses_the_servers_of_another_experiment(cartpole_server, foreign_server: str):
    """Reverb would take the data, and the learner would fail on its shape hours later."""
    narrow = load_experiment("dqn_cartpole", ["dqn.fc_layer_params = (7,)"])
    agent, _ = narrow.make_agent()
    signatures = narrow.replay.table_signatures(agent.collect_data_spec)
    minitaur = load_experiment("sac_minitaur")
    other, _ = minitaur.make_agent()
    other_signatures = minitaur.replay.table_signatures(other.collect_data_spec)
    address, _ = cartpole_server
    for refuse in (
        lambda: ReplayServers([address]).await_tables(other_signatures, stop=Stop(), deadline_secs=10),
        lambda: ReplayServers([foreign_server]).await_tables(signatures, stop=Stop(), deadline_secs=10),
        # The environment is the same; only the network differs.
        lambda: variable_container.await_container(
            address, agent.collect_policy.variables(), stop=Stop(), deadline_secs=10
        ),
        lambda: variable_container.await_container(
            foreign_server, agent.collect_policy.variables(), stop=Stop(), deadline_secs=10
        ),
    ):
        with pytest.raises(RoleError) as refused:
            refuse()
        assert refused.value.exit_code == ExitCode.DATA


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path):
    """TensorFlow restores what fits and silently leaves the rest untrained."""
    step = tf.Variable(5, dtype=tf.int64)
    Checkpoints(tmp_path, step, {"agent": tf.Module()}).save({"collected": {}})
    module = tf.Module()
    module.weights = tf.Variable(np.zeros(3))
    with pytest.raises(RoleError, match="does not fit this experiment.*another --root_dir") as refused:
        Checkpoints(tmp_path, tf.Variable(0, dtype=tf.int64), {"agent": module}).restore()
    assert refused.value.exit_code == ExitCode.DATA
