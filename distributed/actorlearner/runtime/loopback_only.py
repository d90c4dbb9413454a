"""Closes a listening port to other machines, from inside the process that listens; needs no privileges.

other machines --x--> [port] <-- this machine, through 127.0.0.0/8 or ::1

Reverb's server always listens on every interface. A classic BPF filter on its sockets lets the kernel drop every packet
that does not come from a loopback address, the first one included: to others nobody seems to listen. Some kernels and
sandboxes leave filters to the privileged: there the sockets are bound to the loopback device, which since Linux 5.7
needs no privileges, and others are refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import socket
import struct

from actorlearner.runtime.tcp_sockets import own_tcp_sockets

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
    for listening in own_tcp_sockets():
        if listening.getsockname()[1] == port and listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _close(listening)
            num_listening += 1
    if not num_listening:
        raise OSError(f"no socket of this process that listens on port {port} was found in /proc/self/fd")
    for accepted in own_tcp_sockets():  # before; from now on they are their listener's kind
        with contextlib.suppress(OSError):  # it listens, or its peer has gone
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
