"""Rows of the results table: the measure, the reference, and whether the bar is reached."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from rich.table import Table

HEADINGS = ("measure", "ours", "reference", "its figure", "ratio", "bar", "reached")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      name: Name of the subject and the reference, for programs.
      measure, reference: What was measured and against what, in words.
      unit: Unit of both figures.
      bar: Required ratio of medians, ours to the reference's.
      ours, theirs: A figure for each repeat; a reference that is a fixed number stands once.
      is_at_most: Whether the ratio must stay below the bar instead of above it.
      details: Further findings, as JSON.
      not_measured: Why there are no figures, and what would produce them; None if there are.
      unmet: Another requirement that failed; then the bar is missed whatever the ratio. None if all held.
    """

    name: str
    measure: str
    reference: str
    unit: str
    bar: float
    ours: Sequence[float] = ()
    theirs: Sequence[float] = ()
    is_at_most: bool = False
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    not_measured: Optional[str] = None
    unmet: Optional[str] = None

    @property
    def ratio(self) -> Optional[float]:
        if not self.ours or not self.theirs:
            return None
        theirs = statistics.median(self.theirs)
        return statistics.median(self.ours) / theirs if theirs else None

    @property
    def is_reached(self) -> Optional[bool]:
        if self.ratio is None:
            return None
        if self.unmet:
            return False
        return self.ratio <= self.bar if self.is_at_most else self.ratio >= self.bar

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "ours_median": statistics.median(self.ours) if self.ours else None,
            "theirs_median": statistics.median(self.theirs) if self.theirs else None,
            "ratio": self.ratio,
            "is_reached": self.is_reached,
        }


def row_from_json(content: Mapping[str, Any]) -> Row:
    """Returns the row that `Row.to_json` wrote, perhaps in an earlier version with fewer fields."""
    return Row(**{field.name: content[field.name] for field in dataclasses.fields(Row) if field.name in content})


def make_table(rows: Sequence[Row], title: str) -> Table:
    """Returns the rows as a table for a terminal."""
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("measure", "reference") else "right")
    for row in rows:
        style = {True: "green", False: "red", None: "yellow"}[row.is_reached]
        table.add_row(*_cells(row), style=style)
    return table


def make_markdown(report: Mapping[str, Any]) -> str:
    """Returns a report's rows as a Markdown table, with the machine, the versions and the command above it."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [row_from_json(row) for row in report["rows"]]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['gpu'] or 'no GPU'}; "
        f"{report['date']}; commit {machine['commit']}; {versions}. Medians of {report['repeats']}.",
        "",
        f"```bash\n{report['command']}\n```",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> Sequence[str]:
    bar = f"{'at most' if row.is_at_most else 'at least'} {row.bar:.3g}"
    if row.ratio is None:
        return (row.measure, f"not measured: {row.not_measured}", row.reference, "", "", bar, "")
    ours, theirs = (statistics.median(figures) for figures in (row.ours, row.theirs))
    reached = "yes" if row.is_reached else f"no: {row.unmet}" if row.unmet else "no"
    return (
        row.measure,
        f"{_figure(ours)} {row.unit}",
        row.reference,
        f"{_figure(theirs)} {row.unit}",
        f"{_figure(row.ratio)}",
        bar,
        reached,
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
