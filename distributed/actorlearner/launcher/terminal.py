"""The launcher's output: the merged stream of all roles and, on a terminal, the live status below it."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Sequence
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actorlearner.launcher.restarts import DEFAULT_TIMING, Timing
from actorlearner.run.status import Status
from actorlearner.runtime.durations import describe_secs

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


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
    if age_secs > timing.old_status_secs and status.phase != "reporting":  # recording videos takes long
        words.append(f"no update for {describe_secs(age_secs)}")
    return "; ".join(words)


def describe_status(status: Status | None, age_secs: float = 0.0, timing: Timing = DEFAULT_TIMING) -> str:
    """Returns the status as one line of text."""
    if status is None:
        return "starting: waiting for the learner"
    return f"{_phase(status)}: {describe_steps(status)}; {describe_rest(status, age_secs, timing)}"


def _phase(status: Status) -> str:
    return f"waiting for {status.waiting_for}" if status.phase == "waiting" and status.waiting_for else status.phase


def _percent(status: Status) -> int:
    return min(100, 100 * status.train_step // status.num_iterations)


def _rate(per_sec: float | None) -> str:
    if per_sec is None:
        return ""
    return f", {per_sec:,.1f}/s" if per_sec < 10 else f", {per_sec:,.0f}/s"


class _Console(Console):
    """A rich console that survives a broken pipe."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@final
class Terminal:
    """The merged stream of all roles and, below it on a terminal, the live status.

    Used from one thread. When its reader exits (`| head`) or the terminal closes, it stops printing.
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
    """Returns the two lines at the bottom of a terminal: a progress bar and the figures."""
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
    except BrokenPipeError:  # later writes, and the interpreter at its exit, must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass
