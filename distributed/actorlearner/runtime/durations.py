"""Formats durations."""

from __future__ import annotations


def describe_secs(secs: float) -> str:
    """Returns `42 s`, `5 min 03 s` or `3 h 05 min`."""
    whole = max(0, round(secs))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
