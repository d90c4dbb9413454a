"""Ends a leak of TensorFlow 2.15's on CPython 3.11: 48 bytes with each eager tensor, 190 MB an hour in a fast learner.

`object.__new__` gives an object of a class like `EagerTensor` room for attributes there, which CPython's own
deallocator frees. `EagerTensor` has another, which does not: https://github.com/tensorflow/tensorflow/issues/62551.
Made by `PyType_GenericNew` it has no such room until an attribute is set.
"""

from __future__ import annotations

import ctypes
import logging
import sys

from tensorflow.python.framework.ops import EagerTensor

_NEW_AT = 39 * ctypes.sizeof(ctypes.c_void_p)  # of `tp_new` in CPython's `PyTypeObject`


def stop_leak() -> bool:
    """Returns whether eager tensors that are made from here on leak nothing, unless attributes are set on them.

    Where TensorFlow or CPython are not the ones that this is known of nothing is changed, and a warning says so.
    """
    if sys.version_info < (3, 11):
        return True
    new = ctypes.c_void_p.from_address(id(EagerTensor) + _NEW_AT)
    generic_new = ctypes.cast(ctypes.pythonapi.PyType_GenericNew, ctypes.c_void_p).value
    inherited = ctypes.c_void_p.from_address(id(object) + _NEW_AT).value
    if new.value not in (inherited, generic_new) or EagerTensor.__new__ is not object.__new__:
        logging.warning("memory grows by 48 bytes with each eager tensor (tensorflow#62551): its class is not as known")
        return False
    new.value = generic_new
    return True
