"""Whether a role goes on, told through one small file that a container's health check looks at.

role --beat--> [file] <--age-- `actorlearner health`

A role beats when it has been once round: an environment stepped, a call of train steps made, a request answered. A wait
counts while it is watched, because it has a deadline of its own that ends the role. So the file grows old when a
process hangs or is stopped; deadlines see to the rest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

_EVERY_SECS = 1.0


class Heartbeat:
    """Touches a file, at most once a second; without a file it does nothing."""

    def __init__(self, path: Optional[Path] = None, clock: Callable[[], float] = time.monotonic):
        self._path = path
        self._clock = clock
        self._due_at = clock()

    def beat(self) -> None:
        """Cheap enough for every step of an environment."""
        if self._path is not None and self._clock() >= self._due_at:
            self._due_at = self._clock() + _EVERY_SECS
            with contextlib.suppress(OSError):  # the file grows old, which is the message
                self._path.touch()


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


def beat_into(path: Path) -> None:
    """Makes `beat` touch `path` from here on; a file left by a process before this one is removed."""
    global _heartbeat
    path.unlink(missing_ok=True)
    _heartbeat = Heartbeat(path)


def describe_problem(path: Path, max_age_secs: float, now: Optional[float] = None) -> Optional[str]:
    """Returns why the role that beats into `path` is not healthy; None when it is."""
    try:
        age_secs = (time.time() if now is None else now) - path.stat().st_mtime
    except OSError as error:
        return f"no sign of life yet: {path}: {error.strerror}"
    if age_secs > max_age_secs:
        return f"the last sign of life is {age_secs:.0f} s old, more than --max_age_secs = {max_age_secs:g}"
    return None
