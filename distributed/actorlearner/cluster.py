"""WHERE: addresses and task numbers. The launcher decides which processes run on which machines."""

from __future__ import annotations

import dataclasses

DEFAULT_PORT = 8008


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What one role knows of the others.

    Attributes:
      replay_address: "host:port" of the replay server, or of several, separated by commas.
      variables_address: "host:port" of the variable container; the first replay server serves both.
      task: Number of this process among its kind, from 0.
      peer_patience_secs: How long the role waits for an unreachable peer before it gives up, in seconds.
    """

    replay_address: str
    variables_address: str
    task: int = 0
    peer_patience_secs: float = 300.0

    def __post_init__(self) -> None:
        for address in self.replay_addresses:
            check_address("replay_address", address, self.replay_address)
            if self.replay_addresses.count(address) > 1:
                raise ValueError(f"--replay_address = '{self.replay_address}': '{address}' is listed twice")
        check_address("variables_address", self.variables_address)
        if self.task < 0:
            raise ValueError(f"--task = {self.task}: expected 0 for the first of its kind, 1 for the second, ...")

    @property
    def replay_addresses(self) -> tuple[str, ...]:
        """The replay servers, by their task numbers."""
        return tuple(self.replay_address.split(","))


def check_address(flag: str, address: str, value: str = "") -> None:
    """Checks that `address`, which may be a part of the flag's `value`, is one. Raises `ValueError`."""
    host, _, port = address.rpartition(":")
    if not host or set(host) & set(" ;\t\n") or not port.isdigit() or not 0 < int(port) < 65536:
        value = value or address
        part = f": '{address}'" if value != address else ""
        several = f", or several, separated by commas: a:{DEFAULT_PORT},b:{DEFAULT_PORT}" if part else ""
        raise ValueError(
            f"--{flag} = '{value}'{part}: expected HOST:PORT, such as localhost:{DEFAULT_PORT}{several}"
        )
