"""The drill's wire: what a stall, a cut and their mending do to connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from drills.wire import Wire

SILENT_SECS = 0.3


class Echo:
    """A server that sends back what it gets, prefixed by its name, and knows which connections have ended."""

    def __init__(self, name: bytes):
        self._name = name
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.has_lost_one = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=self._listening.accept()[:1], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(100):
                connection.sendall(self._name + data)
        self.has_lost_one.set()

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    with contextlib.closing(Echo(b"1:")) as echo:
        yield echo


@pytest.fixture
def wire(echo: Echo) -> Iterator[Wire]:
    with Wire(lambda: echo.port) as wire:
        yield wire


def connect(wire: Wire) -> socket.socket:
    host, port = wire.address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def assert_silent(connection: socket.socket) -> None:
    connection.settimeout(SILENT_SECS)
    with pytest.raises(socket.timeout):
        connection.recv(100)
    connection.settimeout(10)


def assert_dead(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        assert connection.recv(100) == b""


def test_a_stall_holds_everything_back_until_it_is_mended(wire: Wire):
    with connect(wire) as before:
        before.sendall(b"a")
        assert before.recv(100) == b"1:a"
        wire.stall()
        before.sendall(b"b")
        with connect(wire) as during:
            during.sendall(b"c")
            assert_silent(before)
            assert_silent(during)
            wire.mend()
            assert before.recv(100) == b"1:b"
            assert during.recv(100) == b"1:c"


def test_during_a_stall_nobody_hears_that_the_other_side_has_gone(wire: Wire, echo: Echo):
    """A half-open connection is what keep-alives are for; a wire that closes it hides that they are missing."""
    with connect(wire) as gone:
        gone.sendall(b"a")
        assert gone.recv(100) == b"1:a"
        wire.stall()
    assert not echo.has_lost_one.wait(SILENT_SECS)
    wire.mend()
    assert echo.has_lost_one.wait(10)


def test_a_cut_ends_each_connection_and_loses_what_a_stall_held_back(wire: Wire):
    with connect(wire) as before:
        before.sendall(b"a")
        assert before.recv(100) == b"1:a"
        wire.stall()
        before.sendall(b"b")
        wire.cut()
        assert_dead(before)
    with connect(wire) as refused:
        assert_dead(refused)
    wire.mend()
    with connect(wire) as after:
        after.sendall(b"c")
        assert after.recv(100) == b"1:c"


def test_each_connection_goes_to_where_the_server_is_then():
    """A replay server that is started again may have another port; none is there yet when its run begins."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(Wire(lambda: ports[-1] if ports else 0))
        with connect(wire) as too_early:
            assert_dead(too_early)
        for name in (b"1:", b"2:"):
            ports.append(stack.enter_context(contextlib.closing(Echo(name))).port)
            with connect(wire) as connection:
                connection.sendall(b"a")
                assert connection.recv(100) == name + b"a"
