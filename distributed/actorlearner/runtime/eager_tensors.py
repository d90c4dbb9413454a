"""Ends a leak of TensorFlow 2.15's on CPython 3.11: 48 bytes with each eager tensor, 190 MB an hour in a fast learner.

CPython 3.11 gives every object of a class like `EagerTensor` room for attributes, and frees it in its own deallocator.
`EagerTensor` has a deallocator and a `__dict__` of its own (`TFE_Py_InitEagerTensor`), which know nothing of that room:
https://github.com/tensorflow/tensorflow/issues/62551. It is made without the room here, as mypyc makes its classes on
3.11: by taking the flag `Py_TPFLAGS_MANAGED_DICT` off the class.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys

from tensorflow.python.framework.ops import EagerTensor

_MANAGED_DICT = 1 << 4
_FLAGS_AT = 21 * ctypes.sizeof(ctypes.c_void_p)  # of `tp_flags` in CPython's `PyTypeObject`


def stop_leak() -> bool:
    """Returns whether eager tensors leak nothing from here on. Call it before anything is computed.

    Where an eager tensor is alive already, or TensorFlow or CPython are not the ones that this is known of, nothing is
    changed, and a warning says so.
    """
    if sys.version_info < (3, 11) or not EagerTensor.__flags__ & _MANAGED_DICT:
        return True
    flags = ctypes.c_ulong.from_address(id(EagerTensor) + _FLAGS_AT)
    is_known = sys.version_info[:2] == (3, 11) and flags.value == EagerTensor.__flags__
    has_own_dict = EagerTensor.__dictoffset__ > 0
    # What is alive was made with the room before it, and would be freed as if it had none.
    is_alive = any(type(one) is EagerTensor for one in gc.get_objects())
    if not is_known or not has_own_dict or is_alive:
        logging.warning(
            "memory will grow by 48 bytes with each eager tensor (tensorflow#62551): %s",
            "one was made while modules were imported" if is_alive else "this CPython or TensorFlow is not known",
        )
        return False
    flags.value &= ~_MANAGED_DICT
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(EagerTensor))
    return True
