"""A role's ends of TLS tunnels: starts and restarts the relays, and knows why a connection was refused.

Code that makes a Reverb client passes `reach(address)`: the address itself, or, in a role that called
`use_certificates`, the tunnel to it. A replay server admits its peers with `open_to_peers`.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Optional

from actorlearner.runtime.lifecycle import SAY_EVERY_SECS, ExitCode, RoleError
from actorlearner.runtime.tls import relay
from actorlearner.runtime.tls.certificates import CERTIFICATE, make_context

WARN_DAYS = 14
"""A role warns at its start if its certificate expires within this many days."""

_SOURCE_ROOT = str(Path(__file__).parents[3])

_LONGEST_PATH = 100  # longest path of a Unix socket, whose address holds 108 bytes


class Tunnel:
    """A listening socket and the relay that carries its connections; both end with this process, or with `close`.

    Attributes:
      address: The address for Reverb's clients in this process, instead of the peer's.
      trouble: Why the last connection failed, with advice; None while connections succeed.
      is_refused: Whether `trouble` is about certificates.
    """

    def __init__(self, name: str, listening: socket.socket, direction: str, folder: Path, target: tuple[str, int]):
        self.address = f"unix:{listening.getsockname()}" if listening.family == socket.AF_UNIX else ""
        self.trouble: Optional[str] = None
        self.is_refused = False
        self._name = name
        self._listening = listening
        self._arguments = [direction, str(listening.fileno()), str(folder.absolute()), target[0], str(target[1])]
        self._said_at: dict[str, float] = {}
        self._is_closed = False
        self._relay = self._start_relay()
        threading.Thread(target=self._keep, name="tls tunnel", daemon=True).start()

    def _start_relay(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", relay.__name__, *self._arguments],
            stdin=subprocess.PIPE,  # when this process ends, however it does, the relay reads the end of its input
            stdout=subprocess.PIPE,
            pass_fds=[self._listening.fileno()],
            env={**os.environ, "PYTHONPATH": _SOURCE_ROOT},
            text=True,
        )

    def close(self) -> None:
        """Ends the relay and all its connections; blocks until it has ended."""
        self._is_closed = True
        self._listening.close()
        self._relay.kill()
        self._relay.wait()

    def _keep(self) -> None:
        while True:
            assert self._relay.stdout is not None
            for line in self._relay.stdout:
                self._hear(*line.rstrip("\n").split("\t", 1))
            if self._is_closed:
                return
            logging.warning("the TLS relay %s ended with %d; restarting it", self._name, self._relay.wait())
            time.sleep(1.0)
            self._relay = self._start_relay()

    def _hear(self, word: str, text: str) -> None:
        if word == relay.CONNECTED:
            if self.trouble:
                logging.info("the TLS tunnel %s is open", self._name)
            self.trouble, self.is_refused = None, False
            self._said_at.clear()
            return
        self.is_refused = word == relay.REFUSED
        self.trouble = f"TLS: {text}."
        now = time.monotonic()
        if len(self._said_at) > 1_000:
            self._said_at.clear()
        if now - self._said_at.get(text, -SAY_EVERY_SECS) >= SAY_EVERY_SECS:
            self._said_at[text] = now
            logging.warning("the TLS tunnel %s: %s", self._name, text)


class _Reach:
    """How this process reaches its peers."""

    def __init__(self, folder: Optional[Path] = None, in_the_clear: Collection[str] = ()):
        self._folder = folder
        self._in_the_clear = frozenset(in_the_clear)
        self._tunnels: dict[str, Tunnel] = {}
        self._lock = threading.Lock()

    def reach(self, address: str) -> str:
        if self._folder is None or address in self._in_the_clear:
            return address
        with self._lock:
            if address not in self._tunnels:
                self._tunnels[address] = open_to_peer(address, self._folder)
            return self._tunnels[address].address

    def find_trouble(self) -> Optional[tuple[str, bool]]:
        with self._lock:
            in_trouble = [tunnel for tunnel in self._tunnels.values() if tunnel.trouble]
        for tunnel in sorted(in_trouble, key=lambda tunnel: not tunnel.is_refused):
            return str(tunnel.trouble), tunnel.is_refused
        return None


_reach = _Reach()


def use_certificates(folder: Path, *, in_the_clear: Collection[str] = ()) -> None:
    """Makes `reach` return TLS tunnels from now on.

    Args:
      folder: Holds this role's ca.crt, tls.crt and tls.key.
      in_the_clear: Addresses that are reached without TLS: a replay server's own.

    Raises:
      RoleError: The files are missing or do not match (USAGE), or have expired (REFUSED).
    """
    global _reach
    check_files(folder)
    _reach = _Reach(folder, in_the_clear)


def reach(address: str) -> str:
    """Returns the address for a Reverb client of the server at `address`. Never waits for the server; thread-safe.

    Raises:
      RoleError: The path of the tunnel's socket is too long (USAGE).
    """
    return _reach.reach(address)


def find_trouble() -> Optional[tuple[str, bool]]:
    """Returns why a peer cannot be reached through TLS, and whether certificates are the reason; None if all can."""
    return _reach.find_trouble()


def open_to_peer(address: str, folder: Path) -> Tunnel:
    """Returns a tunnel to the replay server at `address`, "host:port"; never waits for the server.

    Args:
      address: The server must show a certificate for this host.
      folder: Holds this role's ca.crt, tls.crt and tls.key.

    Raises:
      RoleError: The path of the tunnel's socket is too long (USAGE).
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    # A socket in a directory of this user: with a port, every user of this machine could use the certificate.
    directory = tempfile.mkdtemp(prefix="tls-")
    left = _LONGEST_PATH - len(directory)
    if left < 10:
        raise RoleError(f"TMPDIR: {directory} is too long for a socket's path. Set TMPDIR=/tmp.", ExitCode.USAGE)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.join(directory, address[-left:]))
    listening.listen(128)
    return Tunnel(f"to {address}", listening, relay.TO_PEER, folder, (host, int(port)))


def open_to_peers(port: int, folder: Path, reverb_port: int) -> Tunnel:
    """Returns the replay server's tunnel: it connects clients with a certificate of the CA to Reverb's port.

    Args:
      port: Port to listen on, on every interface.
      folder: Holds the replay server's ca.crt, tls.crt and tls.key.
      reverb_port: Where Reverb listens, or soon will; no other machine may reach it.

    Raises:
      RoleError: The port is taken (UNAVAILABLE).
    """
    try:
        if socket.has_dualstack_ipv6():
            listening = socket.create_server(("", port), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
        else:
            listening = socket.create_server(("", port), backlog=128)
    except OSError as error:
        raise RoleError(
            f"--port = {port}: the TLS tunnel cannot listen there: {error}. Stop what uses the port, or give another.",
            ExitCode.UNAVAILABLE,
        ) from error
    logging.info("port %d requires a certificate of the CA in %s", port, folder)
    return Tunnel(f"on port {port}", listening, relay.FROM_PEERS, folder, ("127.0.0.1", reverb_port))


def check_files(folder: Path) -> None:
    """Checks the certificate in `folder`; warns if it expires soon. Raises `RoleError`."""
    from cryptography import x509  # imported here, because only runs with TLS need it

    try:
        make_context(folder, is_server=False)
    except ValueError as error:
        raise RoleError(
            f"--tls_dir: {error}. Expected what `actorlearner certs` writes: a folder for each role, readable by the "
            "role's user.",
            ExitCode.USAGE,
        ) from error
    certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
    expires = certificate.not_valid_after_utc
    left = expires - datetime.datetime.now(datetime.timezone.utc)
    advice = "Make a new one with `actorlearner certs DIR --renew` and copy it here; no restart is needed"
    if left.total_seconds() < 0:
        raise RoleError(f"--tls_dir: {folder / CERTIFICATE} expired at {expires}. {advice}.", ExitCode.REFUSED)
    if left.days < WARN_DAYS:
        logging.warning("%s expires at %s. %s.", folder / CERTIFICATE, expires, advice)
