"""Starts any role as a process: its arguments, signals, connections to peers, and exit code.

Heavy imports come after the arguments have been checked.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actorlearner import __version__, checkout
from actorlearner.cluster import Cluster, check_address
from actorlearner.flags import (
    add_experiment_flags,
    add_learner_flags,
    add_peer_flags,
    add_run_directory_flag,
    load_chosen_experiment,
)
from actorlearner.run.directory import RunDirectory
from actorlearner.run.starts import find_commit
from actorlearner.runtime.health import watch
from actorlearner.runtime.lifecycle import FINAL_CODES, ExitCode, RoleError, Stop, run_to_exit
from actorlearner.runtime.ports import find_free_port
from actorlearner.runtime.sockets import notice_dead_peers
from actorlearner.runtime.telemetry import set_up_logging

if TYPE_CHECKING:
    from actorlearner.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class RoleCommand:
    """A role's subcommand.

    Attributes:
      summary: One line for --help.
      add_arguments: Adds its arguments to a parser.
      run: Runs it and ends the process with its exit code; never returns.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _add_replay_server_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_flags(parser)
    add_peer_flags(parser)
    parser.add_argument(
        "--root_dir", type=Path, help="where the replay is saved and restored from (default: it is not saved)"
    )
    parser.add_argument(
        "--port", type=int, default=None,
        help="port to listen on (default: that of --advertise, or of this task's --replay_address)",
    )  # fmt: skip
    parser.add_argument(
        "--advertise", metavar="HOST:PORT",
        help="join the training of --variables_address; the address at which the other roles reach this server",
    )  # fmt: skip
    parser.add_argument(
        "--may_join", metavar="HOST:PORT[,...]",
        help="first replay server only: addresses at which others may join during training (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--local_only", action="store_true", help="close the port to other machines, as `train` does"
    )


def _add_learner_arguments(parser: argparse.ArgumentParser) -> None:
    _add_actor_arguments(parser)
    add_learner_flags(parser)


def _add_actor_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_flags(parser)
    add_peer_flags(parser)
    add_run_directory_flag(parser)


def _replay_server(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        addresses = cluster.replay_addresses
        may_join = tuple(arguments.may_join.split(",")) if arguments.may_join else ()
        try:
            _check_may_join(arguments, may_join)
            if arguments.advertise:
                check_address("advertise", arguments.advertise)
            elif cluster.task >= len(addresses) > 1:
                raise ValueError(
                    f"--task = {cluster.task}: --replay_address lists {len(addresses)} replay servers, the last of "
                    f"them task {len(addresses) - 1}. To join the run as one more, give --advertise=HOST:PORT."
                )
        except ValueError as error:
            raise RoleError(str(error), ExitCode.USAGE) from error
        own = arguments.advertise or addresses[cluster.task if len(addresses) > 1 else 0]
        is_alone = not arguments.advertise and len(addresses) == 1 and not arguments.variables_address
        is_first = is_alone or cluster.variables_address == own
        from actorlearner.roles.replay_server import run_replay_server

        _keep_tensorflow_small()
        port = arguments.port or int(own.rpartition(":")[2])
        if arguments.tls_dir:
            port = _open_to_peers(arguments, port)
        return run_replay_server(
            load_chosen_experiment(arguments),
            port,
            arguments.root_dir,
            stop,
            task=cluster.task,
            variables_address=None if is_first else cluster.variables_address,
            advertise=arguments.advertise,
            may_join=may_join,
            local_only=arguments.local_only,
            tunnel_only=bool(arguments.tls_dir),
        )

    return _run_role(arguments, run)


def _check_may_join(arguments: argparse.Namespace, may_join: Sequence[str]) -> None:
    """Returns if these are addresses and this server may list them. Raises `ValueError`."""
    for address in may_join:
        check_address("may_join", address, arguments.may_join)
    if may_join and arguments.advertise:
        raise ValueError(
            f"--may_join = '{arguments.may_join}' and --advertise: only the first replay server may list who may join"
        )


def _learner(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        from actorlearner.roles.learner import run_learner
        from actorlearner.runtime.devices import leave_one_core, make_strategy
        from actorlearner.runtime.eager_tensors import stop_leak
        stop_leak()
        leave_one_core()
        experiment = load_chosen_experiment(arguments)
        strategy = make_strategy(arguments.strategy, tpu=arguments.tpu, num_logical_cpus=arguments.num_logical_cpus)
        command = {"bindings": arguments.gin_bindings, "commit": find_commit(checkout.ROOT)}
        code = run_learner(experiment, cluster, arguments.root_dir, strategy, _versions(), stop, command=command)
        if code == ExitCode.DONE:
            _show_results(experiment, arguments.root_dir, arguments.num_video_episodes)
            RunDirectory(arguments.root_dir).note_end()
        return code

    return _run_role(arguments, run)


def _show_results(experiment: Experiment, root_dir: Path, num_video_episodes: int) -> None:
    """Draws the curve and records the videos of a run that has ended.

    Raises:
      RoleError: That failed; a restart of the learner would not help (CANNOT_CREATE).
    """
    from actorlearner.tools.report import write_learning_curve
    from actorlearner.tools.video import record_videos

    try:
        if experiment.schedule.eval_interval:  # otherwise there are no points to draw
            write_learning_curve(root_dir)
        if num_video_episodes:
            record_videos(experiment, root_dir, num_video_episodes)
    except Exception as error:
        raise RoleError(
            f"training has ended and {root_dir / 'summary.json'} is written, but the curve or the videos could not be "
            f"made: {error!r}. Fix the cause, then run: actorlearner video {root_dir}",
            ExitCode.CANNOT_CREATE,
        ) from error


def _collect_actor(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        from actorlearner.roles.collect_actor import run_collect_actor

        _keep_tensorflow_small()
        with _telling_why(arguments, cluster):
            return run_collect_actor(load_chosen_experiment(arguments), cluster, arguments.root_dir, stop)

    return _run_role(arguments, run)


def _eval_actor(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        from actorlearner.roles.eval_actor import run_eval_actor

        _keep_tensorflow_small()
        with _telling_why(arguments, cluster):
            return run_eval_actor(load_chosen_experiment(arguments), cluster, stop)

    return _run_role(arguments, run)


COMMANDS: Mapping[str, RoleCommand] = {
    "replay-server": RoleCommand("serve replay and variables", _add_replay_server_arguments, _replay_server),
    "learner": RoleCommand("train and publish weights", _add_learner_arguments, _learner),
    "collect-actor": RoleCommand("collect experience", _add_actor_arguments, _collect_actor),
    "eval-actor": RoleCommand("evaluate snapshots", _add_actor_arguments, _eval_actor),
}


def _run_role(arguments: argparse.Namespace, run: Callable[[Cluster, Stop], ExitCode]) -> int:
    """Runs one role with signal handling and ends the process with its exit code; never returns."""
    set_up_logging()  # before TensorFlow is imported
    def run_in_cluster(stop: Stop) -> ExitCode:
        watch(arguments.health_file, arguments.hang_secs)
        try:
            cluster = Cluster(
                replay_address=arguments.replay_address,
                variables_address=arguments.variables_address or arguments.replay_address.split(",")[0],
                task=_claim_task(arguments) if arguments.task is None else arguments.task,
                peer_patience_secs=arguments.peer_patience_secs,
            )
        except ValueError as error:
            raise RoleError(str(error), ExitCode.USAGE) from error
        ports = {int(address.rpartition(":")[2]) for address in (*cluster.replay_addresses, cluster.variables_address)}
        if getattr(arguments, "port", None):  # the replay server's own
            ports.add(arguments.port)
        notice_dead_peers(ports)
        if arguments.command == "replay-server":
            return run(cluster, stop)
        return _run_with_peers(arguments, cluster, lambda: run(cluster, stop))

    run_to_exit(run_in_cluster, arguments.final_code_file)


def _claim_task(arguments: argparse.Namespace) -> int:
    if arguments.root_dir is None:
        raise ValueError("--task = auto needs a --root_dir, in which it looks for the first free number")
    task = RunDirectory(arguments.root_dir).claim_task(arguments.command)
    logging.info("--task=auto: this is task %d", task)
    return task


def _open_to_peers(arguments: argparse.Namespace, port: int) -> int:
    """Opens the replay server's TLS end at `port`; returns the port on which Reverb must listen."""
    from actorlearner.runtime.tls.tunnel import open_to_peers, use_certificates

    if arguments.local_only:
        raise RoleError("--local_only and --tls_dir: give one of them: TLS is for other machines", ExitCode.USAGE)
    folder, reverb_port = Path(arguments.tls_dir) / arguments.command, find_free_port()
    use_certificates(folder, in_the_clear=[f"localhost:{reverb_port}"])
    open_to_peers(port, folder, reverb_port)
    return reverb_port


def _run_with_peers(arguments: argparse.Namespace, cluster: Cluster, run: Callable[[], ExitCode]) -> ExitCode:
    """Runs a role that has peers, through TLS if asked; if a peer does not answer, the error says what TLS reports.

    Raises:
      RoleError: As `run`; REFUSED instead of UNAVAILABLE if a certificate is the reason.
    """
    from actorlearner.runtime.tls.certificates import speaks_tls
    from actorlearner.runtime.tls.tunnel import find_trouble, use_certificates

    if arguments.tls_dir:
        use_certificates(Path(arguments.tls_dir) / arguments.command)
    try:
        return run()
    except RoleError as error:
        if error.exit_code != ExitCode.UNAVAILABLE:
            raise
        trouble = find_trouble()
        if trouble:
            text, is_refused = trouble
            raise RoleError(
                f"{error.message} {text}", ExitCode.REFUSED if is_refused else ExitCode.UNAVAILABLE
            ) from error
        for address in () if arguments.tls_dir else {*cluster.replay_address.split(","), cluster.variables_address}:
            host, _, port = address.rpartition(":")
            if speaks_tls(host, int(port)):
                raise RoleError(
                    f"{error.message} {address} uses TLS: give --tls_dir, with certificates from the same "
                    "`actorlearner certs`.",
                    ExitCode.REFUSED,
                ) from error
        raise


@contextlib.contextmanager
def _telling_why(arguments: argparse.Namespace, cluster: Cluster) -> Iterator[None]:
    """Sends the learner the reason when an actor ends with an error that a restart does not help."""
    from actorlearner import reports
    try:
        yield
    except RoleError as error:
        if error.exit_code in FINAL_CODES:
            words = reports.ExitReason(arguments.command, cluster.task, int(error.exit_code), error.message)
            reports.send_exit_reason(cluster.variables_address, words)
        raise


def _keep_tensorflow_small() -> None:
    from actorlearner.runtime.devices import hold_to_one_thread
    from actorlearner.runtime.eager_tensors import stop_leak

    stop_leak()
    hold_to_one_thread()


def _versions() -> dict[str, str]:
    packages = ("tensorflow", "tf-agents", "dm-reverb", "gym", "pybullet", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"actorlearner": __version__, "python": sys.version.split()[0], **versions}
