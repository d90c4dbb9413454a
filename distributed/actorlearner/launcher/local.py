"""Local launcher: runs every role of one experiment on this machine until training ends.

                     +--> replay servers    each role: a process in a session of its own,
  [local launcher] --+--> learner           one log file, one colour in the merged stream;
                     +--> eval actors       restarted, with back-off, when it dies;
                     +--> collect actors    never outliving the launcher, not even after kill -9

What a role's exit code tells the launcher:

  0                the learner: training ended. An actor: done, if training is over; otherwise restart it.
  64, 65, 73, 75   a restart does not help (settings, data, root_dir, a second learner): stop all, return the code.
  69               a peer was unreachable or the port taken: restart. A new replay server gets another port first.
  anything else    a crash: show its last lines and restart it.

After several short runs in a row a role is given up; the launcher then stops all roles and returns 1.

This module imports no TensorFlow, Reverb or gin, so that the roles start immediately.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import queue
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from actorlearner.launcher.command import (
    ACTORS,
    COLLECT_ACTOR,
    EVAL_ACTOR,
    LEARNER,
    REPLAY_SERVER,
    role_environment,
)
from actorlearner.launcher.options import LocalOptions, make_command
from actorlearner.launcher.process import ROLE_LOG_LINE, Guard, RoleProcess
from actorlearner.launcher.restarts import (
    GAVE_UP,
    KILLED_CODES,
    STOPPED_CODES,
    Restarts,
    describe_exit,
)
from actorlearner.launcher.terminal import Terminal, describe_steps
from actorlearner.run.status import (
    PHASES_AFTER_EVALUATION,
    PHASES_AFTER_TRAINING,
    Status,
    describe_delivered,
    has_ended,
    read_status,
)
from actorlearner.runtime.lifecycle import FINAL_CODES, ExitCode
from actorlearner.runtime.ports import find_free_ports

NUM_PORTS_TO_TRY = 3


@dataclasses.dataclass
class _Role:
    """One role of the run, with its present process and its restarts."""

    kind: str
    task: int
    name: str
    log_path: Path
    restarts: Restarts
    num_starts: int = 0
    process: RoleProcess | None = None
    restart_at: float | None = None  # None: alive, or finished
    last_returncode: int | None = None


@dataclasses.dataclass(frozen=True)
class _Ending:
    """Why the run ends: the launcher's exit code and its message."""

    code: int
    message: str
    is_failure: bool = False


def run_local(options: LocalOptions) -> int:
    """Runs all roles until training ends and returns the launcher's exit code. Call it from the main thread.

    Returns 0 when training reached its end; 64, 65, 73 or 75 when a role ended with that code; 1 when a role kept
    dying; 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP. No process is left behind in any case.
    """
    try:
        (options.root_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(
            f"error: --root_dir={options.root_dir} cannot hold a run ({e.strerror}); "
            "name a directory that can be made and written",
            file=sys.stderr,
        )
        return ExitCode.CANNOT_CREATE
    return _Launcher(options).run()


class _Launcher:
    """Starts, watches, restarts and stops the roles, in one loop in the main thread."""

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
            self._guard = Guard()
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
        """Keeps all roles running; returns when training has ended, cannot continue, or must stop."""
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
        """Handles a role that exited: finished, to be restarted later, or the end of the run."""
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
        if returncode == ExitCode.UNAVAILABLE and self._may_change_port(role, lived_secs):
            self._say(f"port {self._ports[role.task]} was taken; starting all roles on another")
            self._stop_in_order()
            self._start_all()
            return None

        for line in process.errors:
            self._terminal.show(role.name, line)
        if process.hung:
            self._say(f'{role.name} hung (see --hang_secs): its log has the stack of every thread, from "Timeout" on')
        elif returncode not in (0, ExitCode.UNAVAILABLE, *STOPPED_CODES) and not process.errors:
            for line in process.last_lines:
                if not ROLE_LOG_LINE.match(line):  # log lines have been shown already
                    self._terminal.show(role.name, line)
        secs = role.restarts.secs_until_next(lived_secs, was_killed=returncode in KILLED_CODES)
        if secs is None:
            return _Ending(GAVE_UP, self._why_given_up(role, process, returncode), is_failure=True)
        self._say(f"{role.name} {describe_exit(returncode)}; restarting it in {secs:g} s (log: {role.log_path})")
        role.restart_at = time.monotonic() + secs
        return None

    def _restart(self, role: _Role) -> None:
        if self._is_done(role):
            role.restart_at = None  # it ended just before the learner reported that it is not needed
            return
        self._start(role)
        if role is self._learner and not self._has_ended():
            # It resumes from its checkpoint, and may need roles again that had finished.
            self._launched_at, self._status = time.time(), None
            for other in self._roles:
                if other.process is None and other.restart_at is None:
                    self._start(other)

    def _may_change_port(self, role: _Role, lived_secs: float) -> bool:
        """Returns whether this is a replay server on whose port no role can depend yet."""
        is_new = role.num_starts == 1 and lived_secs < self._timing.short_life_secs
        return role in self._replay_servers and is_new and self._num_ports_tried < NUM_PORTS_TO_TRY

    def _is_done(self, role: _Role) -> bool:
        """Whether the run can reach its end without this role: evaluations take longer than collecting."""
        if role is not self._learner and role.last_returncode == 0 and self._has_ended():
            return True  # ended in an earlier start: the learner announces it, and writes no status
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
        """Starts every role on a new port, with restarts counted from 0."""
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
        role.process = RoleProcess(
            role.name,
            make_command(self._options, role.kind, role.task, self._ports),
            {**role_environment(role.kind, os.environ), "TMPDIR": self._guard.temporary_folder},
            role.log_path,
            self._shown_lines,
            self._guard,
        )

    def _stop_in_order(self) -> None:
        """Stops actors first, then the learner (which saves), then replay servers: each depends on the next."""
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
                why = "a second signal" if len(self._signals) >= 2 else f"no exit within {secs:.2g} s of SIGTERM"
                self._say(f"killing {names}: {why}")
                self._kill(roles)

    def _wait(self, roles: Sequence[_Role], secs: float, num_signals: int) -> bool:
        """Returns whether all of `roles` ended within `secs`; stops waiting after `num_signals` signals."""
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

    def _reap(self, role: _Role) -> tuple[RoleProcess, int]:
        """Returns the role's ended process and its exit code, after showing all its lines."""
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
        """Shows new lines and the status, then sleeps for `poll_secs`."""
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

    def _why_given_up(self, role: _Role, process: RoleProcess, returncode: int) -> str:
        num_times = self._timing.num_kills if returncode in KILLED_CODES else self._timing.num_short_lives
        how_often = f"{num_times} times in a row"
        return "\n".join(
            [
                f"error: {role.name} {describe_exit(returncode)}, {how_often}; training cannot continue without it",
                f"  its log: {role.log_path}",
                "  its last lines:",
                *(f"    {line}" for line in process.last_lines),
            ]
        )

    def _report(self, ending: _Ending) -> None:
        """Prints how the run ended: failures on stderr, the rest in the merged stream."""
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
            self._say(f"to resume from its last checkpoint, start it again with --root_dir={root_dir}")


@contextlib.contextmanager
def _handled_signals(handler: Callable[[int, types.FrameType | None], None]) -> Iterator[None]:
    """Passes SIGINT, SIGTERM and SIGHUP to `handler`. An ignored SIGHUP (nohup) stays ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous: dict[int, Any] = {number: signal.signal(number, handler) for number in numbers}
    # if it were ignored, exit codes would be lost
    previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)
