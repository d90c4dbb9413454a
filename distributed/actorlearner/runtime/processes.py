"""Child processes that end when this one ends, however it ends: the kernel sends them a signal.

`command_tied_to_parent` is for parents with threads, where little is safe between fork and exec; `die_with_parent` for
those without.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

BARE_PYTHON = (sys.executable, "-I", "-S", "-c")
"""Starts a program that uses only the standard library, without delay."""

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl  # looked up here, not between fork and exec

# Its arguments: the parent's process id, the signal, and the command to execute.
_TIE = """
import ctypes, os, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(sys.argv[2]))
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[3], sys.argv[3:])
"""


def command_tied_to_parent(command: Sequence[str], number: int = signal.SIGKILL) -> list[str]:
    """Returns a command line that executes `command`, which gets signal `number` when this process ends."""
    return [*BARE_PYTHON, _TIE, str(os.getpid()), str(int(number)), *command]


def die_with_parent() -> None:
    """For `preexec_fn`: makes the kernel kill the child when this process ends."""
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
