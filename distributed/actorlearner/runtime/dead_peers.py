"""Notices peers that are gone without a word: a host without power, a cut cable, a firewall that has forgotten.

Nothing arrives on such a half-open connection, not even its end, so who waits on it waits for ever. Reverb's gRPC
channels do not look for that. Here the kernel is asked to, on Reverb's sockets: a connection that is dead ends with an
error, which Reverb's clients answer with a new connection.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Collection

from actorlearner.runtime.tcp_sockets import own_tcp_sockets

LOOK_EVERY_SECS = 2.0
"""Time between two looks for new connections."""


def notice_dead_peers(ports: Collection[int], *, silent_secs: float = 20.0) -> None:
    """Starts a thread that has the kernel end connections whose peer's host does not answer; never blocks.

    A host that answers for a process that is slow is alive, unless what is sent to it finds no room for that long.

    Args:
      ports: Connections from or to these are looked after.
      silent_secs: So long a peer's host may leave unanswered what is sent, or asked for when all is quiet, in seconds.
    """
    threading.Thread(target=_look, args=(frozenset(ports), silent_secs), name="dead peers", daemon=True).start()


def _look(ports: Collection[int], silent_secs: float) -> None:
    try:
        while True:
            for connection in own_tcp_sockets():
                with contextlib.suppress(OSError):  # it listens, or has ended
                    if connection.getsockname()[1] in ports or connection.getpeername()[1] in ports:
                        look_after(connection, silent_secs)
            time.sleep(LOOK_EVERY_SECS)
    except OSError as error:
        logging.warning("a peer that vanishes may go unnoticed: this process cannot list its sockets: %s", error)


def look_after(connection: socket.socket, silent_secs: float = 20.0) -> None:
    """Has the kernel end `connection` when its peer's host does not answer for so long, in seconds."""
    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return
    probe_secs = max(1, math.ceil(silent_secs / 4))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_secs)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_secs)
    # Counts for what is sent as well as for probes, of which it takes the place of the number.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * silent_secs))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
