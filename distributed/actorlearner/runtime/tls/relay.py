"""The TLS relay: carries connections between a role (unencrypted) and its peers (TLS); one process for each role.

  a role's Reverb client --Unix socket--> [relay] ===TLS===> [relay] --loopback--> the replay server's Reverb

Reverb 0.14 knows no TLS. Not in the role's process, because there its threads would wait for the interpreter lock. The
role (tunnel.py) opens the listening socket and hands it over, so it outlives a relay that is restarted.

Standard input: nothing, until its end, with which the role has ended. Standard output: lines for the role, each a word
(CONNECTED, REFUSED, BROKEN), a tab and a text.

This program imports only the standard library and equally light modules.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from actorlearner.runtime.sockets import enable_keepalive
from actorlearner.runtime.tls.certificates import HANDSHAKE_SECS, describe_refusal, make_context

CONNECTED, REFUSED, BROKEN = "connected", "refused", "broken"

TO_PEER, FROM_PEERS = "to-peer", "from-peers"

OWN_LOOPBACK_ADDRESS = "127.0.0.2"
"""The address from which the relay calls Reverb's server. To a client at 127.0.0.1 with the server's own process id the
server sends pointers into its memory; here such a client is in another container, or on another host."""

_BUFFER_BYTES = 1 << 16
_RECORD_BYTES = 1 << 14  # longest TLS record
_TURNS = 16  # records in one direction before the other direction's turn
_LAST_WORDS_SECS = 2.0

Tell = Callable[[str, str], None]


def main() -> None:
    """`relay to-peer|from-peers FD FOLDER HOST PORT`: see `carry_to_peer` and `carry_from_peer`."""
    direction, descriptor, folder, host, port = sys.argv[1:]
    for number in (signal.SIGTERM, signal.SIGINT):  # schedulers signal the whole job; the role must save first
        signal.signal(number, signal.SIG_IGN)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    # two per connection, and there may be many actors
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    carry_one = {TO_PEER: carry_to_peer, FROM_PEERS: carry_from_peer}[direction]
    telling = threading.Lock()

    def tell(word: str, text: str) -> None:
        with telling, contextlib.suppress(OSError):
            os.write(1, f"{word}\t{' '.join(text.split())}\n".encode())

    def accept() -> None:
        with socket.socket(fileno=int(descriptor)) as listening:
            listening.setblocking(True)
            while True:
                try:
                    accepted, _ = listening.accept()
                    threading.Thread(
                        target=carry_one,
                        args=(accepted, Path(folder), host, int(port), tell),
                        daemon=True,
                        name="carrier",
                    ).start()
                except (OSError, RuntimeError) as error:  # out of file descriptors or threads
                    tell(BROKEN, f"a connection could not be accepted: {error}")
                    time.sleep(1.0)

    threading.Thread(target=accept, daemon=True).start()
    with open(0, "rb", closefd=False) as until_the_role_ends:
        until_the_role_ends.read()
    deadline = time.monotonic() + _LAST_WORDS_SECS  # the role's last data is still on its way
    while time.monotonic() < deadline and any(thread.name == "carrier" for thread in threading.enumerate()):
        time.sleep(0.02)
    os._exit(0)


def carry_to_peer(plain: socket.socket, folder: Path, host: str, port: int, tell: Tell) -> None:
    """Carries one connection of the role to the peer at `host`:`port`, which must show a certificate for `host`."""
    peer = f"{host}:{port}"
    has_answered = False

    def note_answer() -> None:
        nonlocal has_answered
        has_answered = True
        tell(CONNECTED, peer)

    with contextlib.ExitStack() as stack:
        stack.enter_context(plain)
        try:
            context = make_context(folder, is_server=False)
            connection = stack.enter_context(socket.create_connection((host, port), timeout=HANDSHAKE_SECS))
            _tune(connection)
            secure = stack.enter_context(context.wrap_socket(connection, server_hostname=host))
            ended = carry(plain, secure, note_answer)
            if ended is secure and not has_answered:
                tell(BROKEN, f"{peer} answers in TLS, but no replay server runs behind it")
        except OSError as error:
            if not has_answered:
                refusal = describe_refusal(error, peer, folder)
                tell(*(REFUSED, refusal) if refusal else (BROKEN, f"{peer}: {error}"))
        except ValueError as error:  # the certificate files
            tell(REFUSED, str(error))


def carry_from_peer(connection: socket.socket, folder: Path, host: str, port: int, tell: Tell) -> None:
    """Carries one connection of a peer, which must show a certificate of the CA, to Reverb at `host`:`port`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        try:
            _tune(connection)
            connection.settimeout(HANDSHAKE_SECS)
            peer = connection.getpeername()[0].removeprefix("::ffff:")
            context = make_context(folder, is_server=True)
            secure = stack.enter_context(
                context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            )
            try:
                secure.do_handshake()
            except ssl.SSLError as error:
                refusal = describe_refusal(error, peer, folder)
                if refusal:  # otherwise it only checked whether a server listens
                    tell(REFUSED, refusal)
                    _close_with_the_last_word(secure)
                return
            plain = stack.enter_context(
                socket.create_connection((host, port), timeout=HANDSHAKE_SECS, source_address=(OWN_LOOPBACK_ADDRESS, 0))
            )
            _tune(plain)
            carry(plain, secure, lambda: None)
        except OSError:  # either end has closed
            return
        except ValueError as error:  # the certificate files
            tell(REFUSED, str(error))


def _tune(connection: socket.socket) -> None:
    """Makes a TCP connection send immediately, and end if its peer's host vanishes."""
    # otherwise each answer waits 40 ms for an acknowledgement
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    enable_keepalive(connection)


def _close_with_the_last_word(secure: ssl.SSLSocket) -> None:
    """Reads until the peer closes, so that it gets the refusal: closing with unread data would reset the connection."""
    deadline = time.monotonic() + _LAST_WORDS_SECS
    with contextlib.suppress(OSError):
        secure.shutdown(socket.SHUT_WR)
        secure.settimeout(_LAST_WORDS_SECS)
        while time.monotonic() < deadline and secure.recv(_BUFFER_BYTES):
            pass


def carry(plain: socket.socket, secure: ssl.SSLSocket, note_answer: Callable[[], None]) -> socket.socket:
    """Carries bytes in both directions until one end closes, and returns that end; blocks until then.

    Args:
      plain, secure: The two connections; they are made non-blocking, and not closed.
      note_answer: Called when the first bytes arrive from the secure connection.

    Raises:
      OSError: A connection broke, or the peer refused it.
    """
    for end in (plain, secure):
        end.setblocking(False)
    buffers = {plain: memoryview(bytearray(_BUFFER_BYTES)), secure: memoryview(bytearray(_BUFFER_BYTES))}
    waiting = dict.fromkeys(buffers, memoryview(b""))  # bytes from each end that are not sent on yet
    ends = {plain.fileno(): plain, secure.fileno(): secure}
    ready: set[socket.socket] = {plain, secure}  # ends that may have data to read
    poll = select.poll()
    has_answered = False
    while True:
        wanted = {plain: 0, secure: 0}
        longest_wait: int | None = None
        for source, target in ((plain, secure), (secure, plain)):
            for _ in range(_TURNS):
                if not waiting[source]:
                    if source not in ready:
                        wanted[source] |= select.POLLIN
                        break
                    count = _try(source.recv_into, buffers[source], source, select.POLLIN, wanted)
                    if count == 0:
                        return source
                    if count is None:
                        ready.discard(source)
                        break
                    if count < _RECORD_BYTES:
                        ready.discard(source)  # probably all was read; if not, the selector reports it
                    if source is secure and not has_answered:
                        has_answered = True
                        note_answer()
                    waiting[source] = buffers[source][:count]
                count = _try(target.send, waiting[source], target, select.POLLOUT, wanted)
                if count is None:
                    break
                waiting[source] = waiting[source][count:]
            else:
                longest_wait = 0
        for end, events in wanted.items():
            if events:
                poll.register(end, events)
            else:
                with contextlib.suppress(KeyError):
                    poll.unregister(end)
        ready.update(ends[number] for number, _ in poll.poll(longest_wait))


def _try(
    call: Callable[[memoryview], int],
    data: memoryview,
    end: socket.socket,
    events: int,
    wanted: dict[socket.socket, int],
) -> int | None:
    """Returns what `call` returns, or None if it would block; then records which event of `end` to wait for."""
    try:
        return call(data)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
        if isinstance(error, ssl.SSLWantReadError):
            events = select.POLLIN
        elif isinstance(error, ssl.SSLWantWriteError):
            events = select.POLLOUT
        wanted[end] |= events
        return None


if __name__ == "__main__":
    main()
