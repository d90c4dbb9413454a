"""Whether a role goes on: told through one small file that a container's health check looks at, and enforced.

role --beat--> [file] <--age-- `actorlearner health`
     --beat--> [watchdog]: when no beat came for `hang_secs`, it writes where every thread is and ends the process

A role beats when it has been once round: an environment stepped, a call of train steps made, a request answered. A wait
counts while it is watched, because it has a deadline of its own that ends the role. So the file grows old when a
process hangs or is stopped; deadlines see to the rest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

HANG_SECS = 600.0
"""No role does anything for so long without a beat, in seconds; the longest is to start from a slow disk."""

_EVERY_SECS = 1.0


class Heartbeat:
    """Touches a file and puts off the watchdog, at most once a second; with neither it does nothing."""

    def __init__(
        self, path: Optional[Path] = None, hang_secs: float = 0.0, clock: Callable[[], float] = time.monotonic
    ):
        self._path = path
        self._hang_secs = hang_secs
        self._clock = clock
        self._due_at = clock()
        self._put_off_the_watchdog()

    def beat(self) -> None:
        """Cheap enough for every step of an environment."""
        if self._clock() < self._due_at or not (self._path or self._hang_secs):
            return
        self._due_at = self._clock() + _EVERY_SECS
        if self._path is not None:
            with contextlib.suppress(OSError):  # the file grows old, which is the message
                self._path.touch()
        self._put_off_the_watchdog()

    def _put_off_the_watchdog(self) -> None:
        if self._hang_secs:
            with contextlib.suppress(RuntimeError):  # no thread to be had: no reason to end
                faulthandler.dump_traceback_later(self._hang_secs, exit=True)  # in place of the one before


_heartbeat = Heartbeat()


def beat() -> None:
    """Says that this process goes on."""
    _heartbeat.beat()


@contextlib.contextmanager
def beat_meanwhile(secs: float) -> Iterator[None]:
    """Beats from a thread while the `with` lasts, but for no more than `secs` seconds: for one long call.

    A call that hangs is found after that time; a process that is stopped, as ever.
    """
    has_ended = threading.Event()
    deadline = time.monotonic() + secs

    def go_on() -> None:
        while time.monotonic() < deadline:
            beat()
            if has_ended.wait(_EVERY_SECS):
                return

    threading.Thread(target=go_on, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


def watch(path: Optional[Path] = None, hang_secs: float = 0.0) -> None:
    """Has `beat` looked after from here on.

    Args:
      path: The health file, which every beat touches; what a process before this one left there does not count.
      hang_secs: When no beat comes for so many seconds the process writes the stacks of all its threads to stderr and
        ends with status 1, also when it hangs in native code that holds Python's lock, or was stopped and goes on. 0:
        never. Where nobody reads stderr, a full pipe keeps it from ending; where a thread runs on, reading its stack
        may end the process by SIGSEGV instead.
    """
    global _heartbeat
    faulthandler.cancel_dump_traceback_later()
    if path is not None:
        path.unlink(missing_ok=True)
    _heartbeat = Heartbeat(path, hang_secs)


def describe_problem(path: Path, max_age_secs: float, now: Optional[float] = None) -> Optional[str]:
    """Returns why the role that beats into `path` is not healthy; None when it is."""
    try:
        age_secs = (time.time() if now is None else now) - path.stat().st_mtime
    except OSError as error:
        return f"no sign of life yet: {path}: {error.strerror}"
    if age_secs > max_age_secs:
        return f"the last sign of life is {age_secs:.0f} s old, more than --max_age_secs = {max_age_secs:g}"
    return None
