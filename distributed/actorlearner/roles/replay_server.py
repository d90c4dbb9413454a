"""Replay server: holds every table that the other roles meet at.

collect actors --> [replay server] --> learner
                        ^ weights, evaluations, reports
                        |
                        +--> its own checkpoints, from which it begins again

Of several the first is the variable container as well; the others hold their part of the replay, and look there how far
training is.
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
"""Time between two looks at how far training is; each costs some milliseconds and a line of Reverb's in the log."""


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

    Begins with the newest whole checkpoint under `root_dir`. Writes one whenever the learner asks, and at the end.

    Args:
      experiment: What to run; read only.
      port: To listen on, on every interface.
      root_dir: Where the replay's checkpoints are, under checkpoints/replay, or replay-<task>; None saves nothing.
      stop: Set on SIGTERM; looked at several times a second.
      task: Which of several replay servers.
      variables_address: Of the variable container, where another replay server is that; None: this one is.
      advertise: Joins the run under way at `variables_address`: the others find this server at this address.
      may_join: Addresses at which other replay servers may join; where this is the variable container.
      local_only: Lets nobody but this machine reach the port; where the system does not allow that, warns.
      tunnel_only: Likewise; where the system does not allow that, does not serve.
      linger_secs: How long it answers after the end of training, in seconds, so that every role hears of it.

    Raises:
      RoleError: The port is taken (UNAVAILABLE), the tables' settings contradict each other or the port cannot be
        closed (USAGE), the checkpoint or the first replay server has tables with other settings (DATA), or `root_dir`
        cannot be written (CANNOT_CREATE) or is held by another replay server (OCCUPIED).
    """
    replay_tables, other_tables = _make_tables(experiment, may_join)
    checkpoints = TableCheckpoints(RunDirectory(root_dir).replay_checkpoints(task), replay_tables) if root_dir else None
    if not checkpoints:
        logging.warning("without --root_dir the replay is not saved: it ends with this process")
    with beat_meanwhile(CHECKPOINT_SECS):  # the tables are read before the port opens
        checkpointer = checkpoints.make_checkpointer() if checkpoints else None
        server = _serve([*replay_tables, *other_tables], port, checkpointer)
    is_closed = (local_only or tunnel_only) and _close_to_other_machines(port)
    if tunnel_only and not is_closed:
        server.stop()
        raise RoleError(
            "--tls_dir: whoever cannot come through the tunnel could go round it, for the reason above. Run the replay "
            "server where it may close its port, or without --tls_dir behind a tunnel and a firewall of your own.",
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
    """The run's first replay server, as the others see it: the variable container, where a joined one is announced."""

    def __init__(self, address: str, tables: Sequence[reverb.Table], advertise: Optional[str]):
        self._address = address
        self._signatures: Optional[Mapping[str, Any]] = {table.name: table.info.signature for table in tables}
        self._announcement = Announcement(address, advertise) if advertise else None
        self._version: Optional[Version] = None
        self._is_away = False

    def look(self) -> Optional[Version]:
        """Returns how far training is, as of the last time that was heard of; blocks some seconds at most.

        Raises:
          RoleError: Its tables are another experiment's (DATA), or it does not let this server join (USAGE).
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
                logging.warning("%s; going on without the variable container until it does", error)
            self._is_away = True
        else:
            self._is_away = False
        return self._version


def _make_tables(experiment: Experiment, may_join: Sequence[str] = ()) -> tuple[list[reverb.Table], list[reverb.Table]]:
    """Returns the replay's tables, which checkpoints keep, and the others."""
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
    # Bounds are the environment's to keep; Reverb compares types and shapes.
    return tree.map_structure(tensor_spec.TensorSpec.from_spec, collect_data_spec)


def _serve(
    tables: list[reverb.Table], port: int, checkpointer: Optional[reverb.checkpointers.CheckpointerBase]
) -> reverb.Server:
    try:
        # gRPC shares a port with any other server that would; half the actors would then talk to the wrong one.
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
            "port %d can be reached from other machines, and who reaches it can read and change this run: this system "
            "does not let it be closed (%s). Put a firewall before it, such as: "
            "iptables -I INPUT ! -i lo -p tcp --dport %d -j DROP",
            port,
            error,
            port,
        )
        return False
    return True
