"""THE DOOR: one command, `actorlearner`, with a subcommand for each role and each tool.

Nothing heavy is imported before a subcommand is chosen; `train` never imports TensorFlow at all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from actorlearner import __version__, checkout
from actorlearner.runtime.health import HANG_SECS
from actorlearner.supported_platform import check_platform
from actorlearner.tools import sweep

if TYPE_CHECKING:
    from actorlearner.cluster import Cluster
    from actorlearner.experiment import Experiment
    from actorlearner.runtime.lifecycle import ExitCode, Stop

_CHECKOUT = Path(__file__).resolve().parents[2]  # what this is in an installed package has no benchmarks


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one subcommand and returns its exit status; roles end the process themselves."""
    check_platform()
    arguments = make_parser().parse_args(argv)
    return arguments.run(arguments)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="actorlearner", description="Reinforcement learning as separate processes, with TF-Agents and Reverb."
    )
    parser.add_argument("--version", action="version", version=f"actorlearner {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    experiment, peers, run_directory = _experiment_flags(), _peer_flags(), _run_directory_flag()

    train = _add(
        commands, "train", _train, "train an experiment on this machine: starts and watches every role", [experiment]
    )
    train.add_argument("--root_dir", type=Path, help="run directory (default: runs/<experiment>-<time>)")
    train.add_argument(
        "--fresh", action="store_true", help="begin anew: what --root_dir holds is moved aside, and said where"
    )
    train.add_argument("--num_collect_actors", type=int, default=1, metavar="N", help="collect actors (default: 1)")
    train.add_argument("--num_eval_actors", type=int, default=1, metavar="N", help="eval actors (default: 1)")
    train.add_argument("--num_replay_servers", type=int, default=1, metavar="N", help="replay servers (default: 1)")
    train.add_argument("--via", default="", help=argparse.SUPPRESS)  # the drill's wire in front of the replay server
    _add_learner_flags(train)

    server = _add(commands, "replay-server", _replay_server, "serve replay and variables", [experiment, peers])
    server.add_argument(
        "--root_dir", type=Path, help="where the replay is saved and begins again from (default: it is not saved)"
    )
    server.add_argument(
        "--port", type=int, default=None,
        help="port to listen on (default: that of --advertise, or of this task's --replay_address)",
    )  # fmt: skip
    server.add_argument(
        "--advertise", metavar="HOST:PORT",
        help="join the run under way at --variables_address: the other roles find this server here",
    )  # fmt: skip
    server.add_argument(
        "--may_join", metavar="HOST:PORT[,...]",
        help="of the first replay server: others may join the run under way at these addresses (default: none may)",
    )  # fmt: skip
    server.add_argument(
        "--local_only", action="store_true", help="let nobody but this machine reach the port, as `train` does"
    )

    learner = _add(commands, "learner", _learner, "train on what the replay holds", [experiment, peers, run_directory])
    _add_learner_flags(learner)

    _add(commands, "collect-actor", _collect_actor, "collect experience", [experiment, peers, run_directory])
    _add(commands, "eval-actor", _eval_actor, "evaluate snapshots", [experiment, peers, run_directory])

    video = _add(commands, "video", _video, "record a run's policy, and a random one beside it", [])
    video.add_argument("root_dir", type=Path, metavar="ROOT_DIR", help="directory of a run")
    video.add_argument("--num_episodes", type=int, default=3, metavar="N", help="episodes in each video (default: 3)")
    video.add_argument("--seed", type=_non_negative, default=0, help="of the episodes (default: 0)")

    report = _add(commands, "report", _report, "print a run's evaluations and draw its learning curve", [])
    report.add_argument("root_dir", type=Path, metavar="ROOT_DIR", help="directory of a finished run")

    check = _add(commands, "check", _check, "say whether an experiment can be started; start nothing", [experiment])
    check.add_argument("--root_dir", type=Path, help="also: whether it can be written")

    health = _add(commands, "health", _health, "say whether the role that touches a file goes on", [])
    health.add_argument("file", type=Path, metavar="FILE", help="the role's --health_file")
    health.add_argument(
        "--max_age_secs", type=float, default=60.0, metavar="SECS", help="of the last sign of life (default: 60)"
    )

    await_end = _add(commands, "await-end", _await_end, "wait until the run in a directory is over, videos and all", [])
    await_end.add_argument("root_dir", type=Path, metavar="ROOT_DIR", help="its directory; may be empty yet")

    metrics = _add(commands, "metrics", _metrics, "serve a run's numbers to Prometheus", [])
    metrics.add_argument("root_dir", type=Path, metavar="ROOT_DIR", help="directory of a run")
    metrics.add_argument("--port", type=int, default=9464, metavar="N", help="to listen on (default: 9464)")
    metrics.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="0.0.0.0: for other machines too (default: 127.0.0.1)",
    )

    certs = _add(commands, "certs", _certs, "make the certificates of a run over TLS: a CA and one for each role", [])
    certs.add_argument("folder", type=Path, metavar="DIR", help="where they are written; what --tls_dir names")
    certs.add_argument(
        "--hosts", nargs="+", action="extend", default=[], metavar="NAME",
        help="names and addresses by which the others reach the replay server (default: localhost, replay-server)",
    )  # fmt: skip
    certs.add_argument("--days", type=_positive, default=365, metavar="N", help="their validity (default: 365)")
    certs.add_argument("--ca_days", type=_positive, default=3650, metavar="N", help="the CA's own (default: 3650)")
    certs.add_argument(
        "--renew", action="store_true", help="replace the roles' certificates by new ones of the CA in DIR"
    )
    certs.add_argument(
        "--check", action="store_true", help="write nothing: list them; exit code 1 when one expires --within_days"
    )
    certs.add_argument("--within_days", type=float, default=30.0, metavar="N", help="for --check (default: 30)")

    drill = _add(commands, "drill", _drill, "do to a small run what happens to long ones; say which promises held", [])
    if (_CHECKOUT / "drills" / "run.py").is_file():
        checkout.load("drills.run").add_arguments(drill)
    _add_bench_flags(_add(commands, "bench", _bench, "measure speed against references, in turns on this machine", []))
    sweep.add_arguments(_add(commands, "sweep", _sweep, "train variants with several seeds, and compare them", []))
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, parents: list[Any]
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=parents)
    command.set_defaults(run=run, command=name)
    return command


def _experiment_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "experiment", metavar="EXPERIMENT", help="a shipped experiment (sac_minitaur, dqn_cartpole) or a gin file"
    )
    flags.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="BINDING",
        help="overrides the gin file, e.g. 'train.num_iterations = 100'; may be repeated, or hold several divided by ;",
    )
    flags.add_argument(
        "--seed",
        type=_non_negative,
        default=None,
        help="every role's seeds derive from it (default: that of the run's first start in --root_dir; of a new run 0, "
        "train: a new one)",
    )
    flags.add_argument(
        "--peer_patience_secs", type=float, default=300.0, metavar="SECS",
        help="how long an unreachable peer is waited for (default: 300)",
    )  # fmt: skip
    flags.add_argument(
        "--hang_secs", type=_seconds, default=os.environ.get("ACTORLEARNER_HANG_SECS") or HANG_SECS, metavar="SECS",
        help="a role that steps no environment, makes no train step and answers no request for so long, and does not "
        "wait for a peer, has hung: it writes where each of its threads is and ends, to be started again; far more "
        f"than a start takes, or 0: never (default: the environment's ACTORLEARNER_HANG_SECS, else {HANG_SECS:g})",
    )  # fmt: skip
    return flags


def _peer_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "--replay_address",
        default="localhost:8008",
        metavar="HOST:PORT[,...]",
        help="of the replay server, or of several, by their task numbers (default: localhost:8008)",
    )
    flags.add_argument(
        "--variables_address",
        metavar="HOST:PORT",
        help="of the variable container (default: the first replay server's)",
    )
    flags.add_argument(
        "--task", type=_task, default=0, metavar="N",
        help="which of its kind this process is; auto: the first that is free in --root_dir (default: 0)",
    )  # fmt: skip
    flags.add_argument(
        "--tls_dir", default=os.environ.get("ACTORLEARNER_TLS_DIR", ""), metavar="DIR",
        help="mutual TLS with the certificates that `actorlearner certs DIR` made "
        "(default: the environment's ACTORLEARNER_TLS_DIR, else none)",
    )  # fmt: skip
    flags.add_argument(
        "--health_file", type=Path, metavar="FILE", help="touched while this role goes on: see actorlearner health"
    )
    flags.add_argument(
        "--final_code_file", type=Path, metavar="FILE",
        help="where starting again cannot help, write the exit code there and end with 0: for supervisors that start "
        "again whatever fails",
    )  # fmt: skip
    return flags


def _run_directory_flag() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "--root_dir", type=Path, default=Path("runs/current"), help="where this role writes (default: runs/current)"
    )
    return flags


def _add_learner_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strategy", choices=("default", "mirrored", "tpu"), default="default",
        help="one device, every visible GPU, or a TPU (default: default)",
    )  # fmt: skip
    parser.add_argument("--tpu", metavar="NAME", help="the TPU's name or address, for --strategy=tpu")
    parser.add_argument(
        "--num_logical_cpus", type=int, default=1, metavar="N",
        help="split the CPU into N devices, to try --strategy=mirrored without GPUs (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--num_video_episodes",
        type=_non_negative,
        default=3,
        metavar="N",
        help="episodes in each video, 0 for none (default: 3)",
    )


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="NAME",
        help="learner, learner-gpu, learner-recipe, minitaur, collect-minitaur, collect-cartpole, weights, scaling, "
        "tls, replay-servers and endurance (default: all but the last two)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="turns of each side (default: 5)")
    parser.add_argument(
        "--window_secs", type=float, metavar="SECS", help="least length of a timed window (default: the subject's own)"
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="N", help="length of the endurance run (default: 60)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench.json"), metavar="FILE", help="figures go here (default: bench.json)"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="measure nothing: print the table of an earlier run's --output"
    )
    parser.add_argument(
        "--peers_python", type=Path, default=_CHECKOUT / ".venv-bench" / "bin" / "python", metavar="PYTHON",
        help="interpreter with Stable-Baselines3 and SBX (default: that of .venv-bench, which launch/bench.sh makes)",
    )  # fmt: skip


def _task(text: str) -> Optional[int]:
    """Returns the number; None for "auto"."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number from 0, or auto") from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _non_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative: expected 0 or more")
    return number


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < threading.TIMEOUT_MAX:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}': expected seconds, from 0")


def _train(arguments: argparse.Namespace) -> int:
    from actorlearner.cluster import check_address
    from actorlearner.launcher import local

    name = Path(arguments.experiment).stem
    root_dir = arguments.root_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if arguments.fresh:
        from actorlearner.run.directory import RunDirectory
        from actorlearner.runtime.lifecycle import RoleError

        try:
            aside = RunDirectory(root_dir).move_aside()
        except RoleError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return int(error.exit_code)
        if aside:
            print(f"--fresh: the run that was in {root_dir} is now in {aside}; nothing was deleted", flush=True)
    learner_flags = [
        f"--strategy={arguments.strategy}",
        f"--num_logical_cpus={arguments.num_logical_cpus}",
        f"--num_video_episodes={arguments.num_video_episodes}",
    ]
    if arguments.tpu:
        learner_flags.append(f"--tpu={arguments.tpu}")
    bindings = list(arguments.gin_bindings)
    if not arguments.num_eval_actors:
        bindings.append("train.eval_interval = 0")  # nobody would ever take what is due
    try:
        if arguments.via:
            check_address("via", arguments.via)
        options = local.LocalOptions(
            experiment=arguments.experiment,
            root_dir=root_dir,
            num_collect_actors=arguments.num_collect_actors,
            num_eval_actors=arguments.num_eval_actors,
            num_replay_servers=arguments.num_replay_servers,
            seed=_choose_seed(arguments.seed, root_dir, default=int.from_bytes(os.urandom(3), "big")),
            gin_bindings=tuple(bindings),
            learner_flags=tuple(learner_flags),
            role_flags=(
                f"--peer_patience_secs={arguments.peer_patience_secs:g}",
                f"--hang_secs={arguments.hang_secs:g}",
            ),
            via=arguments.via,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    return local.run_local(options)


def _replay_server(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        from actorlearner.cluster import check_address
        from actorlearner.runtime.lifecycle import ExitCode, RoleError

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
            _load_experiment(arguments),
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
    """Returns when these are addresses, and this server is the one to list them. Raises `ValueError`."""
    from actorlearner.cluster import check_address

    for address in may_join:
        check_address("may_join", address, arguments.may_join)
    if may_join and arguments.advertise:
        raise ValueError(
            f"--may_join = '{arguments.may_join}' and --advertise: only the first replay server lists who may"
        )


def _learner(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        from actorlearner.roles.learner import run_learner
        from actorlearner.run.directory import RunDirectory
        from actorlearner.run.starts import find_commit
        from actorlearner.runtime.devices import leave_one_core, make_strategy
        from actorlearner.runtime.eager_tensors import stop_leak
        from actorlearner.runtime.lifecycle import ExitCode

        stop_leak()
        leave_one_core()
        experiment = _load_experiment(arguments)
        strategy = make_strategy(arguments.strategy, tpu=arguments.tpu, num_logical_cpus=arguments.num_logical_cpus)
        command = {"bindings": arguments.gin_bindings, "commit": find_commit(_CHECKOUT)}
        code = run_learner(experiment, cluster, arguments.root_dir, strategy, _versions(), stop, command=command)
        if code == ExitCode.DONE:
            _show(experiment, arguments.root_dir, arguments.num_video_episodes)
            RunDirectory(arguments.root_dir).note_end()
        return code

    return _run_role(arguments, run)


def _show(experiment: Experiment, root_dir: Path, num_video_episodes: int) -> None:
    """Draws the curve and records the videos of a run that has ended.

    Raises:
      RoleError: That failed; to start the learner again would not help (CANNOT_CREATE).
    """
    from actorlearner.runtime.lifecycle import ExitCode, RoleError

    try:
        if experiment.schedule.eval_interval:  # else there are no points to draw
            _write_learning_curve(root_dir)
        if num_video_episodes:
            _record_videos(experiment, root_dir, num_video_episodes)
    except Exception as error:
        raise RoleError(
            f"training has ended and {root_dir / 'summary.json'} is written, but the curve or the videos could not be "
            f"made: {error!r}. Mend the cause and run: actorlearner video {root_dir}",
            ExitCode.CANNOT_CREATE,
        ) from error


def _collect_actor(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        from actorlearner.roles.collect_actor import run_collect_actor

        _keep_tensorflow_small()
        with _telling_why(arguments, cluster):
            return run_collect_actor(_load_experiment(arguments), cluster, arguments.root_dir, stop)

    return _run_role(arguments, run)


def _eval_actor(arguments: argparse.Namespace) -> int:
    def run(cluster: Cluster, stop: Stop) -> ExitCode:
        from actorlearner.roles.eval_actor import run_eval_actor

        _keep_tensorflow_small()
        with _telling_why(arguments, cluster):
            return run_eval_actor(_load_experiment(arguments), cluster, stop)

    return _run_role(arguments, run)


@contextlib.contextmanager
def _telling_why(arguments: argparse.Namespace, cluster: Cluster) -> Iterator[None]:
    """Leaves a word for the learner when an actor ends and starting it again cannot help."""
    from actorlearner import reports
    from actorlearner.runtime.lifecycle import FINAL_CODES, RoleError

    try:
        yield
    except RoleError as error:
        if error.exit_code in FINAL_CODES:
            words = reports.LastWords(arguments.command, cluster.task, int(error.exit_code), error.message)
            reports.leave_last_words(cluster.variables_address, words)
        raise


def _run_role(arguments: argparse.Namespace, run: Callable[[Cluster, Stop], ExitCode]) -> int:
    """Runs one role under signals and ends the process with its exit code; never returns."""
    from actorlearner.runtime.telemetry import set_up_logging

    set_up_logging()  # before TensorFlow is imported
    from actorlearner.cluster import Cluster
    from actorlearner.runtime.health import watch
    from actorlearner.runtime.lifecycle import ExitCode, RoleError, run_to_exit
    from actorlearner.runtime.sockets import notice_dead_peers

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


def _open_to_peers(arguments: argparse.Namespace, port: int) -> int:
    """Opens the replay server's end of the tunnels at `port`; returns the port where Reverb is to listen."""
    from actorlearner.runtime.lifecycle import ExitCode, RoleError
    from actorlearner.runtime.ports import find_free_port
    from actorlearner.runtime.tls.tunnel import open_to_peers, use_certificates

    if arguments.local_only:
        raise RoleError("--local_only and --tls_dir: expected one of them: TLS is for other machines", ExitCode.USAGE)
    folder, reverb_port = Path(arguments.tls_dir) / arguments.command, find_free_port()
    use_certificates(folder, in_the_clear=[f"localhost:{reverb_port}"])
    open_to_peers(port, folder, reverb_port)
    return reverb_port


def _run_with_peers(arguments: argparse.Namespace, cluster: Cluster, run: Callable[[], ExitCode]) -> ExitCode:
    """Runs a role that others answer, through TLS if asked; when they do not, its error says what is wrong with TLS.

    Raises:
      RoleError: As `run`; REFUSED in place of UNAVAILABLE when a certificate is the reason.
    """
    from actorlearner.runtime.lifecycle import ExitCode, RoleError
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
                    f"{error.message} {address} speaks TLS: give --tls_dir, with certificates of the same "
                    "`actorlearner certs`.",
                    ExitCode.REFUSED,
                ) from error
        raise


def _claim_task(arguments: argparse.Namespace) -> int:
    import logging

    from actorlearner.run.directory import RunDirectory

    if arguments.root_dir is None:
        raise ValueError("--task = auto: expected a --root_dir, in which the first free number is looked for")
    task = RunDirectory(arguments.root_dir).claim_task(arguments.command)
    logging.info("--task=auto: this is task %d", task)
    return task


def _keep_tensorflow_small() -> None:
    from actorlearner.runtime.devices import hold_to_one_thread
    from actorlearner.runtime.eager_tensors import stop_leak

    stop_leak()
    hold_to_one_thread()


def _load_experiment(arguments: argparse.Namespace) -> Experiment:
    from actorlearner.experiment import load_experiment

    seed = _choose_seed(arguments.seed, arguments.root_dir, default=0)
    return load_experiment(arguments.experiment, arguments.gin_bindings, seed=seed)


def _choose_seed(given: Optional[int], root_dir: Optional[Path], *, default: int) -> int:
    """Returns the seed given; else that of the first start of the run in `root_dir`; else the default."""
    from actorlearner.run.directory import RunDirectory

    if given is not None:
        return given
    own = RunDirectory(root_dir).read_seed() if root_dir else None
    return default if own is None else own


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("tensorflow", "tf-agents", "dm-reverb", "gym", "pybullet", "numpy")
    return {"actorlearner": __version__, "python": sys.version.split()[0], **{name: version(name) for name in packages}}


def _video(arguments: argparse.Namespace) -> int:
    from actorlearner.runtime.telemetry import set_up_logging

    set_up_logging()
    from actorlearner.runtime.lifecycle import ExitCode, RoleError, run_to_exit

    def run(_stop: Stop) -> ExitCode:
        from actorlearner.experiment import load_experiment

        config = arguments.root_dir / "operative_config.gin"
        if not config.is_file():
            raise RoleError(f"'{arguments.root_dir}' is no run directory: there is no {config}.", ExitCode.USAGE)
        _keep_tensorflow_small()
        experiment = load_experiment(str(config), seed=arguments.seed)
        _record_videos(experiment, arguments.root_dir, arguments.num_episodes)
        return ExitCode.DONE

    run_to_exit(run)


def _record_videos(experiment: Experiment, root_dir: Path, num_episodes: int) -> None:
    import logging

    from actorlearner.tools import video

    seed = experiment.derive_seed("video")
    logging.info("recording %d episodes of the run's policy and of a random one", num_episodes)
    videos = video.record_run(
        root_dir,
        lambda: experiment.make_environment(seed),
        experiment.steps_per_second,
        num_episodes=num_episodes,
        seed=seed,
    )
    for info in videos.values():
        logging.info("%s: %s, %.1f s at %g frames/s", info.path, info.title, info.seconds, info.fps)


def _report(arguments: argparse.Namespace) -> int:
    import json

    from actorlearner.tools import report

    try:
        path = report.write_learning_curve(arguments.root_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    print(report.format_summary(json.loads((arguments.root_dir / "summary.json").read_text())))
    print(path)
    return 0


def _write_learning_curve(root_dir: Path) -> None:
    from actorlearner.tools import report

    report.write_learning_curve(root_dir)


def _check(arguments: argparse.Namespace) -> int:
    from actorlearner.runtime.telemetry import set_up_logging

    set_up_logging()
    from actorlearner.runtime.lifecycle import ExitCode, run_to_exit

    def run(_stop: Stop) -> ExitCode:
        if arguments.root_dir:
            from actorlearner.run.directory import RunDirectory

            RunDirectory(arguments.root_dir).require_writable()
        experiment = _load_experiment(arguments)
        print(f"{experiment.name} can be started", flush=True)
        return ExitCode.DONE

    run_to_exit(run)


def _health(arguments: argparse.Namespace) -> int:
    from actorlearner.runtime.health import describe_problem

    problem = describe_problem(arguments.file, arguments.max_age_secs)
    print(problem or "goes on")
    return 1 if problem else 0


def _await_end(arguments: argparse.Namespace) -> int:
    from actorlearner.runtime.telemetry import set_up_logging

    set_up_logging()
    from actorlearner.runtime.lifecycle import run_to_exit
    from actorlearner.tools.ending import await_end

    run_to_exit(lambda stop: await_end(arguments.root_dir, stop))


def _metrics(arguments: argparse.Namespace) -> int:
    from actorlearner.runtime.telemetry import set_up_logging

    set_up_logging()
    from actorlearner.runtime.lifecycle import run_to_exit
    from actorlearner.tools.metrics import serve_metrics

    run_to_exit(lambda stop: serve_metrics(arguments.root_dir, arguments.host, arguments.port, stop))


def _certs(arguments: argparse.Namespace) -> int:
    import datetime

    from actorlearner.tools import certificates

    try:
        if arguments.check:
            found = certificates.read_certificates(arguments.folder)
        else:
            found = certificates.make_certificates(
                arguments.folder,
                arguments.hosts,
                days=arguments.days,
                ca_days=arguments.ca_days,
                renew=arguments.renew,
            )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 73 if isinstance(error, OSError) else 64
    now = datetime.datetime.now(datetime.timezone.utc)
    text, is_due = certificates.describe(found, now, arguments.within_days)
    print(text)
    renewal = f"actorlearner certs {arguments.folder} --renew"
    if arguments.check:
        if is_due:
            print(f"Renew with: {renewal}", file=sys.stderr)
        return 1 if is_due else 0
    print(
        f"Copy to each machine only the folders of its roles, with their owner's eyes alone on tls.key; keep "
        f"{arguments.folder / certificates.CA_KEY} off them all.\nBefore they expire: {renewal}"
    )
    return 0


def _drill(arguments: argparse.Namespace) -> int:
    return checkout.load("drills.run").run(arguments)


def _sweep(arguments: argparse.Namespace) -> int:
    # `train`'s own rules refuse a wrong flag now, rather than in every trial.
    return sweep.run(arguments, make_parser().parse_args(["train", "EXPERIMENT", *arguments.train_flags]))


def _bench(arguments: argparse.Namespace) -> int:
    if not (_CHECKOUT / "benchmarks" / "run.py").is_file():
        print(
            "error: the benchmarks are not in the installed package. Run them from a checkout of the repository: "
            "./launch/bench.sh",
            file=sys.stderr,
        )
        return 64
    sys.path.insert(0, str(_CHECKOUT))
    from benchmarks.run import run_bench

    return run_bench(arguments)
