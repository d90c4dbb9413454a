"""Replay server: holds every table through which the roles communicate.

collect actors --> [replay server] --> learner
                        ^ weights, evaluations, reports
                        |
                        +--> its own checkpoints, from which it restarts

Of several servers the first is also the variable container; the others hold their part of the replay, and read the
phase of training there.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import gin
import reverb
import tree
from tf_agents.specs import tensor_spec

from actorlearner import reports, variable_container
from actorlearner.evaluations import queue
from actorlearner.experiment import Experiment
from actorlearner.replay import checkpoint_requests, servers
from actorlearner.replay.checkpoint_service import CHECKPOINT_SECS, CheckpointService
from actorlearner.replay.checkpoints import TableCheckpoints
from actorlearner.replay.servers import Announcement
from actorlearner.replay.tables import check_tables
from actorlearner.run.directory import RunDirectory
from actorlearner.runtime.configuration import NonNegativeFloat
from actorlearner.runtime.health import beat, beat_meanwhile
from actorlearner.runtime.lifecycle import ExitCode, RoleError, Stop
from actorlearner.runtime.messages import Unreachable, read_server_info
from actorlearner.runtime.sockets import close_to_other_machines
from actorlearner.variable_container import Belief, Phase, Version

VERSION_EVERY_SECS = 1.5
"""Time between two reads of the version board, in seconds; each takes milliseconds and makes Reverb log a line."""


@gin.configurable(
    "replay_server",
    module="actorlearner",
    denylist=[
        "experiment",
        "port",
        "root_dir",
        "stop",
        "task",
        "variables_address",
        "advertise",
        "may_join",
        "local_only",
        "tunnel_only",
    ],
)
def run_replay_server(
    experiment: Experiment,
    port: int,
    root_dir: Optional[Path],
    stop: Stop,
    *,
    task: int = 0,
    variables_address: Optional[str] = None,
    advertise: Optional[str] = None,
    may_join: Sequence[str] = (),
    local_only: bool = False,
    tunnel_only: bool = False,
    linger_secs: NonNegativeFloat = 10.0,
) -> ExitCode:
    """Serves until training is over or `stop` is set.

    Restores the newest whole checkpoint under `root_dir`. Saves when the learner asks, and at the end.

    Args:
      experiment: What to run; read only.
      port: Port to listen on, on every interface.
      root_dir: Holds the replay's checkpoints, under checkpoints/replay or replay-<task>; None saves nothing.
      stop: Set on SIGTERM; checked several times a second.
      task: Number of this replay server among several.
      variables_address: Address of the variable container; None: this server is it.
      advertise: Joins the running training of `variables_address`; the other roles reach this server here.
      may_join: Addresses at which more replay servers may join; only for the variable container.
      local_only: Closes the port to other machines; warns if the system does not allow that.
      tunnel_only: Likewise, but does not serve if the system does not allow that.
      linger_secs: How long it answers after the end of training, in seconds, so that every role learns of the end.

    Raises:
      RoleError: The port is taken (UNAVAILABLE), the tables' settings contradict each other or the port cannot be
        closed (USAGE), the checkpoint or the first replay server has tables with other settings (DATA), or `root_dir`
        cannot be written (CANNOT_CREATE) or is held by another replay server (OCCUPIED).
    """
    replay_tables, other_tables = _make_tables(experiment, may_join)
    checkpoints = TableCheckpoints(RunDirectory(root_dir).replay_checkpoints(task), replay_tables) if root_dir else None
    if not checkpoints:
        logging.warning("without --root_dir the replay is not saved: it is lost when this process ends")
    with beat_meanwhile(CHECKPOINT_SECS):  # the tables are read before the port opens
        checkpointer = checkpoints.make_checkpointer() if checkpoints else None
        server = _serve([*replay_tables, *other_tables], port, checkpointer)
    is_closed = (local_only or tunnel_only) and _close_to_other_machines(port)
    if tunnel_only and not is_closed:
        server.stop()
        raise RoleError(
            "--tls_dir: clients could bypass the TLS tunnel, because Reverb's port could not be closed (see above). "
            "Run the server where it may close its port, or without --tls_dir behind your own tunnel and firewall.",
            ExitCode.USAGE,
        )
    address = f"localhost:{port}"
    tables = read_server_info(address, timeout_secs=60)
    held = ", ".join(f"{tables[table.name].current_size:,} in '{table.name}'" for table in replay_tables)
    logging.info("the replay holds %s", held)
    logging.info("serving replay and variables on port %d%s", port, ", to this machine only" if is_closed else "")
    checkpointing = CheckpointService(
        address, variables_address or address, checkpoints, [table.name for table in replay_tables]
    )
    primary = PrimaryServer(variables_address, replay_tables, advertise) if variables_address else None
    over_since = None
    belief, is_over, looked_at = Belief(), False, 0.0
    while not stop.wait(0.25):
        try:
            checkpointing.serve_request()
            if time.monotonic() - looked_at > VERSION_EVERY_SECS:
                version = primary.look() if primary else variable_container.read_version(address)
                is_over = version is not None and belief.holds(version) and version.phase == Phase.OVER
                looked_at = time.monotonic()
        except Unreachable as error:
            logging.warning("%s", error)
            continue
        beat()
        if is_over:
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > linger_secs:
                logging.info("training is over")
                break
        else:
            over_since = None
    checkpointing.save_what_is_new()
    server.stop()
    return stop.exit_code if stop.is_set() else ExitCode.DONE


class PrimaryServer:
    """The run's first replay server, as another one sees it: it has the version board and the joined servers."""

    def __init__(self, address: str, tables: Sequence[reverb.Table], advertise: Optional[str]):
        self._address = address
        self._signatures: Optional[Mapping[str, Any]] = {table.name: table.info.signature for table in tables}
        self._announcement = Announcement(address, advertise) if advertise else None
        self._version: Optional[Version] = None
        self._is_away = False

    def look(self) -> Optional[Version]:
        """Returns the newest version read from the board; blocks at most some seconds.

        Raises:
          RoleError: Its tables belong to another experiment (DATA), or it does not admit this server (USAGE).
        """
        try:
            if self._signatures is not None:
                check_tables(self._address, read_server_info(self._address, timeout_secs=2), self._signatures)
                self._signatures = None
            if self._announcement:
                self._announcement.renew()
            self._version = variable_container.read_version(self._address, timeout_secs=2)
        except Unreachable as error:
            if not self._is_away:
                logging.warning("%s; continuing without the variable container until it answers", error)
            self._is_away = True
        else:
            self._is_away = False
        return self._version


def _make_tables(experiment: Experiment, may_join: Sequence[str] = ()) -> tuple[list[reverb.Table], list[reverb.Table]]:
    """Returns the replay's tables, which checkpoints store, and the other tables."""
    agent, _ = experiment.make_agent()
    try:
        replay_tables = experiment.replay.make_tables(
            _step_signature(agent.collect_data_spec), experiment.sampling(agent)
        )
    except ValueError as error:
        raise RoleError(str(error), ExitCode.USAGE) from error
    variables = agent.collect_policy.variables()
    other_tables = [*variable_container.make_tables(variables), *queue.make_tables(variables)]
    other_tables += [*reports.make_tables(), *checkpoint_requests.make_tables(), *servers.make_tables(may_join)]
    return replay_tables, other_tables


def _step_signature(collect_data_spec: object) -> object:
    # Without bounds, because Reverb compares types and shapes.
    return tree.map_structure(tensor_spec.TensorSpec.from_spec, collect_data_spec)


def _serve(
    tables: list[reverb.Table], port: int, checkpointer: Optional[reverb.checkpointers.CheckpointerBase]
) -> reverb.Server:
    try:
        # gRPC would share the port with another server, and half of the actors would reach the wrong one.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
        return reverb.Server(tables, port=port, checkpointer=checkpointer)
    except (OSError, RuntimeError, ValueError) as error:
        raise RoleError(
            f"--port = {port}: the replay server cannot listen there: {error}. "
            "Stop what uses the port, or give another.",
            ExitCode.UNAVAILABLE,
        ) from error


def _close_to_other_machines(port: int) -> bool:
    try:
        close_to_other_machines(port)
    except OSError as error:
        logging.warning(
            "port %d can be reached from other machines, where any client can read and change this run: this system "
            "does not allow closing it (%s). Put a firewall before it, such as: "
            "iptables -I INPUT ! -i lo -p tcp --dport %d -j DROP",
            port,
            error,
            port,
        )
        return False
    return True
