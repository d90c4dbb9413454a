"""The benchmark's table: medians, ratios, bars, and rows without figures."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.results import Row, make_markdown, make_table, row_from_json

FASTER = Row("a", "updates", "stock", "updates/s", 3.5, ours=[100, 400, 380], theirs=[90, 100, 1])
SMALLER = Row("b", "bytes", "full pull", "bytes", 0.01, ours=[1.0], theirs=[50.0], is_at_most=True)
UNMET = Row("d", "updates", "stock", "updates/s", 8.0, ours=[900], theirs=[100], unmet="took in 20 steps/s of 2,000")
MISSING = Row("c", "updates", "SBX", "updates/s", 1.0, not_measured="no SBX here; ./launch/bench.sh makes it")


def test_the_ratio_is_that_of_medians():
    """A mean would let one disturbed repeat decide."""
    assert FASTER.ratio == pytest.approx(380 / 90)
    assert FASTER.is_reached is True
    assert Row("a", "m", "r", "u", 3.5, ours=[3.4], theirs=[1]).is_reached is False


def test_a_bar_that_is_an_upper_bound_is_judged_from_below():
    """Otherwise more bytes would be the better result."""
    assert SMALLER.ratio == pytest.approx(0.02)
    assert SMALLER.is_reached is False


def test_a_row_whose_conditions_were_not_kept_is_not_reached_and_says_which():
    """A ratio measured under other conditions is another measure."""
    assert UNMET.ratio == pytest.approx(9.0)
    assert UNMET.is_reached is False
    printed = io.StringIO()
    Console(file=printed, width=300).print(make_table([UNMET], "machine"))
    assert "no: took in 20 steps/s of 2,000" in printed.getvalue()


def test_what_was_not_measured_has_no_ratio_and_says_why():
    """An empty cell looks like a zero, or like a pass."""
    assert MISSING.ratio is None and MISSING.is_reached is None
    printed = io.StringIO()
    Console(file=printed, width=300).print(make_table([FASTER, SMALLER, MISSING], "machine"))
    assert "not measured: no SBX here; ./launch/bench.sh makes it" in printed.getvalue()


def test_markdown_is_made_from_the_json_alone():
    """The table in the documentation must come from a stored file, not be typed by hand."""
    report = {
        "command": "actorlearner bench --only learner",
        "date": "2026-01-02",
        "repeats": 3,
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 8, "gpu": None, "commit": "abc", "versions": {"tf": "2"}},
        "rows": [row.to_json() for row in (FASTER, SMALLER, MISSING)],
    }
    lines = make_markdown(report).splitlines()
    assert lines[0].startswith("A CPU, 2 cores, 8 GiB; no GPU; 2026-01-02; commit abc; tf 2.")
    assert "actorlearner bench --only learner" in lines
    assert "| updates | 380 updates/s | stock | 90 updates/s | 4.22 | at least 3.5 | yes |" in lines
    assert "| bytes | 1 bytes | full pull | 50 bytes | 0.02 | at most 0.01 | no |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


@pytest.mark.parametrize("row", [FASTER, UNMET], ids=lambda row: row.name)
def test_a_row_survives_its_json(row):
    assert row_from_json(row.to_json()) == row


def test_a_row_that_was_written_before_a_field_was_there_is_read():
    """The reports that people keep are older than the code that reads them."""
    content = FASTER.to_json()
    del content["unmet"]
    assert row_from_json(content) == FASTER
