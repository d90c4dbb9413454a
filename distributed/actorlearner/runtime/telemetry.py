"""A role's output: log lines for people, numbers for TensorBoard."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any, Optional

LOG_TIME_FORMAT = "%H:%M:%S"
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class RoleFormatter(logging.Formatter):
    """Formats our lines as `I 12:34:56 message`, and libraries' with a small letter, only for the log file."""

    def __init__(self) -> None:
        super().__init__("%(letter)s %(asctime)s %(message)s", LOG_TIME_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        letter = record.levelname[0]
        record.letter = letter if record.pathname.startswith(_OURS) else letter.lower()
        return super().format(record)


def set_up_logging() -> None:
    """Sends this role's log lines to stderr, and reduces other libraries' output.

    Call it before importing TensorFlow, whose C++ side then reads the environment.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    warnings.simplefilter("ignore")
    from absl import logging as absl_logging  # its import adds a handler to the root logger, replaced below

    absl_logging.get_absl_logger().setLevel(logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RoleFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class Rate:
    """How fast a count grew over the last `window_secs` seconds."""

    def __init__(self, window_secs: float = 30.0):
        self._window_secs = window_secs
        self._points: deque[tuple[float, float]] = deque()

    def update(self, count: float, now: Optional[float] = None) -> float:
        """Returns counts per second after noting `count` at `now` (seconds; the monotonic clock by default)."""
        now = time.monotonic() if now is None else now
        self._points.append((now, count))
        while len(self._points) > 2 and self._points[1][0] < now - self._window_secs:
            self._points.popleft()
        (then, first) = self._points[0]
        return (count - first) / (now - then) if now > then else 0.0


class Events:
    """TensorBoard scalars of one role in one folder; the folder is made with the first point."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds one point to each curve."""
        import numpy as np
        import tensorflow as tf

        with self._open().as_default():
            for name, value in scalars.items():
                # NumPy ints: TensorFlow caches one tensor per Python int.
                tf.summary.scalar(name, np.float32(value), step=np.int64(step))
        self._writer.flush()

    def write_text(self, name: str, text: str) -> None:
        """Writes `text` under `name`, keeping its line breaks."""
        import tensorflow as tf

        with self._open().as_default():
            tf.summary.text(name, "\n".join(f"    {line}" for line in text.splitlines()), step=0)
        self._writer.flush()

    def _open(self) -> Any:
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self._folder))
        return self._writer
