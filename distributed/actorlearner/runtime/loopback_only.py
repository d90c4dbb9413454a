"""Closes a listening port to other machines, from inside the process that listens; needs no privileges.

other machines --x--> [port] <-- this machine, through 127.0.0.0/8 or ::1

Reverb's server always listens on every interface. A classic BPF filter on its sockets lets the kernel drop every packet
that does not come from a loopback address, the first one included: to others nobody seems to listen.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

_SO_ATTACH_FILTER = 26  # Python's socket module has no name for it
_NETWORK_HEADER = -0x100000 & 0xFFFFFFFF  # offsets from here are counted from the start of the IP header

# Instructions are (operation, to skip if true, to skip if false, operand). See linux/filter.h.
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _IS_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
_FILTER = (
    (_LOAD_BYTE, 0, 0, _NETWORK_HEADER + 0),
    (_SHIFT_RIGHT, 0, 0, 4),
    (_IS_EQUAL, 0, 2, 4),  # IPv4: whether the source is 127.x.x.x
    (_LOAD_BYTE, 0, 0, _NETWORK_HEADER + 12),
    (_IS_EQUAL, 8, 9, 127),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 8),  # IPv6: whether it is ::1
    (_IS_EQUAL, 0, 7, 0),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 12),
    (_IS_EQUAL, 0, 5, 0),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 16),
    (_IS_EQUAL, 0, 3, 0),
    (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 20),
    (_IS_EQUAL, 0, 1, 1),
    (_RETURN, 0, 0, 0xFFFFFFFF),  # the whole packet
    (_RETURN, 0, 0, 0),  # nothing of it
)


def close_to_other_machines(port: int) -> None:
    """Lets only this machine, by a loopback address, reach what this process serves on `port`; never blocks.

    What connected from elsewhere in the moment since the port was opened is cut off.

    Raises:
      OSError: The system does not allow it, or this process does not listen there.
    """
    num_listening = 0
    for connection in _tcp_sockets(port):
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _attach_filter(connection)
            num_listening += 1
    if not num_listening:
        raise OSError(f"no socket of this process that listens on port {port} was found in /proc/self/fd")
    for connection in _tcp_sockets(port):  # connections accepted from now on have the filter of their listener
        with contextlib.suppress(OSError):  # it listens, or its peer has gone
            peer = ipaddress.ip_address(connection.getpeername()[0].partition("%")[0])
            if not (getattr(peer, "ipv4_mapped", None) or peer).is_loopback:
                connection.shutdown(socket.SHUT_RDWR)


def _tcp_sockets(port: int) -> Iterator[socket.socket]:
    """Yields this process's TCP sockets on the local `port`, each as a duplicate that is closed afterwards."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            number = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        with socket.socket(fileno=number) as found:
            is_tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
            if is_tcp and found.getsockname()[1] == port:
                yield found


def _attach_filter(listening: socket.socket) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in _FILTER))
    program = struct.pack("HP", len(_FILTER), ctypes.addressof(code))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
