"""Reverb servers for tests: real ones, on ports that are free."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported

import pytest


def pytest_configure(config):
    """Gives what killed processes leave behind one folder, which goes when pytest does; its workers inherit it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # its own stay where one looks for them
        tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="tests-")  # short: sockets are made below
        config.add_cleanup(lambda: shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True))


def pytest_collection_modifyitems(items):
    """Fast tests first; those that start real processes come last."""
    items.sort(key=lambda item: "e2e" in item.path.parts)


UNUSED_ADDRESS = "localhost:1"

_LOST_READERS: set[threading.Thread] = set()  # of tests whose server ends first


@pytest.fixture
def serve():
    """`serve(tables, port=None)` starts a Reverb server; each is stopped after the test."""
    import reverb

    servers = []

    def start(tables, port=None):
        server = reverb.Server(tables, port=port)
        servers.append(server)
        return server

    yield start
    # Readers first. Reverb hands one in the server's own process a pointer to the table, and dies of it when the server
    # stops at that moment; and a reader whose server ended under it stays in Reverb for good: a dozen keep a core busy.
    for kind in ("ingest ", "subscriber", "reader of "):  # the last are started by the others
        readers = {thread for thread in threading.enumerate() if thread.name.startswith(kind)}
        for reader in readers - _LOST_READERS:
            with contextlib.suppress(RuntimeError):  # it is just being started
                reader.join(timeout=3)
            if reader.is_alive():
                _LOST_READERS.add(reader)
    for server in servers:
        server.stop()


@pytest.fixture
def unused_address():
    """An address on which no process listens."""
    return UNUSED_ADDRESS


@pytest.fixture
def eventually():
    """`eventually(condition, secs=30)` returns when `condition()` holds, and fails past the deadline."""
    from actorlearner.runtime.lifecycle import Stop, wait_until

    def wait(condition, secs=30):
        wait_until(condition, lambda: "the condition", stop=Stop(), deadline_secs=secs, setting="test", every_secs=0.02)

    return wait
