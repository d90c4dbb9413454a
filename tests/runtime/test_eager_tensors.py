"""What an eager tensor leaves behind when it is gone: nothing, also on CPython 3.11."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: which tests ran before this one must not matter, nor those after it.
_COUNT = """
import sys, tracemalloc
import numpy as np
import tensorflow as tf
from actorlearner.runtime.eager_tensors import stop_leak

early = tf.constant(1.0)
early.note = "an attribute"
if sys.argv[1] == "stopped":
    assert stop_leak() and stop_leak()
array, variable = np.ones(2, np.float32), tf.Variable([1.0, 2.0])
double = tf.function(lambda value: 2 * value)

def make(count):
    for _ in range(count):
        assert variable.read_value().numpy()[1] == 2.0
        assert tf.constant(array).shape == (2,)
        double(array), variable.assign_add(array - 1)

make(2_000)
tracemalloc.start()
make(2_000)
before = tracemalloc.get_traced_memory()[0]
make(10_000)
print((tracemalloc.get_traced_memory()[0] - before) / 10_000)
late = tf.constant(2.0)
late.note = "another"
assert (early.note, late.note, float(early + late)) == ("an attribute", "another", 3.0)
"""


def _count(how: str) -> float:
    """Returns how many bytes some five eager tensors leave, each made in another way."""
    ended = subprocess.run(
        [sys.executable, "-c", _COUNT, how],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout)


def test_an_eager_tensor_leaves_nothing_behind():
    """On 3.11 TensorFlow loses 48 bytes with each, which is 190 MB an hour in a learner (tensorflow#62551)."""
    assert _count("stopped") < 4


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TensorFlow leaks on CPython 3.11")
def test_tensorflow_still_leaks_where_nobody_stops_it():
    """If this fails, `stop_leak` is no longer needed."""
    assert _count("as it is") > 200
