"""How much memory this process has in use, to the byte: the resident set also has what is free, and moves by itself."""

from __future__ import annotations

import ctypes

FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


def bytes_in_use() -> int:
    """Returns the bytes that malloc has given out and not got back, without Python's small objects."""
    libc = ctypes.CDLL(None)
    has_wide = hasattr(libc, "mallinfo2")  # since glibc 2.33

    class MallInfo(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t if has_wide else ctypes.c_int) for name in FIELDS]

    ask = libc.mallinfo2 if has_wide else libc.mallinfo
    ask.restype = MallInfo
    info = ask()
    return int(info.uordblks + info.hblkhd)
