"""The health of a role: reported through a small file for containers' health checks, and enforced by a watchdog.

role --beat--> [file] <--age-- `actorlearner health`
     --beat--> [watchdog]: after `hang_secs` without a beat it writes every thread's stack and ends the process

A role beats once per loop: an environment stepped, a call of train steps made, a request answered. A monitored wait
counts too, because its own deadline ends the role. So the file grows old when a process hangs or is stopped; deadlines
handle the rest.
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
"""A role without a beat for this long, in seconds, has hung; the longest step is to start from a slow disk."""

_EVERY_SECS = 1.0


class Heartbeat:
    """Touches a file and re-arms the watchdog, at most once a second; without both it does nothing."""

    def __init__(
        self, path: Optional[Path] = None, hang_secs: float = 0.0, clock: Callable[[], float] = time.monotonic
    ):
        self._path = path
        self._hang_secs = hang_secs
        self._clock = clock
        self._due_at = clock()
        self._put_off_the_watchdog()

    def beat(self) -> None:
        """Records a heartbeat; cheap enough for every environment step."""
        if self._clock() < self._due_at or not (self._path or self._hang_secs):
            return
        self._due_at = self._clock() + _EVERY_SECS
        if self._path is not None:
            with contextlib.suppress(OSError):  # the file then grows old, which reports the problem
                self._path.touch()
        self._put_off_the_watchdog()

    def _put_off_the_watchdog(self) -> None:
        if self._hang_secs:
            with contextlib.suppress(RuntimeError):  # no thread available: no reason to end
                faulthandler.dump_traceback_later(self._hang_secs, exit=True)  # replaces the previous timer


_heartbeat = Heartbeat()


def beat() -> None:
    """Records a heartbeat of this process."""
    _heartbeat.beat()


@contextlib.contextmanager
def beat_meanwhile(secs: float) -> Iterator[None]:
    """Beats from a thread while the `with` block lasts, for at most `secs` seconds: for one long call.

    A call that hangs is detected after that time; a stopped process as usual.
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
    """Makes `beat` touch the health file and re-arm the watchdog from now on.

    Args:
      path: The health file, touched by every beat; a file left by an earlier process does not count.
      hang_secs: After this many seconds without a beat the process writes the stacks of all its threads to stderr and
        exits with status 1, even if it hangs in native code that holds Python's lock, or was stopped and continues. 0:
        never. If nothing reads stderr, a full pipe keeps it from exiting; if a thread is running, reading its stack may
        end the process by SIGSEGV instead.
    """
    global _heartbeat
    faulthandler.cancel_dump_traceback_later()
    if path is not None:
        path.unlink(missing_ok=True)
    _heartbeat = Heartbeat(path, hang_secs)


def describe_problem(path: Path, max_age_secs: float, now: Optional[float] = None) -> Optional[str]:
    """Returns why the role with the health file `path` is not healthy; None if it is."""
    try:
        age_secs = (time.time() if now is None else now) - path.stat().st_mtime
    except OSError as error:
        return f"no heartbeat yet: {path}: {error.strerror}"
    if age_secs > max_age_secs:
        return f"the last heartbeat is {age_secs:.0f} s old, more than --max_age_secs = {max_age_secs:g}"
    return None
