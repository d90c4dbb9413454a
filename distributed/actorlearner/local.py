"""Local launcher: runs every role of one experiment on this machine until training ends.

                     +--> replay servers    each role: a process in a session of its own,
  [local launcher] --+--> learner           one log file, one colour in the merged stream;
                     +--> eval actors       started again, with back-off, when it dies;
                     +--> collect actors    never outliving the launcher, not even after kill -9

What a role's exit code tells the launcher:

  0                the learner: training ended. An actor: its work is done, if training is over; else start it again.
  64, 65, 73, 75   starting again cannot help (settings, data, root_dir, a second learner): stop all, return the code.
  69               a peer was out of reach or the port taken: start again. A new replay server gets another port first.
  anything else    a crash: show its last lines and start it again.

A role that dies young several times in a row is given up; the launcher then stops all and returns 1.

This module imports no TensorFlow, Reverb or gin, so the roles are started at once.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes  # noqa: F401  the first program a role's process runs needs it: fail here, not there
import dataclasses
import io
import json
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actorlearner.runtime import durable_files

REPLAY_SERVER = "replay-server"
LEARNER = "learner"
EVAL_ACTOR = "eval-actor"
COLLECT_ACTOR = "collect-actor"
ACTORS = (EVAL_ACTOR, COLLECT_ACTOR)

UNREACHABLE = 69
CANNOT_CREATE = 73
FINAL_CODES = {
    64: "its settings are wrong",
    65: "the data does not fit the experiment",
    CANNOT_CREATE: "it cannot write the run directory",
    75: "another learner is on this run",
}
STOPPED_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)
KILLED_CODES = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, *STOPPED_CODES)
GAVE_UP = 1

PHASES_AFTER_EVALUATION = ("reporting", "over")
PHASES_AFTER_TRAINING = ("final evaluation", *PHASES_AFTER_EVALUATION)
NUM_PORTS_TO_TRY = 3
NUM_LAST_LINES = 15

_HUNG_LINE = re.compile(r"^Timeout \(\d+:\d\d:\d\d")  # Python's fault handler's, before it ends the process
_ROLE_LOG_LINE = re.compile(r"^[DIWEF] \d\d:\d\d:\d\d ")
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


# --- What to run ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timing:
    """How patient the launcher is, in seconds. The defaults are for people; tests shorten them."""

    poll_secs: float = 0.1
    first_restart_secs: float = 1.0  # doubles with every death ...
    longest_restart_secs: float = 30.0  # ... up to here ...
    forgiven_after_secs: float = 60.0  # ... and starts anew after a life this long
    short_life_secs: float = 30.0
    num_short_lives: int = 5  # in a row; then the role is given up
    num_kills: int = 25  # in a row, each in a short life; then too
    end_by_themselves_secs: float = 15.0  # actors, once the learner has ended
    stop_actors_secs: float = 4.0  # from SIGTERM to SIGKILL
    stop_learner_secs: float = 8.0  # it saves a checkpoint
    stop_secs: float = 19.0  # all roles; replay servers have what the others left of it: a large replay takes its time
    second_signal_secs: float = 0.5  # signals closer together are one: `timeout` and shells deliver theirs twice
    old_error_secs: float = 10.0  # an error of a role that does not exit is shown after this
    old_status_secs: float = 10.0
    live_interval_secs: float = 1.0
    plain_interval_secs: float = 10.0


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """One local run: which experiment, where, with how many actors.

    Attributes:
      experiment: Name of a shipped experiment or path of a gin file; the roles look it up.
      root_dir: The run directory; made if missing, continued if it holds this run's checkpoints.
      num_collect_actors: At least 1.
      num_eval_actors: At least 0.
      num_replay_servers: At least 1; the first serves the variables too.
      seed: Root of every role's seeds; None leaves it to the roles.
      gin_bindings: Handed to every role, in this order.
      learner_flags: Further flags of the learner alone, such as `--strategy=mirrored`.
      role_flags: Further flags of every role.
      via: "HOST:PORT" of a proxy in front of the one replay server, by which the other roles reach it; "" for none.
      command: What a role's own arguments are appended to.
      timing: How patient the launcher is.
    """

    experiment: str
    root_dir: Path
    num_collect_actors: int = 1
    num_eval_actors: int = 1
    num_replay_servers: int = 1
    seed: int | None = None
    gin_bindings: tuple[str, ...] = ()
    learner_flags: tuple[str, ...] = ()
    role_flags: tuple[str, ...] = ()
    via: str = ""
    command: tuple[str, ...] = (sys.executable, "-m", "actorlearner")
    timing: Timing = Timing()

    def __post_init__(self) -> None:
        if self.num_collect_actors < 1:
            raise ValueError(f"num_collect_actors is {self.num_collect_actors}; training needs at least 1")
        if self.num_eval_actors < 0:
            raise ValueError(f"num_eval_actors is {self.num_eval_actors}; it must be 0 or more")
        if self.num_replay_servers < 1:
            raise ValueError(f"num_replay_servers is {self.num_replay_servers}; training needs at least 1")
        if self.via and self.num_replay_servers > 1:
            raise ValueError(
                f"via is {self.via}, a proxy in front of one replay server, but num_replay_servers is "
                f"{self.num_replay_servers}; give one of the two"
            )


def role_command(options: LocalOptions, kind: str, task: int, ports: Sequence[int]) -> list[str]:
    """Returns the command line of one role.

    Each replay server listens on one of `ports`; the others find it there, or at `options.via`.
    """
    addresses = [options.via] if options.via and kind != REPLAY_SERVER else [f"127.0.0.1:{port}" for port in ports]
    command = [
        *options.command,
        kind,
        options.experiment,
        f"--replay_address={','.join(addresses)}",
        f"--variables_address={addresses[0]}",
        f"--task={task}",
        f"--root_dir={options.root_dir}",
    ]
    if options.seed is not None:
        command.append(f"--seed={options.seed}")
    command += [f"--gin_bindings={binding}" for binding in options.gin_bindings]
    command += options.role_flags
    if kind == REPLAY_SERVER:
        command += [f"--port={ports[task]}", "--local_only"]
    if kind == LEARNER:
        command += options.learner_flags
    return command


def role_environment(kind: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns `environ` with what a role needs: headless, unbuffered, no TLS, and the GPUs for the learner alone."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **environ, "SDL_VIDEODRIVER": "dummy", "PYTHONUNBUFFERED": "1"}
    environment.pop("ACTORLEARNER_TLS_DIR", None)
    if kind != LEARNER:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    return environment


def find_free_port() -> int:
    """Returns a TCP port nobody listens on now. Somebody may take it before the replay server does."""
    return find_free_ports(1)[0]


def find_free_ports(number: int) -> list[int]:
    """Returns as many different ones."""
    probes = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(number)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


# --- When to start a role again ---------------------------------------------------------------------------------------


class Restarts:
    """Says how long to wait before a dead role's next start, or to give it up.

    The wait doubles with every death and starts anew after a long life. A run of short lives ends in giving up.
    """

    def __init__(self, timing: Timing):
        self._timing = timing
        self._next_secs = timing.first_restart_secs
        self._num_short_lives = 0
        self._num_kills = 0

    def secs_until_next(self, lived_secs: float, was_killed: bool = False) -> float | None:
        """Returns the wait in seconds after a life of `lived_secs`, or None to give up. Call once per death.

        Who is killed from outside (`was_killed`: SIGKILL, SIGTERM) did nothing wrong: it waits less, and is given up
        much later, in case it is the kernel that kills it for its memory.
        """
        timing = self._timing
        if was_killed:
            self._num_kills = self._num_kills + 1 if lived_secs < timing.short_life_secs else 0
            return None if self._num_kills >= timing.num_kills else timing.first_restart_secs
        self._num_short_lives = self._num_short_lives + 1 if lived_secs < timing.short_life_secs else 0
        if self._num_short_lives >= timing.num_short_lives:
            return None
        if lived_secs >= timing.forgiven_after_secs:
            self._next_secs = timing.first_restart_secs
        secs = self._next_secs
        self._next_secs = min(2 * secs, timing.longest_restart_secs)
        return secs


def describe_exit(returncode: int) -> str:
    """Returns what to say after the role's name: `crashed with exit code 1`, `was killed by SIGKILL`."""
    if returncode == 0:
        return "ended"
    if returncode in FINAL_CODES:
        return f"ended with exit code {returncode}: {FINAL_CODES[returncode]}"
    if returncode == UNREACHABLE:
        return f"ended with exit code {returncode}: a peer was out of reach or its port taken"
    if returncode in STOPPED_CODES:
        return f"was stopped by {signal.Signals(returncode - 128).name}"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-returncode).name}"
    return f"crashed with exit code {returncode}"


# --- What the learner says about training -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Status:
    """The learner's own account of training, from `status.json`. None where it said nothing usable."""

    phase: str
    train_step: int = 0
    num_iterations: int = 0
    train_steps_per_sec: float | None = None
    environment_steps: int = 0
    environment_steps_per_sec: float | None = None
    evaluated_train_step: int | None = None
    average_return: float | None = None
    seconds_left: float | None = None
    waiting_for: str | None = None
    time: float = 0.0

    @property
    def is_after_training(self) -> bool:
        return self.phase in PHASES_AFTER_TRAINING


def parse_status(text: str) -> Status | None:
    """Returns the status in `text`, or None if it is not one. Missing and non-finite numbers are not errors."""
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("phase"), str):
        return None
    evaluation = fields.get("last_evaluation")
    evaluation = evaluation if isinstance(evaluation, dict) else {}
    evaluated = _number(evaluation.get("train_step"))
    waiting_for = fields.get("waiting_for")
    return Status(
        phase=fields["phase"],
        train_step=int(_number(fields.get("train_step")) or 0),
        num_iterations=int(_number(fields.get("num_iterations")) or 0),
        train_steps_per_sec=_number(fields.get("train_steps_per_sec")),
        environment_steps=int(_number(fields.get("environment_steps")) or 0),
        environment_steps_per_sec=_number(fields.get("environment_steps_per_sec")),
        evaluated_train_step=None if evaluated is None else int(evaluated),
        average_return=_number(evaluation.get("average_return")),
        seconds_left=_number(fields.get("seconds_left")),
        waiting_for=waiting_for if isinstance(waiting_for, str) else None,
        time=_number(fields.get("time")) or 0.0,
    )


def read_status(path: Path, written_after: float) -> Status | None:
    """Returns the status in the file `path`, or None if there is none yet that this run wrote.

    A continued run finds the file of the run before it; only what is newer than `written_after` (unix seconds) counts.
    """
    try:
        status = parse_status(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if status is not None and status.time >= written_after else None


def describe_steps(status: Status) -> str:
    """Returns `41,000 of 100,000 train steps (41%), 193/s`."""
    words = f"{status.train_step:,}"
    if status.num_iterations > 0:
        words += f" of {status.num_iterations:,} train steps ({_percent(status)}%)"
    else:
        words += " train steps"
    return words + _rate(status.train_steps_per_sec)


def describe_rest(status: Status, age_secs: float, timing: Timing) -> str:
    """Returns everything but the train steps: environment steps, the last evaluation, time left, how old this is."""
    words = [f"{status.environment_steps:,} environment steps{_rate(status.environment_steps_per_sec)}"]
    if status.average_return is not None and status.evaluated_train_step is not None:
        words.append(f"last evaluation {status.average_return:,.1f} at {status.evaluated_train_step:,}")
    if status.seconds_left is not None and not status.is_after_training:
        words.append(f"{describe_secs(status.seconds_left)} left")
    if age_secs > timing.old_status_secs and status.phase != "reporting":  # recording videos takes its time
        words.append(f"no news for {describe_secs(age_secs)}")
    return "; ".join(words)


def describe_status(status: Status | None, age_secs: float = 0.0, timing: Timing = Timing()) -> str:
    """Returns the status as one plain line."""
    if status is None:
        return "starting: waiting for the learner"
    return f"{_phase(status)}: {describe_steps(status)}; {describe_rest(status, age_secs, timing)}"


def describe_secs(secs: float) -> str:
    """Returns `42 s`, `5 min 03 s` or `3 h 05 min`."""
    whole = max(0, round(secs))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def has_ended(path: Path) -> bool:
    """Returns whether the `summary.json` at `path` is of a run that has nothing left to do but its videos."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("has_ended") is True
    except (OSError, ValueError, AttributeError):
        return False


def describe_delivered(path: Path) -> str | None:
    """Returns one line on the policy the run hands over, from its `summary.json`, or None if that says nothing."""
    try:
        delivered = json.loads(path.read_text(encoding="utf-8"))["delivered"]
        return (
            f"delivered policy of train step {delivered['train_step']:,}: "
            f"average return {delivered['average_return']:,.1f}, "
            f"average episode length {delivered['average_episode_length']:,.1f}, "
            f"shortest {delivered['min_episode_length']:,} "
            f"({delivered['num_episodes']:,} fresh episodes)"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _phase(status: Status) -> str:
    return f"waiting for {status.waiting_for}" if status.phase == "waiting" and status.waiting_for else status.phase


def _percent(status: Status) -> int:
    return min(100, 100 * status.train_step // status.num_iterations)


def _rate(per_sec: float | None) -> str:
    if per_sec is None:
        return ""
    return f", {per_sec:,.1f}/s" if per_sec < 10 else f", {per_sec:,.0f}/s"


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


# --- The terminal -----------------------------------------------------------------------------------------------------


class _Console(Console):
    """A rich console whose reader may go away without ending the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@final
class Terminal:
    """The merged stream of all roles and, below it on a terminal, the live status.

    Used from one thread. A reader that goes away (`| head`) or a terminal that closes only silences it.
    """

    def __init__(self, names: Sequence[str], timing: Timing):
        self._timing = timing
        self._width = max(len(name) for name in (*names, "launcher"))
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
        self._live: Live | None = None
        self._last_status_time = -math.inf
        self._last_status_line = ""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")

    def __enter__(self) -> Terminal:
        console = _Console(file=sys.stdout, highlight=False)
        if sys.stdout.isatty() and not console.is_dumb_terminal:
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            with contextlib.suppress(OSError):
                self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None

    def show(self, name: str, line: str) -> None:
        """Shows one line of a role, or of the launcher itself."""
        line = "".join(c for c in line if c == "\t" or c.isprintable())
        if self._live is None:
            _write_line(f"{name:<{self._width}} | {line}")
            return
        text = Text(f"{name:<{self._width}} | ", style=self._colours.get(name, "bold"), overflow="fold")
        text.append(line, style={"W ": "yellow", "E ": "red", "F ": "red", "er": "red"}.get(line[:2], "default"))
        with contextlib.suppress(OSError):
            self._live.console.print(text)

    def status(self, status: Status | None, now: float, age_secs: float) -> None:
        """Shows the status if it is due at `now` (seconds of any one clock); as a plain line only if it changed."""
        interval_secs = self._timing.plain_interval_secs if self._live is None else self._timing.live_interval_secs
        if now - self._last_status_time < interval_secs:
            return
        self._last_status_time = now
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.update(live_status(status, age_secs, self._timing), refresh=True)
            return
        line = describe_status(status, age_secs, self._timing)
        if line != self._last_status_line:
            self._last_status_line = line
            self.show("status", line)


def live_status(status: Status | None, age_secs: float, timing: Timing) -> Group:
    """Returns the two lines at the bottom of a terminal: a progress bar, and the rest of the figures."""
    if status is None:
        return Group(Text(describe_status(None), style="bold"))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(_phase(status), style="bold", no_wrap=True),
        ProgressBar(total=max(1, status.num_iterations), completed=status.train_step, width=24),
        Text(describe_steps(status), no_wrap=True),
    )
    return Group(bar, Text(describe_rest(status, age_secs, timing), no_wrap=True, overflow="ellipsis"))


def _write_line(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the rest of the run must not stumble over it either, nor the interpreter at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


# --- Processes --------------------------------------------------------------------------------------------------------

# A role's process first runs this, with the launcher's process id and the role's command line: it asks the kernel to be
# killed when the launcher dies, and becomes the role. Doing so between fork and exec would not be safe with threads.
_BECOME_ROLE = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""

# The guard kills what roles have started in their turn (ffmpeg, environments in processes): it is told every process
# group that begins (+) or ends (-), and kills those left when its standard input closes, however the launcher died.
# Then it removes the folder that all of them have for temporary files: TensorFlow leaves some in it at every kill.
_GUARD = """
import os, shutil, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""

_BARE_PYTHON = (sys.executable, "-I", "-S", "-c")


class _Guard:
    """Kills the process groups it was told about, and removes their temporary files, when the launcher is no more."""

    def __init__(self) -> None:
        self.temporary_folder = tempfile.mkdtemp(prefix="actorlearner-")
        self._process = subprocess.Popen(
            [*_BARE_PYTHON, _GUARD, self.temporary_folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def begins(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def ended(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody killed the guard: the kernel still ends the roles themselves
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


class _Process:
    """One life of a role. A thread moves its output to the log file, and the lines worth showing to `shown_lines`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        shown_lines: queue.SimpleQueue[tuple[str, str]],
        guard: _Guard,
    ):
        self.started_at = time.monotonic()
        self.last_lines: collections.deque[str] = collections.deque(maxlen=NUM_LAST_LINES)
        self.errors: list[str] = []  # lines `error: ...` and what is indented below them; shown when the role ends
        self.errors_since = math.inf
        self.hung = False
        self._name = name
        self._log_path = log_path
        self._shown_lines = shown_lines
        self._guard = guard
        self._popen = subprocess.Popen(
            [*_BARE_PYTHON, _BECOME_ROLE, str(os.getpid()), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        guard.begins(self._popen.pid)
        self._reader = threading.Thread(target=self._read, args=(list(command),), name=f"{name} output", daemon=True)
        self._reader.start()

    def has_exited(self) -> bool:
        """Looks without reaping: until `reap`, the process id and group are this role's and nobody else's."""
        return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def terminate(self) -> None:
        """Asks the role to stop; what it has started in its turn is the role's to stop, or `reap`'s."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._popen.pid, signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kills what is left of the group and returns the role's exit code; its whole output has then been read."""
        self.kill()
        returncode = self._popen.wait()
        self._guard.ended(self._popen.pid)
        self._reader.join(timeout=2.0)
        return returncode

    def _read(self, command: list[str]) -> None:
        assert self._popen.stdout is not None
        with contextlib.ExitStack() as stack:
            log: io.FileIO | None = None
            with contextlib.suppress(OSError):  # a full disk must not block the role on its own output
                durable_files.end_last_line(self._log_path)
                log = stack.enter_context(open(self._log_path, "ab", buffering=0))
            stack.enter_context(self._popen.stdout)

            def keep(line: bytes) -> None:
                if log is not None:
                    with contextlib.suppress(OSError):
                        log.write(line)

            started = time.strftime("%Y-%m-%d %H:%M:%S")
            keep(f"--- {started} process {self._popen.pid}: {' '.join(command)}\n".encode(errors="replace"))
            in_error = False
            for raw in iter(lambda: self._popen.stdout.readline(1 << 16), b""):  # type: ignore[union-attr]
                keep(raw)
                line = raw.decode("utf-8", errors="replace").rstrip()
                if not line:
                    continue
                self.last_lines.append(line)
                in_error = line.startswith("error: ") or (in_error and line[0] in " \t")
                if in_error:
                    self.errors.append(line)
                    self.errors_since = min(self.errors_since, time.monotonic())
                elif _ROLE_LOG_LINE.match(line):
                    self._shown_lines.put((self._name, line))
                self.hung |= bool(_HUNG_LINE.match(line))


@dataclasses.dataclass
class _Role:
    """A place in the picture, held by one process after another."""

    kind: str
    task: int
    name: str
    log_path: Path
    restarts: Restarts
    num_starts: int = 0
    process: _Process | None = None
    restart_at: float | None = None  # None: alive, or finished
    last_returncode: int | None = None


@dataclasses.dataclass(frozen=True)
class _Ending:
    """Why the run ends: the launcher's exit code, and what to say about it."""

    code: int
    message: str
    is_failure: bool = False


# --- The launcher -----------------------------------------------------------------------------------------------------


def run_local(options: LocalOptions) -> int:
    """Runs all roles until training ends and returns the launcher's exit code. Call it from the main thread.

    Returns 0 when training reached its end; 64, 65, 73 or 75 when a role found that starting again cannot help; 1 when
    a role kept dying; 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP. No process is left behind in any case.
    """
    try:
        (options.root_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(
            f"error: --root_dir={options.root_dir} cannot hold a run ({e.strerror}); "
            "name a directory that can be made and written",
            file=sys.stderr,
        )
        return CANNOT_CREATE
    return _Launcher(options).run()


class _Launcher:
    """Starts, watches, restarts and stops the roles; one loop, in the main thread."""

    def __init__(self, options: LocalOptions):
        self._options = options
        self._timing = options.timing
        self._launched_at = time.time()
        self._ports: list[int] = []
        self._num_ports_tried = 0
        self._signals: list[int] = []
        self._last_signal_time = -math.inf
        self._shown_lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._status: Status | None = None
        self._status_read_at = -math.inf
        self._mute_errors = False

        self._replay_servers = [self._make_role(REPLAY_SERVER, task) for task in range(options.num_replay_servers)]
        self._learner = self._make_role(LEARNER, 0)
        self._actors = [self._make_role(EVAL_ACTOR, task) for task in range(options.num_eval_actors)]
        self._actors += [self._make_role(COLLECT_ACTOR, task) for task in range(options.num_collect_actors)]
        self._roles = [*self._replay_servers, self._learner, *self._actors]
        self._terminal = Terminal([role.name for role in self._roles], self._timing)

    def run(self) -> int:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_handled_signals(self._on_signal))
            self._guard = _Guard()
            stack.callback(self._guard.close)
            stack.callback(self._kill, self._roles)
            stack.enter_context(self._terminal)
            self._say(f"running {self._options.experiment} in {self._options.root_dir}")
            self._start_all()
            ending = self._watch()
            if ending.code == 0:
                self._wait(self._actors, self._timing.end_by_themselves_secs, num_signals=1)
            else:
                self._mute_errors = ending.is_failure
                why = "" if ending.is_failure else f"{ending.message}; "
                self._say(f"{why}stopping all roles")
            self._stop_in_order()
        if ending.code == 0 and self._signals:
            ending = self._stopped_by(self._signals[0])
        self._report(ending)
        return ending.code

    # Watching

    def _watch(self) -> _Ending:
        """Keeps all roles alive; returns when training ended, cannot go on, or is to stop."""
        while True:
            if self._signals:
                return self._stopped_by(self._signals[0])
            for role in self._roles:
                if role.process is not None and role.process.has_exited():
                    ending = self._on_exit(role)
                    if ending is not None:
                        return ending
                elif role.restart_at is not None and time.monotonic() >= role.restart_at:
                    self._restart(role)
            self._pump()

    def _on_exit(self, role: _Role) -> _Ending | None:
        """Takes a dead role's leave: finished, to be started again later, or the end of the run."""
        process, returncode = self._reap(role)
        lived_secs = time.monotonic() - process.started_at
        if role is self._learner and returncode == 0:
            return _Ending(0, "training ended")
        if returncode in FINAL_CODES:
            message = (
                "\n".join(process.errors) or f"error: {role.name} {describe_exit(returncode)}; see {role.log_path}"
            )
            return _Ending(returncode, message, is_failure=True)
        if returncode == 0 and self._is_done(role):
            return None
        if returncode == UNREACHABLE and role in self._replay_servers and self._may_change_port(role, lived_secs):
            self._say(f"port {self._ports[role.task]} was taken; starting all roles on another")
            self._stop_in_order()
            self._start_all()
            return None

        for line in process.errors:
            self._terminal.show(role.name, line)
        if process.hung:
            self._say(f'{role.name} hung (see --hang_secs): from "Timeout" on its log says where each thread was')
        elif returncode not in (0, UNREACHABLE, *STOPPED_CODES) and not process.errors:
            for line in process.last_lines:
                if not _ROLE_LOG_LINE.match(line):  # those have been shown
                    self._terminal.show(role.name, line)
        secs = role.restarts.secs_until_next(lived_secs, was_killed=returncode in KILLED_CODES)
        if secs is None:
            return _Ending(GAVE_UP, self._why_given_up(role, process, returncode), is_failure=True)
        self._say(f"{role.name} {describe_exit(returncode)}; starting it again in {secs:g} s (log: {role.log_path})")
        role.restart_at = time.monotonic() + secs
        return None

    def _restart(self, role: _Role) -> None:
        if self._is_done(role):
            role.restart_at = None  # it ended just before the learner said that it is needed no more
            return
        self._start(role)
        if role is self._learner and not self._has_ended():
            # It goes on from its checkpoint, and may need again whom the one before it needed no more.
            self._launched_at, self._status = time.time(), None
            for other in self._roles:
                if other.process is None and other.restart_at is None:
                    self._start(other)

    def _may_change_port(self, replay_server: _Role, lived_secs: float) -> bool:
        """Whether nothing can depend on this port yet."""
        is_new = replay_server.num_starts == 1 and lived_secs < self._timing.short_life_secs
        return is_new and self._num_ports_tried < NUM_PORTS_TO_TRY

    def _is_done(self, role: _Role) -> bool:
        """Whether the run can reach its end without this role: evaluations outlast the collecting."""
        if role is not self._learner and role.last_returncode == 0 and self._has_ended():
            return True  # before this start: its learner tells the others, and writes no status
        self._read_status()
        is_by_itself = role.kind == COLLECT_ACTOR or role.last_returncode == 0
        phases = PHASES_AFTER_TRAINING if is_by_itself else PHASES_AFTER_EVALUATION
        return role is not self._learner and self._status is not None and self._status.phase in phases

    def _has_ended(self) -> bool:
        return has_ended(self._options.root_dir / "summary.json")

    # Starting and stopping

    def _make_role(self, kind: str, task: int) -> _Role:
        is_numbered = kind in ACTORS or (kind == REPLAY_SERVER and self._options.num_replay_servers > 1)
        return _Role(
            kind=kind,
            task=task,
            name=f"{kind}-{task}" if is_numbered else kind,
            log_path=self._options.root_dir / "logs" / f"{kind}-{task}.log",
            restarts=Restarts(self._timing),
        )

    def _start_all(self) -> None:
        """Starts every role on a new port, with a clean record."""
        self._ports = find_free_ports(self._options.num_replay_servers)
        self._num_ports_tried += 1
        for role in self._roles:
            role.num_starts = 0
            role.restarts = Restarts(self._timing)
            self._start(role)

    def _start(self, role: _Role) -> None:
        assert role.process is None
        role.restart_at = None
        role.num_starts += 1
        role.process = _Process(
            role.name,
            role_command(self._options, role.kind, role.task, self._ports),
            {**role_environment(role.kind, os.environ), "TMPDIR": self._guard.temporary_folder},
            role.log_path,
            self._shown_lines,
            self._guard,
        )

    def _stop_in_order(self) -> None:
        """Stops whom the others depend on last: actors, learner (which saves), replay server."""
        timing, deadline = self._timing, time.monotonic() + self._timing.stop_secs
        for roles, most_secs in (
            (self._actors, timing.stop_actors_secs),
            ([self._learner], timing.stop_learner_secs),
            (self._replay_servers, timing.stop_secs),
        ):
            secs = max(0.0, min(most_secs, deadline - time.monotonic()))
            for role in roles:
                role.restart_at = None
                if role.process is not None:
                    role.process.terminate()
            if not self._wait(roles, secs, num_signals=2):
                names = ", ".join(role.name for role in roles if role.process is not None)
                why = "a second signal" if len(self._signals) >= 2 else f"no end within {secs:.2g} s of SIGTERM"
                self._say(f"killing {names}: {why}")
                self._kill(roles)

    def _wait(self, roles: Sequence[_Role], secs: float, num_signals: int) -> bool:
        """Returns whether all of `roles` ended within `secs`; does not wait on once `num_signals` have come."""
        deadline = time.monotonic() + secs
        while True:
            for role in roles:
                if role.process is not None and role.process.has_exited():
                    process, returncode = self._reap(role)
                    if returncode not in (0, *STOPPED_CODES, -signal.SIGTERM) and not self._mute_errors:
                        self._say(f"{role.name} {describe_exit(returncode)} while stopping (log: {role.log_path})")
                        for line in process.errors:
                            self._terminal.show(role.name, line)
            if all(role.process is None for role in roles):
                return True
            if time.monotonic() >= deadline or len(self._signals) >= num_signals:
                return False
            self._pump()

    def _kill(self, roles: Sequence[_Role]) -> None:
        for role in roles:
            if role.process is not None:
                role.process.kill()
        for role in roles:
            if role.process is not None:
                self._reap(role)

    def _reap(self, role: _Role) -> tuple[_Process, int]:
        """Returns the role's ended process, all its lines shown, and its exit code."""
        assert role.process is not None
        process = role.process
        returncode = role.last_returncode = process.reap()
        role.process = None
        self._show_lines()
        return process, returncode

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last_signal_time >= self._timing.second_signal_secs:
            self._signals.append(number)
            self._last_signal_time = now

    # Showing

    def _pump(self) -> None:
        """Shows what there is to show, and lets a moment pass."""
        self._show_lines()
        now = time.monotonic()
        for role in self._roles:
            process = role.process
            if process is not None and now - process.errors_since >= self._timing.old_error_secs:
                process.errors_since = math.inf
                for line in () if self._mute_errors else tuple(process.errors):
                    self._terminal.show(role.name, line)
        if now - self._status_read_at >= self._timing.live_interval_secs:
            self._read_status()
        age_secs = time.time() - self._status.time if self._status is not None else 0.0
        self._terminal.status(self._status, now, age_secs)
        time.sleep(self._timing.poll_secs)

    def _show_lines(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._terminal.show(*self._shown_lines.get_nowait())

    def _read_status(self) -> None:
        self._status = read_status(self._options.root_dir / "status.json", self._launched_at) or self._status
        self._status_read_at = time.monotonic()

    def _say(self, message: str) -> None:
        self._terminal.show("launcher", message)

    def _stopped_by(self, number: int) -> _Ending:
        self._read_status()
        where = f" at {describe_steps(self._status)}" if self._status is not None else ""
        return _Ending(128 + number, f"stopped by {signal.Signals(number).name}{where}")

    def _why_given_up(self, role: _Role, process: _Process, returncode: int) -> str:
        num_times = self._timing.num_kills if returncode in KILLED_CODES else self._timing.num_short_lives
        how_often = f"{num_times} times in a row"
        return "\n".join(
            [
                f"error: {role.name} {describe_exit(returncode)}, {how_often}; training cannot go on without it",
                f"  its log: {role.log_path}",
                "  its last lines:",
                *(f"    {line}" for line in process.last_lines),
            ]
        )

    def _report(self, ending: _Ending) -> None:
        """Says how the run ended: failures on stderr, the rest in the merged stream."""
        root_dir = self._options.root_dir
        if ending.is_failure:
            with contextlib.suppress(OSError):
                print(ending.message, file=sys.stderr, flush=True)
            return
        self._say(f"{ending.message}; the run is in {root_dir}")
        if ending.code == 0:
            delivered = describe_delivered(root_dir / "summary.json")
            if delivered is not None:
                self._say(delivered)
        else:
            self._say(f"to go on from its last checkpoint, start it again with --root_dir={root_dir}")


@contextlib.contextmanager
def _handled_signals(handler: Callable[[int, types.FrameType | None], None]) -> Iterator[None]:
    """Hands SIGINT, SIGTERM and SIGHUP to `handler`. An ignored SIGHUP (nohup) stays ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous: dict[int, Any] = {number: signal.signal(number, handler) for number in numbers}
    previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, the exit codes would be lost
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)
