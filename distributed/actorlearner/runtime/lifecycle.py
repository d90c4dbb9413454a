"""How a role starts, waits and ends: stop signals, deadlines, errors with an exit code.

Every wait goes through `wait_until`, so every wait has a deadline and logs what it waits for.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import faulthandler
import functools
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, Optional, TypeVar

from actorlearner.runtime.health import beat

T = TypeVar("T")

SAY_EVERY_SECS = 30.0
"""How often a wait logs what it waits for, in seconds."""


class ExitCode(enum.IntEnum):
    """What a role's exit status means; numbers are those of BSD's sysexits.h where there is one."""

    DONE = 0  # training reached its end
    CRASH = 1  # a bug; the log has the traceback
    USAGE = 64  # the user's settings are wrong; a restart cannot help
    DATA = 65  # data does not fit the experiment: a table's signature, a checkpoint of another run
    UNAVAILABLE = 69  # a peer did not answer within the deadline, or the port is taken
    CANNOT_CREATE = 73  # the run directory cannot be written
    OCCUPIED = 75  # another learner is running in this directory
    REFUSED = 77  # TLS: a peer refused this role's certificate or this role the peer's, or it has expired
    INTERRUPTED = 130  # stopped by SIGINT
    TERMINATED = 143  # stopped by SIGTERM


FINAL_CODES: Mapping[int, str] = {
    ExitCode.USAGE: "its settings are wrong",
    ExitCode.DATA: "the data does not fit the experiment",
    ExitCode.CANNOT_CREATE: "it cannot write the run directory",
    ExitCode.OCCUPIED: "another learner holds this run",
}
"""Exit codes after which a restart cannot help, each with the reason in words."""


class RoleError(Exception):
    """Ends a role with one message for the user: what is wrong, what was expected, what to do."""

    def __init__(self, message: str, exit_code: ExitCode):
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


class Stopped(Exception):
    """Raised from a wait when the role was asked to stop."""


SECOND_SIGNAL_SECS = 0.5
"""Signals closer together count as one, in seconds: schedulers signal every process, and scripts forward signals."""


class Stop:
    """Set by SIGTERM, SIGINT or `set`; a second signal after `SECOND_SIGNAL_SECS` ends the process immediately."""

    def __init__(self, at_once: Callable[[], object] = lambda: None) -> None:
        """Args:
        at_once: Called before a second signal ends the process.
        """
        self._at_once = at_once
        self._event = threading.Event()
        self._signal: Optional[int] = None
        self._signal_time = -math.inf

    def install_signal_handlers(self) -> None:
        """Makes SIGTERM and SIGINT set this stop. Only the main thread may call it."""
        # Python runs handlers between two instructions of the main thread, which may be inside a long call such as a
        # save. The wake-up descriptor delivers signals with their time of arrival.
        arrivals, wake_up = os.pipe()
        os.set_blocking(wake_up, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
        threading.Thread(target=self._take_signals, args=(arrivals,), name="signals", daemon=True).start()

    def _take_signals(self, arrivals: int) -> None:
        while True:
            for number in os.read(arrivals, 64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if now - self._signal_time < SECOND_SIGNAL_SECS:
            return
        if self._event.is_set():
            self._at_once()
            os._exit(128 + number)
        self._signal, self._signal_time = number, now
        self._event.set()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, secs: float) -> bool:
        """Returns whether stop is set; blocks at most `secs` seconds."""
        return self._event.wait(secs)

    @property
    def exit_code(self) -> ExitCode:
        """Exit status of a role that ends because of this stop."""
        return ExitCode.INTERRUPTED if self._signal == signal.SIGINT else ExitCode.TERMINATED


def wait_until(
    poll: Callable[[], Optional[T]],
    what: Callable[[], str],
    *,
    stop: Stop,
    deadline_secs: float,
    setting: str,
    every_secs: float = 0.25,
    progress: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Returns the first result of `poll` that is neither None nor False.

    Args:
      poll: Called repeatedly.
      what: Says what is waited for, with figures; logged every 30 s and part of the error.
      stop: Ends the wait.
      deadline_secs: Longest wait, in seconds.
      setting: The setting with the deadline; the error names it.
      every_secs: Time between two polls, in seconds.
      progress: The deadline restarts whenever this changes.

    Raises:
      Stopped: `stop` was set.
      RoleError: The deadline passed (UNAVAILABLE).
    """
    start = said = clock()
    seen = progress()
    while True:
        beat()
        result = poll()
        if result is not None and result is not False:
            return result
        now = clock()
        if progress() != seen:
            seen, start = progress(), now
        if now - start > deadline_secs:
            raise RoleError(
                f"waited {now - start:.0f} s for {what()}, longer than {setting} = {deadline_secs:g} s. "
                f"Start what is missing, correct the address, or raise {setting}.",
                ExitCode.UNAVAILABLE,
            )
        if now - said >= SAY_EVERY_SECS:
            said = now
            logging.info("waiting for %s (%.0f s)", what(), now - start)
        if stop.wait(every_secs):
            raise Stopped(f"stopped while waiting for {what()}")


def find_reason(error: BaseException) -> str:
    """Returns the line with the reason from an error's message; TensorFlow's compiled functions add other lines."""
    lines = [line.partition("[Op:")[0].strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line] or [type(error).__name__]
    if not lines[0].startswith("Graph execution error"):
        return lines[0]
    # The lines are: "Graph execution error:", source location, the reason, "[[{{node ...}}]]", hints.
    nodes = [index for index, line in enumerate(lines) if line.startswith("[[")]
    return lines[nodes[0] - 1 if nodes else -1]


# By the text: TensorFlow has exception classes of its own, and gin's proxies for exceptions lose the errno.
def _is_disk_full(error: BaseException) -> bool:
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def _is_unwritable(error: BaseException) -> bool:
    # Only errors that name a file: Python names it after the words, TensorFlow before them.
    words = "|".join(re.escape(os.strerror(number)) for number in (errno.EROFS, errno.EACCES, errno.EPERM))
    return re.search(rf"(; ({words})|({words}): ['\"])", str(error)) is not None


def run_to_exit(run: Callable[[Stop], ExitCode], final_code_file: Optional[Path] = None) -> NoReturn:
    """Runs a role with signal handling and ends the process with its exit code.

    A `RoleError` becomes one `error: ...` line on stderr. The process ends through `os._exit`, because threads may be
    blocked inside Reverb's clients, which no interpreter shutdown can interrupt.

    Args:
      run: The role.
      final_code_file: A code of `FINAL_CODES` is written there and the process exits with 0, for a supervisor that
        restarts every failure. If the file cannot be written, the process exits with the code.
    """
    faulthandler.enable()  # shows the Python stack when native code crashes
    # TensorFlow leaves generated code in the temporary folder, and `os._exit` skips its clean-up.
    temporary_folder = tempfile.tempdir = tempfile.mkdtemp(prefix="actorlearner-")
    os.environ["TMPDIR"] = temporary_folder  # for child processes
    remove_temporary_files = functools.partial(shutil.rmtree, temporary_folder, ignore_errors=True)
    stop = Stop(at_once=remove_temporary_files)
    stop.install_signal_handlers()
    try:
        code = run(stop)
    except RoleError as error:
        # Not str(error): gin appends its own text to every exception that passes through a configurable.
        print(f"error: {error.message}", file=sys.stderr)
        code = error.exit_code
    except Stopped as stopped:
        logging.info("%s", stopped)
        code = stop.exit_code
    except BaseException as error:
        if _is_disk_full(error):
            print(
                f"error: the disk is full: {find_reason(error)}. Free some space and start again with the same "
                "--root_dir: earlier checkpoints are whole.",
                file=sys.stderr,
            )
            code = ExitCode.CANNOT_CREATE
        elif _is_unwritable(error):
            print(
                f"error: a file or folder may not be used: {find_reason(error)}. Let this user read and write there, "
                "or mount its disk for writing; start again with the same --root_dir: earlier checkpoints are whole.",
                file=sys.stderr,
            )
            code = ExitCode.CANNOT_CREATE
        else:
            logging.exception("crashed")
            code = ExitCode.CRASH
    if final_code_file and code in FINAL_CODES:
        with contextlib.suppress(OSError):
            final_code_file.write_text(f"{int(code)}\n")
            code = ExitCode.DONE
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    remove_temporary_files()
    os._exit(code)
