"""WHERE: addresses and task numbers. Which processes there are, and on which machines, is the launcher's business."""

from __future__ import annotations

import dataclasses

DEFAULT_PORT = 8008


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What one role knows of the others.

    Attributes:
      replay_address: "host:port" of the replay server.
      variables_address: "host:port" of the variable container; the replay server serves both.
      task: Which of its kind this process is, from 0.
      peer_patience_secs: How long an unreachable peer is waited for before the role gives up, in seconds.
    """

    replay_address: str
    variables_address: str
    task: int = 0
    peer_patience_secs: float = 300.0

    def __post_init__(self) -> None:
        for flag, address in (("replay_address", self.replay_address), ("variables_address", self.variables_address)):
            _check_address(flag, address)
        if self.task < 0:
            raise ValueError(f"--task = {self.task}: expected 0 for the first of its kind, 1 for the second, ...")


def _check_address(flag: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--{flag} = '{address}': expected HOST:PORT, such as localhost:{DEFAULT_PORT}")
