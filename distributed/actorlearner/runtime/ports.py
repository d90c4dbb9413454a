"""Finds free TCP ports."""

from __future__ import annotations

import socket


def find_free_port() -> int:
    """Returns a TCP port that is free now. Another process may take it before the replay server does."""
    return find_free_ports(1)[0]


def find_free_ports(number: int) -> list[int]:
    """Returns `number` different free TCP ports."""
    probes = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(number)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
