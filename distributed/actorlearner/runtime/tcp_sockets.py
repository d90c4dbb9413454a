"""The TCP sockets of this process, those too that a library opened and does not hand out, as Reverb's gRPC."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator


def own_tcp_sockets() -> Iterator[socket.socket]:
    """Yields each TCP socket of this process as a duplicate, which is closed when the next one is asked for.

    Raises:
      OSError: There is no /proc.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            number = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        try:
            found = socket.socket(fileno=number)
        except OSError:  # closed meanwhile, and its number given to a file
            os.close(number)
            continue
        with found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                yield found
