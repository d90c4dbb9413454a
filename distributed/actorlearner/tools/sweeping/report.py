"""Reports a sweep's results: a table and a picture, from the present state of the run directories."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from actorlearner.run.directory import RunDirectory
from actorlearner.runtime import durable_files
from actorlearner.runtime.lifecycle import ExitCode
from actorlearner.tools.sweeping import statistics
from actorlearner.tools.sweeping.grid import AnotherSweep, Grid, read_asked
from actorlearner.tools.sweeping.trials import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOCKS = {"environment_steps": "environment steps", "train_step": "train steps"}
DEFAULT_CLOCK = "environment_steps"
_FEW = 5


def report_sweep(root: Path, clock: Optional[str] = None, steps: Sequence[int] = ()) -> int:
    """Writes sweep.md, sweep.png and the results in sweep.json; prints the tables.

    Args:
      root: The sweep's folder.
      clock: What `steps` count; None takes the sweep's own.
      steps: Steps at which to compare; none takes the sweep's own.
    """
    directory, file = RunDirectory(root), root / "sweep.json"
    held = directory.read_json(file)
    try:
        grid = read_asked(root, held)
    except AnotherSweep as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    clock, steps = clock or held.get("clock", DEFAULT_CLOCK), steps or held.get("at", [])
    failures = held.get("failures", {})
    runs: dict[str, dict[int, Any]] = {}
    states: dict[str, dict[int, str]] = {}
    for variant in grid.variants:
        runs[variant.name], states[variant.name] = {}, {}
        for seed in grid.seeds:
            trial = Trial(variant.name, seed, root / variant.folder / f"seed-{seed}")
            runs[variant.name][seed] = {
                "evaluations": trial.read_evaluations(),
                "delivered": trial.read_delivered(),
                "has_ended": trial.has_ended(),
            }
            beaten = held.get("beaten", {}).get(variant.name)
            states[variant.name][seed] = _describe_state(trial, failures.get(trial.name), beaten)
    title = f"Sweep of {Path(grid.experiment).stem}"
    points = collect_points(runs, clock, steps)
    text = format_tables(title, points, states) + "\n" + _format_grid(grid)
    directory.write_text(root / "sweep.md", text)
    directory.write_json(file, {**held, "results": points, "states": states})
    picture = write_picture(root / "sweep.png", title, runs, states, clock)
    with contextlib.suppress(OSError):  # `| head`
        print(text)
        print("\n".join(str(path) for path in (root / "sweep.md", file, picture) if path), flush=True)
    return 0


def _format_grid(grid: Grid) -> str:
    bindings = {"every variant": grid.gin_bindings, **{variant.name: variant.bindings for variant in grid.variants}}
    lines = ["## What was trained", "", f"`{grid.experiment}`, seeds {', '.join(map(str, grid.seeds))}"]
    lines[-1] += f", with {' '.join(grid.train_flags)}" if grid.train_flags else ""
    lines += ["", "| variant | bindings |", "|---|---|"]
    lines += [f"| {_escape(name)} | {_escape('; '.join(bound))} |" for name, bound in bindings.items() if bound]
    return "\n".join(lines) + "\n"


def _describe_state(trial: Trial, failure: Optional[dict[str, Any]], beaten: Optional[str]) -> str:
    if trial.has_ended():
        return "ended"
    if failure:
        return f"failed: exit code {failure['exit_code']}, {failure['error']}"
    if beaten:
        return beaten
    status = trial.read_status()
    return f"not ended: at train step {status.train_step:,}" if status else "not started"


def collect_points(
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]], clock: str, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the tables' content: an entry for each of `steps`, for the last evaluation and the delivered policies.

    Args:
      runs: By variant and seed: `evaluations`, a list, and `delivered`, a result or None.
      clock: One of `CLOCKS`; what `steps` count.
      steps: Steps at which to compare.
    """
    points: list[dict[str, Any]] = []
    names: list[Union[int, str]] = [*steps, "last", "delivered"]
    for name in names:
        found: dict[str, dict[str, float]] = {}
        for variant, seeds in runs.items():
            returns = {seed: _return_at(name, run, clock) for seed, run in seeds.items()}
            found[variant] = {str(seed): value for seed, value in returns.items() if value is not None}
        variants = {
            variant: {**(statistics.describe_values([*returns.values()]) if returns else {}), "returns": returns}
            for variant, returns in found.items()
        }
        points.append({"at": name, "clock": clock, "variants": variants})
    return points


def _return_at(name: Union[int, str], run: Mapping[str, Any], clock: str) -> Optional[float]:
    if isinstance(name, int):
        return statistics.read_return(run["evaluations"], name, clock)
    entry = run["delivered"] if name == "delivered" else None
    if name == "last" and run["has_ended"] and run["evaluations"]:
        entry = run["evaluations"][-1]
    return entry and entry["average_return"]


def format_tables(title: str, points: Sequence[Mapping[str, Any]], states: Mapping[str, Mapping[int, str]]) -> str:
    """Returns the tables as markdown.

    Args:
      title: Title of the sweep.
      points: As `collect_points` returns them.
      states: State of each trial in words, by variant and seed; "ended" needs no note.
    """
    seeds = list(dict.fromkeys(seed for of_seeds in states.values() for seed in of_seeds))
    lines = [f"# {title}", ""]
    lines += [
        "Average returns of greedy evaluations. Interquartile mean (IQM): the mean after a quarter of the seeds, "
        "rounded down, is cut from each end. Interval: 95 % percentile bootstrap of the IQM over seeds.",
        "",
    ]
    if len(seeds) < _FEW:
        lines += [f"Few seeds ({len(seeds)}): for two or three the interval is their range, for one its value.", ""]
    for point in points:
        lines += [f"## {_describe_point(point)}", ""]
        header = ["variant", "n", "mean", "IQM", "95 % interval", "lowest", *(f"seed {seed}" for seed in seeds)]
        lines.append(f"| {' | '.join(header)} |")
        lines.append("|---|" + "---:|" * (5 + len(seeds)))
        for variant, result in point["variants"].items():
            returns = result["returns"]
            figures = ["-"] * 4
            if returns:
                low, high = result["interval"]
                figures = [_number(result["mean"]), f"**{_number(result['interquartile_mean'])}**"]
                figures += [f"{_number(low)} to {_number(high)}", _number(result["lowest"])]
            cells = [
                _number(returns[str(seed)]) if str(seed) in returns else _absent(states[variant].get(seed, "-"))
                for seed in seeds
            ]
            lines.append(f"| {_escape(variant)} | {len(returns)} | " + " | ".join([*figures, *cells]) + " |")
        lines.append("")
    notes = [
        f"* {variant}, seed {seed}: {state}"
        for variant, of_seeds in states.items()
        for seed, state in of_seeds.items()
        if state != "ended"
    ]
    if notes:
        lines += ["## Unfinished trials", "", *notes, ""]
    return "\n".join(lines)


def _describe_point(point: Mapping[str, Any]) -> str:
    at, unit = point["at"], CLOCKS[point["clock"]]
    if at == "delivered":
        return "Delivered policies: the best evaluated one of each run, on fresh episodes"
    if at == "last":
        return "At the end: the last evaluation of each run"
    return f"At {at:,} {unit}, interpolated on each seed's curve"


def _absent(state: str) -> str:
    return "-" if state == "ended" else _escape(state.split(":")[0])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}"


def write_picture(
    path: Path, title: str, runs: Mapping[str, Any], states: Mapping[str, Any], clock: str
) -> Optional[Path]:
    """Draws the picture and returns its path; None if nothing was evaluated yet."""
    if not any(run["evaluations"] for seeds in runs.values() for run in seeds.values()):
        return None
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.png")
    try:
        make_picture(title, runs, states, clock).savefig(partial, dpi=120)
        durable_files.put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def make_picture(title: str, runs: Mapping[str, Any], states: Mapping[str, Any], clock: str) -> Figure:
    """Returns a figure: for each variant the interquartile mean with its bootstrap band, and a thin line per seed.

    The mean is over finished runs or, while none has finished, over all runs up to the step that all have reached.
    """
    # Without pyplot: no global state, no display.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for number, (variant, seeds) in enumerate(runs.items()):
        colour = colours[number % len(colours)]
        begun = [run for run in seeds.values() if run["evaluations"]]
        curves = [run["evaluations"] for run in [run for run in begun if run["has_ended"]] or begun]
        for seed, run in seeds.items():
            curve = run["evaluations"]
            if not curve:
                continue
            xs, ys = [e[clock] for e in curve], [e["average_return"] for e in curve]
            axes.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.4)
            if states[variant].get(seed, "").startswith("failed"):
                axes.plot(xs[-1:], ys[-1:], color=colour, marker="x", markersize=8, linestyle="none")
        if not curves:
            continue
        by_step = [{entry["train_step"]: entry for entry in curve} for curve in curves]
        shared = sorted(set.intersection(*map(set, by_step)))
        rows = [[entries[step]["average_return"] for entries in by_step] for step in shared]
        xs = [sum(entries[step][clock] for entries in by_step) / len(by_step) for step in shared]
        middle = [float(statistics.interquartile_mean(row)) for row in rows]
        beaten = ", beaten" if any(state.startswith("beaten") for state in states[variant].values()) else ""
        label = f"{variant} ({len(curves)} of {len(seeds)} seeds{beaten})"
        axes.plot(xs, middle, color=colour, linewidth=2.2, marker="o", markersize=3, label=label)
        if len(curves) > 1 and rows:
            lows, highs = zip(*map(statistics.bootstrap_interval, rows))
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(CLOCKS[clock].capitalize())
    axes.set_ylabel("Average return")
    axes.set_title(f"{title}: interquartile mean, 95 % bootstrap interval, each seed", fontsize=11)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="best")
    return figure
