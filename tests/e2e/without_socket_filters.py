"""Becomes the command in its arguments, under a system that forbids socket filters, as some kernels and sandboxes do.

With --nor-devices as the first argument it forbids binding to a device too, as kernels before 5.7 do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
SETSOCKOPT_X86_64, SO_BINDTODEVICE, SO_ATTACH_FILTER = 54, 25, 26
LOAD_WORD, IS_EQUAL, RETURN = 0x20, 0x15, 0x06


def make_program(forbidden: int, also_forbidden: int) -> bytes:
    """Returns a seccomp filter that refuses two options of setsockopt."""
    instructions = (
        (LOAD_WORD, 0, 0, 0),  # the system call's number
        (IS_EQUAL, 0, 4, SETSOCKOPT_X86_64),
        (LOAD_WORD, 0, 0, 32),  # its third argument
        (IS_EQUAL, 1, 0, forbidden),
        (IS_EQUAL, 0, 1, also_forbidden),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    )
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    command = sys.argv[1:]
    also_forbidden = SO_ATTACH_FILTER
    if command[0] == "--nor-devices":
        also_forbidden = SO_BINDTODEVICE
        command = command[1:]
    code = make_program(SO_ATTACH_FILTER, also_forbidden)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(len(code) // 8, code)), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(command[0], command)
