"""The TCP sockets of this process, including those that a library such as Reverb's gRPC opened and hides.

`notice_dead_peers`: a host without power, a cut cable or a firewall that dropped its state leaves a half-open
connection. Nothing arrives on it, not even its end, and Reverb's gRPC channels do not probe for that. Here the kernel
does: a dead connection ends with an error, and Reverb's clients open a new one.

`close_to_other_machines`: Reverb's server always listens on every interface. A classic BPF filter on its sockets makes
the kernel drop every packet that does not come from a loopback address, the first one included: to other machines
nothing seems to listen. It needs no privileges. Where a kernel or sandbox allows filters only to the privileged, the
sockets are bound to the loopback device, which needs none since Linux 5.7, and other machines are refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator

LOOK_EVERY_SECS = 2.0
"""Time between two scans for new connections."""

_SO_ATTACH_FILTER = 26  # Python's socket module has no name for it
_NETWORK_HEADER = -0x100000 & 0xFFFFFFFF  # offsets from here are counted from the start of the IP header

# Instructions are (operation, jump if true, jump if false, operand). See linux/filter.h.
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _IS_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
_FILTER = (
    (_LOAD_BYTE, 0, 0, _NETWORK_HEADER + 0),
    (_SHIFT_RIGHT, 0, 0, 4),
    (_IS_EQUAL, 0, 2, 4),  # IPv4: is the source 127.x.x.x?
    (_LOAD_BYTE, 0, 0, _NETWORK_HEADER + 12),
    (_IS_EQUAL, 8, 9, 127),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 8),  # IPv6: is the source ::1?
    (_IS_EQUAL, 0, 7, 0),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 12),
    (_IS_EQUAL, 0, 5, 0),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 16),
    (_IS_EQUAL, 0, 3, 0),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 20),
    (_IS_EQUAL, 0, 1, 1),
    (_RETURN, 0, 0, 0xFFFFFFFF),  # accept the whole packet
    (_RETURN, 0, 0, 0),  # drop it
)


def own_tcp_sockets() -> Iterator[socket.socket]:
    """Yields a duplicate of each TCP socket of this process; it is closed when the next one is yielded.

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
        except OSError:  # closed meanwhile, and its number reused by a file
            os.close(number)
            continue
        with found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                yield found


def notice_dead_peers(ports: Collection[int], *, silent_secs: float = 20.0) -> None:
    """Starts a thread that enables TCP keep-alive on new connections; never blocks.

    A slow process on a host that answers counts as alive, unless its receive buffer stays full for that long.

    Args:
      ports: Connections from or to these get TCP keep-alive.
      silent_secs: Longest time without an answer from a peer's host, to data or to keep-alive probes, in seconds.
    """
    threading.Thread(
        target=_look_for_connections, args=(frozenset(ports), silent_secs), name="dead peers", daemon=True
    ).start()


def _look_for_connections(ports: Collection[int], silent_secs: float) -> None:
    try:
        while True:
            for connection in own_tcp_sockets():
                with contextlib.suppress(OSError):  # a listening or closed socket
                    if connection.getsockname()[1] in ports or connection.getpeername()[1] in ports:
                        enable_keepalive(connection, silent_secs)
            time.sleep(LOOK_EVERY_SECS)
    except OSError as error:
        logging.warning("a vanished peer may go unnoticed: this process cannot list its sockets: %s", error)


def enable_keepalive(connection: socket.socket, silent_secs: float = 20.0) -> None:
    """Enables TCP keep-alive: the kernel ends `connection` if the peer's host does not answer for `silent_secs`."""
    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return
    probe_secs = max(1, math.ceil(silent_secs / 4))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_secs)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_secs)
    # Applies to sent data and to probes, and replaces the number of probes.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * silent_secs))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def close_to_other_machines(port: int) -> None:
    """Allows only this machine, through a loopback address, to reach this process on `port`; never blocks.

    Connections from elsewhere that were made before the call are cut.

    Raises:
      OSError: The system does not allow it, or this process does not listen there.
    """
    num_listening = 0
    for listening in own_tcp_sockets():
        if listening.getsockname()[1] == port and listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _close(listening)
            num_listening += 1
    if not num_listening:
        raise OSError(f"no socket of this process that listens on port {port} was found in /proc/self/fd")
    for accepted in own_tcp_sockets():  # accepted before; later ones inherit from the listener
        with contextlib.suppress(OSError):  # a listening socket, or one whose peer has gone
            peer = ipaddress.ip_address(accepted.getpeername()[0].partition("%")[0])
            is_local = (getattr(peer, "ipv4_mapped", None) or peer).is_loopback
            if accepted.getsockname()[1] == port and not is_local:
                accepted.shutdown(socket.SHUT_RDWR)


def _close(listening: socket.socket) -> None:
    try:
        _attach_filter(listening)
    except PermissionError:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")


def _attach_filter(listening: socket.socket) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in _FILTER))
    program = struct.pack("HP", len(_FILTER), ctypes.addressof(code))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
