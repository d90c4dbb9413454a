"""Print a run's evaluations and draw its learning curve."""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actorlearner.run.status import find_problem, require_summary
from actorlearner.runtime import durable_files
from actorlearner.runtime.durations import describe_secs
from actorlearner.runtime.lifecycle import ExitCode

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run directory."""
    parser.add_argument("root_dir", type=pathlib.Path, metavar="ROOT_DIR", help="directory of a finished run")


def run(arguments: argparse.Namespace) -> int:
    """Prints the evaluations and the path of the picture; returns the exit status."""
    try:
        path = write_learning_curve(arguments.root_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    print(format_summary(require_summary(arguments.root_dir)))
    print(path)
    return ExitCode.DONE


def write_learning_curve(root_dir: pathlib.Path) -> pathlib.Path:
    """Draws `learning_curve.png` in the run directory, from its `summary.json`, and returns its path.

    Needs no display. Replaces an older picture only when the new one is complete, so it may be called repeatedly.

    Raises:
      ValueError: As `require_summary`; or the run has no evaluations to draw.
      OSError: The directory cannot be written.
    """
    summary = require_summary(root_dir)
    if not summary["evaluations"]:
        raise ValueError(
            f"{root_dir / 'summary.json'} has no evaluations, so there is no curve to draw. Train past the first"
            " eval_interval, with at least one eval actor."
        )
    path = root_dir / "learning_curve.png"
    partial = root_dir / f".learning_curve.{os.getpid()}.partial.png"
    try:
        make_learning_curve(summary).savefig(partial, dpi=120)
        durable_files.put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def make_learning_curve(summary: Mapping[str, Any]) -> Figure:
    """Returns a figure of the average return over train steps, with the delivered policy marked by a star.

    A thin vertical line marks a resume with other settings.

    Evaluations are drawn in the order of their train steps, whatever order several eval actors finished them in. The
    star shows the delivered policy's return on fresh episodes, which need not lie on the curve.
    """
    # Without pyplot: no global state, no display, and no backend forced on the importer.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    evaluations = sorted(summary["evaluations"], key=lambda evaluation: evaluation["train_step"])
    delivered = summary.get("delivered")
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [evaluation["train_step"] for evaluation in evaluations],
        [evaluation["average_return"] for evaluation in evaluations],
        marker="o",
        markersize=4,
        label="evaluations",
    )
    if delivered:
        axes.plot(
            [delivered["train_step"]],
            [delivered["average_return"]],
            linestyle="none",
            marker="*",
            markersize=15,
            color="tab:orange",
            label=f"delivered policy: {_number(delivered['average_return'])} over {delivered['num_episodes']} episodes",
        )
    resumed_at = [start["train_step"] for start in _changed_starts(summary)]
    for index, train_step in enumerate(resumed_at):
        label = "resumed with other settings" if not index else None
        axes.axvline(train_step, color="grey", linewidth=0.8, linestyle=":", label=label)
    if delivered or resumed_at:
        axes.legend()
    axes.set_xlabel("Train step")
    axes.set_ylabel("Average return")
    axes.set_title(f"{summary['experiment']}, seed {summary['seed']}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    return figure


def format_summary(summary: Mapping[str, Any]) -> str:
    """Returns the evaluations and the delivered policy as a plain-text table, ready to print; no trailing newline.

    Raises:
      ValueError: A field is missing or of the wrong kind; the message names it.
    """
    problem = find_problem(summary)
    if problem:
        raise ValueError(f"The summary cannot be shown: {problem}.")
    delivered = summary.get("delivered")
    title = (
        f"{summary['experiment']}, seed {summary['seed']}: {summary['train_steps']:,} train steps,"
        f" {summary['environment_steps']:,} environment steps, {describe_secs(summary['wall_seconds'])}"
    )
    lines = [title, ""]
    header = ("train step", "environment steps", "average return", "average length", "episodes", "time")
    rows = [
        (
            f"{evaluation['train_step']:,}",
            f"{evaluation['environment_steps']:,}",
            _number(evaluation["average_return"]),
            _number(evaluation["average_episode_length"]),
            f"{evaluation['num_episodes']:,}",
            describe_secs(evaluation["wall_secs"]),
        )
        for evaluation in sorted(summary["evaluations"], key=lambda evaluation: evaluation["train_step"])
    ]
    if rows:
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        for row in (header, tuple("-" * width for width in widths), *rows):
            lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    else:
        lines.append("no evaluations")
    lines.append("")
    if delivered:
        lines.append(
            f"delivered: the policy of train step {delivered['train_step']:,}; over {delivered['num_episodes']:,} fresh"
            f" episodes average return {_number(delivered['average_return'])}, average length"
            f" {_number(delivered['average_episode_length'])}, shortest {delivered['min_episode_length']:,} steps"
        )
    else:
        lines.append("delivered: nothing yet")
    if summary.get("has_ended") is False:
        ended_at = f"train step {summary['train_steps']:,}"
        lines.append(f"the run continues: the figures are of its end at {ended_at}; policies/ has its newest policy")
    for start in _changed_starts(summary):
        changes = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in start["differs"].items())
        lines.append(f"resumed at train step {start['train_step']:,} with other settings: {changes}")
    return "\n".join(lines)


def _changed_starts(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the starts that differ from the previous one; runs of earlier versions list none."""
    starts = summary.get("starts") or []
    return [start for start in starts if start.get("differs") and isinstance(start.get("train_step"), int)]


def _number(value: float) -> str:
    """Returns `value` with about four significant figures: 3,000 and 187.3 but 0.8421, as Minitaur's returns need."""
    if math.isfinite(value) and value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
