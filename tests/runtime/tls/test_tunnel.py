"""TLS tunnels with real relays, certificates and sockets; an echo stands at the end where Reverb would."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from actorlearner.runtime.lifecycle import ExitCode, RoleError
from actorlearner.runtime.ports import find_free_port
from actorlearner.runtime.tls import tunnel as tls_tunnel
from actorlearner.runtime.tls.authority import make_certificates
from actorlearner.runtime.tls.certificates import CA, CERTIFICATE, KEY, speaks_tls
from actorlearner.runtime.tls.relay import OWN_LOOPBACK_ADDRESS
from actorlearner.runtime.tls.tunnel import Tunnel, open_to_peer, open_to_peers

SOURCE_ROOT = Path(__file__).resolve().parents[3] / "distributed"


@pytest.fixture(scope="module")
def certs(tmp_path_factory) -> Path:
    """Certificates of one CA."""
    folder = tmp_path_factory.mktemp("certs")
    make_certificates(folder / "ours", [])
    return folder / "ours"


class Echo:
    """Sends back what it gets; knows who called."""

    def __init__(self):
        self.callers: list[str] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, (host, _) = self._listening.accept()
            except OSError:
                return
            self.callers.append(host)
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection, contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def close(self):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@pytest.fixture
def echo():
    echo = Echo()
    yield echo
    echo.close()


class Ends:
    """Both ends of tunnels to the echo; all are closed after the test."""

    def __init__(self, echo: Echo, certs: Path):
        self.port = find_free_port()
        self._echo = echo
        self._certs = certs
        self._tunnels: list[Tunnel] = []

    def _keep(self, tunnel: Tunnel) -> Tunnel:
        self._tunnels.append(tunnel)
        return tunnel

    def open_to_peers(self, certs: Path | None = None) -> Tunnel:
        return self._keep(open_to_peers(self.port, certs or self._certs / "replay-server", self._echo.port))

    def open_to_peer(self, certs: Path | None = None, host: str = "localhost") -> Tunnel:
        return self._keep(open_to_peer(f"{host}:{self.port}", certs or self._certs / "collect-actor"))

    def close(self):
        for tunnel in self._tunnels:
            tunnel.close()


@pytest.fixture
def ends(echo, certs):
    ends = Ends(echo, certs)
    yield ends
    ends.close()


def call(tunnel: Tunnel, data: bytes = b"hello", stall_secs: float = 0.0) -> bytes:
    """Sends `data` through a role's end as Reverb's client would, and returns what comes back; empty if refused.

    With `stall_secs` it begins to read only then, when everything on the way has filled up.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(tunnel.address.removeprefix("unix:"))
        sender = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
        sender.start()
        sender.join(stall_secs)
        received = bytearray()
        while len(received) < len(data):
            try:
                more = connection.recv(1 << 16)
            except ConnectionResetError:
                more = b""
            if not more:
                break
            received += more
        return bytes(received)


def test_bytes_come_through_whole_in_both_directions_at_once(ends):
    """A byte lost, doubled or out of order corrupts a run, and nobody would look here."""
    ends.open_to_peers()
    tunnel = ends.open_to_peer()
    assert call(tunnel) == b"hello"
    data = os.urandom(20_000_001)
    received: list[bytes] = []
    callers = [threading.Thread(target=lambda: received.append(call(tunnel, data, 0.5))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert [len(answer) for answer in received] == [len(data)] * 3
    assert all(answer == data for answer in received)
    assert tunnel.trouble is None


@pytest.fixture(scope="module")
def odd_certs(certs, tmp_path_factory) -> dict[str, Path]:
    """Certificates of another CA, and expired ones of ours."""
    other, expired = (tmp_path_factory.mktemp("odd") / name for name in ("other", "expired"))
    make_certificates(other, [])
    shutil.copytree(certs, expired)
    make_certificates(expired, [], days=-1, renew=True)
    return {"ours": certs, "other": other, "expired": expired}


OTHER_CA, EXPIRED, OTHER_ROLE = "is of another CA", "has expired", "is made for another role"


@pytest.mark.parametrize(
    ("client", "server", "host", "trouble"),
    [
        ("other/learner", "ours/replay-server", "localhost", f"localhost:.* refuses .*/tls.crt: it {OTHER_CA}"),
        ("expired/learner", "ours/replay-server", "localhost", f"localhost:.* refuses .*/tls.crt: it {EXPIRED}"),
        ("ours/learner", "other/replay-server", "localhost", f"shows a certificate that {OTHER_CA} than .*/ca.crt"),
        ("ours/learner", "expired/replay-server", "localhost", f"shows a certificate that {EXPIRED}"),
        ("ours/learner", "ours/collect-actor", "localhost", f"shows a certificate that {OTHER_ROLE}"),
        ("ours/learner", "ours/replay-server", "127.0.0.5", "shows a certificate that does not name it"),
    ],
)
def test_who_is_refused_is_told_which_certificate_and_why(
    ends, certs, odd_certs, tmp_path, eventually, client, server, host, trouble
):
    """To Reverb's clients a refusal is a deadline that passes."""

    def show(end: str, name: str) -> Path:
        """Returns a folder that trusts our CA, and shows something odd."""
        kind, _, role = name.partition("/")
        shutil.copytree(odd_certs[kind] / role, tmp_path / end)
        shutil.copy(certs / CA, tmp_path / end)
        return tmp_path / end

    ends.open_to_peers(show("server", server))
    tunnel = ends.open_to_peer(show("client", client), host)
    assert call(tunnel) == b""
    eventually(lambda: tunnel.trouble)
    assert re.search(trouble, tunnel.trouble), tunnel.trouble
    assert tunnel.is_refused


def shake_hands(port: int, context: ssl.SSLContext) -> str:
    """Returns what a client that is not ours hears when it says something."""
    with socket.create_connection(("localhost", port), timeout=20) as connection:
        try:
            with context.wrap_socket(connection, server_hostname="localhost") as secure:
                secure.sendall(b"hello")
                return secure.recv(5).decode() or "nothing"
        except ssl.SSLError as error:
            return error.reason or str(error)
        except OSError as error:
            return repr(error)


def test_a_stranger_without_a_certificate_gets_nothing(ends, echo, certs, eventually):
    """Whoever reaches the port could read, fill and empty the replay."""
    entrance = ends.open_to_peers()
    stranger = ssl.create_default_context(cafile=certs / CA)
    assert "CERTIFICATE_REQUIRED" in shake_hands(ends.port, stranger)
    eventually(lambda: entrance.trouble)
    assert re.search(r"(127\.0\.0\.1|::1) shows no certificate", entrance.trouble)

    friend = ssl.create_default_context(cafile=certs / CA)
    friend.load_cert_chain(certs / "learner" / CERTIFICATE, certs / "learner" / KEY)
    assert shake_hands(ends.port, friend) == "hello"
    friend.maximum_version = ssl.TLSVersion.TLSv1_2
    assert "PROTOCOL_VERSION" in shake_hands(ends.port, friend)

    in_the_clear = socket.create_connection(("localhost", ends.port), timeout=20)
    with in_the_clear:
        in_the_clear.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # as gRPC begins
        assert b"hello" not in in_the_clear.recv(100)
    eventually(lambda: "does not speak TLS" in entrance.trouble)
    assert len(echo.callers) == 1


def test_a_server_in_the_clear_and_one_that_is_away_are_told_apart(ends, echo, certs, eventually):
    """One is mended by --tls_dir at the other end, the other by waiting."""
    tunnel = ends.open_to_peer()
    assert call(tunnel) == b""
    eventually(lambda: tunnel.trouble)
    assert "Connection refused" in tunnel.trouble and not tunnel.is_refused
    ends.port = echo.port
    tunnel = ends.open_to_peer()
    assert call(tunnel) == b""
    eventually(lambda: tunnel.trouble)
    assert "does not speak TLS 1.3" in tunnel.trouble and tunnel.is_refused
    assert not speaks_tls("localhost", echo.port)


def test_a_role_that_forgot_its_flag_can_find_out_that_its_peer_speaks_tls(ends):
    ends.open_to_peers()
    assert speaks_tls("localhost", ends.port)
    assert not speaks_tls("localhost", find_free_port())


def test_new_certificates_are_in_force_without_a_restart(ends, odd_certs, tmp_path, eventually):
    """A run of weeks outlives its certificates."""
    folder = tmp_path / "certs"
    shutil.copytree(odd_certs["expired"], folder)
    ends.open_to_peers(folder / "replay-server")
    tunnel = ends.open_to_peer(folder / "collect-actor")
    assert call(tunnel) == b""
    make_certificates(folder, [], renew=True)
    assert call(tunnel) == b"hello"
    eventually(lambda: tunnel.trouble is None)


def test_reverb_takes_no_relay_for_its_own_process(ends, echo):
    """To 127.0.0.1 and its own process id Reverb hands over pointers; in two containers both can be process 7."""
    ends.open_to_peers()
    assert call(ends.open_to_peer()) == b"hello"
    assert echo.callers == [OWN_LOOPBACK_ADDRESS] != ["127.0.0.1"]


def test_an_address_is_reached_as_it_is_until_certificates_are_used(certs, monkeypatch, eventually):
    """A replay server that looks at its own tables must not go through TLS to them."""
    monkeypatch.setattr(tls_tunnel, "_reach", tls_tunnel._Reach())
    assert tls_tunnel.reach("localhost:1") == "localhost:1"
    tls_tunnel.use_certificates(certs / "learner", in_the_clear=["localhost:2"])
    address = tls_tunnel.reach("localhost:1")
    assert address.startswith("unix:/") and address.endswith("/localhost:1")
    assert tls_tunnel.reach("localhost:1") == address  # one relay for all clients
    assert tls_tunnel.reach("localhost:2") == "localhost:2"
    assert tls_tunnel.find_trouble() is None
    (tunnel,) = tls_tunnel._reach._tunnels.values()
    try:
        assert call(tunnel) == b""
        eventually(lambda: tls_tunnel.find_trouble())
        trouble = tls_tunnel.find_trouble()
        assert "Connection refused" in trouble[0] and trouble[1] is False
    finally:
        tunnel.close()


def test_a_relay_that_dies_is_started_again(ends, eventually):
    ends.open_to_peers()
    tunnel = ends.open_to_peer()
    assert call(tunnel) == b"hello"
    relay = tunnel._relay
    relay.kill()
    eventually(lambda: relay.poll() is not None)
    assert call(tunnel) == b"hello"  # the socket is the role's own: the call waits for the next relay


def test_nobody_else_on_this_machine_can_use_a_roles_certificate(ends):
    """With a port anybody here could, certificate or not."""
    path = Path(ends.open_to_peer().address.removeprefix("unix:"))
    assert path.is_socket()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


ROLE = """
import sys, time
from actorlearner.runtime.tls.relay import OWN_LOOPBACK_ADDRESS
from actorlearner.runtime.tls.tunnel import open_to_peer
from pathlib import Path
print(open_to_peer("localhost:1", Path(sys.argv[1]))._relay.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_relay_ends_with_its_role_and_not_before(certs, eventually, first):
    """A scheduler's SIGTERM goes to all processes of a job, but the role has yet to save. kill -9 leaves none."""
    role = subprocess.Popen(
        [sys.executable, "-c", ROLE, str(certs / "learner")],
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        relay = Path("/proc") / role.stdout.readline().strip()
        eventually(lambda: _ignores(relay, first))
        os.kill(int(relay.name), first)
        assert (relay / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    finally:
        role.kill()
        role.wait()
    eventually(lambda: not relay.exists() or (relay / "stat").read_text().rpartition(")")[2].split()[0] == "Z")


def _ignores(process: Path, number: signal.Signals) -> bool:
    mask = int(re.search(r"SigIgn:\s*(\w+)", (process / "status").read_text()).group(1), 16)
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda at: (at / KEY).unlink(), ExitCode.USAGE, "tls.key: No such file or directory"),
        (lambda at: (at / CERTIFICATE).write_text("?"), ExitCode.USAGE, "do not match, or are damaged"),
        (lambda at: shutil.copy(at.parent / "learner" / KEY, at), ExitCode.USAGE, "do not match"),
        (lambda at: make_certificates(at.parent, [], days=-1, renew=True), ExitCode.REFUSED, "tls.crt expired at"),
    ],
)
def test_a_role_whose_own_certificate_cannot_work_ends_before_it_begins(certs, tmp_path, spoil, code, message):
    shutil.copytree(certs, tmp_path / "certs")
    folder = tmp_path / "certs" / "eval-actor"
    spoil(folder)
    with pytest.raises(RoleError, match=message) as raised:
        tls_tunnel.use_certificates(folder)
    assert raised.value.exit_code == code


def test_a_certificate_that_expires_soon_is_warned_of(certs, tmp_path, caplog):
    shutil.copytree(certs, tmp_path / "certs")
    tls_tunnel.check_files(tmp_path / "certs" / "learner")
    assert caplog.text == ""
    make_certificates(tmp_path / "certs", [], days=5, renew=True)
    tls_tunnel.check_files(tmp_path / "certs" / "learner")
    assert "tls.crt expires at" in caplog.text and "actorlearner certs DIR --renew" in caplog.text
