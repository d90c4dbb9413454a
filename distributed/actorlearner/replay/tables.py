"""Compares and describes a replay's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from actorlearner.runtime.lifecycle import ExitCode, RoleError
from actorlearner.runtime.messages import Unreachable, check_signature, read_server_info


def check_tables(address: str, tables: Mapping[str, Any], signatures: Mapping[str, Any]) -> None:
    """Checks that a replay server's tables match `signatures`.

    Args:
      address: Address of the server.
      tables: Reverb's `TableInfo` by table name.
      signatures: Signatures of the tables that this experiment needs.

    Raises:
      RoleError: A table is missing or has another signature (DATA).
    """
    for name, signature in signatures.items():
        if name not in tables:
            raise RoleError(
                f"the Reverb server at {address} has no table '{name}' but {', '.join(sorted(tables)) or 'none'}: it "
                "serves another experiment or another replay. Correct --replay_address, or start it with the same "
                "experiment and --gin_bindings.",
                ExitCode.DATA,
            )
        check_signature(f"table '{name}'", address, tables[name].signature, signature)


def describe_tables(address: str, names: Iterable[str]) -> str:
    """Returns the state of some of a server's tables, in words; blocks at most about a second."""
    try:
        tables = read_server_info(address, timeout_secs=1)
    except Unreachable as error:
        return str(error)
    return "; ".join(f"table '{name}': {describe_table(tables[name])}" for name in names if name in tables)


def describe_table(table: Any) -> str:
    """Returns the account of a table's rate limiter in words, given Reverb's `TableInfo`."""
    limiter = table.rate_limiter_info
    inserts, samples = limiter.insert_stats.completed, limiter.sample_stats.completed
    return describe_account(
        table.current_size,
        inserts,
        samples,
        needed=limiter.min_size_to_sample,
        ahead=inserts * limiter.samples_per_insert - samples,
        least=limiter.min_diff + 1,
        most=limiter.max_diff - limiter.samples_per_insert,
    )


def describe_account(
    size: int, inserts: int, samples: int, *, needed: int, ahead: float, least: float, most: float
) -> str:
    """Returns a replay's account in words.

    Args:
      size: Windows held now.
      inserts, samples: Windows ever inserted and sampled.
      needed: Windows held before training starts.
      ahead: `inserts * samples_per_insert - samples`, kept between `least` and `most`.
    """
    if inserts < needed:
        return f"{inserts:,} of {needed:,} steps collected"
    counts = f"{size:,} held, {inserts:,} inserted, {samples:,} sampled"
    if ahead >= most:
        return f"{counts}; actors are as far ahead as samples per insert allow"
    if ahead <= least:
        return f"{counts}; the learner is as far ahead as samples per insert allow"
    return counts
