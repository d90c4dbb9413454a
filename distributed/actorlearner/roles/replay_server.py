"""Replay server: holds every table that the other roles meet at.

collect actors --> [replay server] --> learner
                        ^ weights, evaluations, reports
"""

from __future__ import annotations

import logging
import socket
import time

import gin
import reverb
import tree
from tf_agents.specs import tensor_spec

from actorlearner import reports, variable_container
from actorlearner.experiment import Experiment
from actorlearner.runtime.configuration import NonNegativeFloat
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.runtime.messages import Unreachable
from actorlearner.variable_container import Phase


@gin.configurable("replay_server", module="actorlearner", denylist=["experiment", "port", "stop"])
def run_replay_server(
    experiment: Experiment, port: int, stop: Stop, *, linger_secs: NonNegativeFloat = 10.0
) -> ExitCode:
    """Serves until training is over or `stop` is set.

    Args:
      experiment: What to run; read only.
      port: To listen on, on every interface.
      stop: Set on SIGTERM; looked at twice a second.
      linger_secs: How long it answers after the end of training, in seconds, so that every role hears of it.

    Raises:
      RoleError: The port is taken (UNAVAILABLE), or the tables' settings contradict each other (USAGE).
    """
    server = _serve(_make_tables(experiment), port)
    logging.info("serving replay and variables on port %d", port)
    address = f"localhost:{port}"
    over_since = None
    while not stop.wait(0.5):
        try:
            version = variable_container.read_version(address)
        except Unreachable as error:
            logging.warning("%s", error)
            continue
        if version is not None and version.phase == Phase.OVER:
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > linger_secs:
                logging.info("training is over")
                break
        else:
            over_since = None
    server.stop()
    return stop.exit_code if stop.is_set() else ExitCode.DONE


def _make_tables(experiment: Experiment) -> list[reverb.Table]:
    agent, _ = experiment.make_agent()
    try:
        replay_tables = experiment.replay.make_tables(
            _step_signature(agent.collect_data_spec), experiment.sampling(agent.train_sequence_length)
        )
    except ValueError as error:
        raise RoleError(str(error), ExitCode.USAGE) from error
    return [*replay_tables, *variable_container.make_tables(agent.collect_policy.variables()), *reports.make_tables()]


def _step_signature(collect_data_spec: object) -> object:
    # Bounds are the environment's to keep; Reverb compares types and shapes.
    return tree.map_structure(tensor_spec.TensorSpec.from_spec, collect_data_spec)


def _serve(tables: list[reverb.Table], port: int) -> reverb.Server:
    try:
        # gRPC shares a port with any other server that would; half the actors would then talk to the wrong one.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
        return reverb.Server(tables, port=port)
    except (OSError, RuntimeError, ValueError) as error:
        raise RoleError(
            f"--port = {port}: the replay server cannot listen there: {error}. "
            "Stop what uses the port, or give another.",
            ExitCode.UNAVAILABLE,
        ) from error
