"""Connections whose peer has vanished end; those of Reverb are looked after."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import reverb

import actorlearner
from actorlearner.runtime import messages
from actorlearner.runtime.sockets import notice_dead_peers, own_tcp_sockets

SOURCE_ROOT = Path(actorlearner.__file__).parent.parent

# In a network namespace of its own: reads from a peer to whom the network is cut, as if its host had lost power.
READ_FROM_VANISHED_PEER = """
import fcntl, socket, struct, sys
from actorlearner.runtime.sockets import notice_dead_peers

def set_network(is_up):
    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
        fcntl.ioctl(some, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP if is_up else 0))

set_network(True)
listening = socket.create_server(("127.0.0.1", 0))
reader = socket.create_connection(listening.getsockname(), timeout=20.0)
peer, _ = listening.accept()
if sys.argv[1] == "noticed":
    notice_dead_peers({listening.getsockname()[1]}, silent_secs=2.0)
peer.sendall(b"!")
assert reader.recv(1) == b"!"
set_network(False)
try:
    reader.recv(1)
except socket.timeout as error:  # the test's own; the kernel's has a number
    print("noticed" if error.errno else "waited on")
except OSError:
    print("noticed")
"""


def _read_from_vanished_peer(how: str) -> str:
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", READ_FROM_VANISHED_PEER, how]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def namespaces():
    try:
        subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system makes no network namespaces for this user")


def test_who_reads_from_a_host_that_vanished_gets_an_error(namespaces):
    """Nothing arrives from such a peer, not even its end: elsewhere a reader waits for ever (reverb#4, #144)."""
    assert _read_from_vanished_peer("noticed") == "noticed\n"


def test_without_notice_it_waits_on(namespaces):
    """Otherwise the test above would always hold."""
    assert _read_from_vanished_peer("unnoticed") == "waited on\n"


def test_reverbs_connections_are_looked_after_on_both_sides(serve, eventually):
    """gRPC opens its sockets by itself, at any time, and hands none of them out."""
    server = serve([reverb.Table.queue("some", 10)])
    notice_dead_peers({server.port}, silent_secs=20.0)
    client = reverb.Client(f"127.0.0.1:{server.port}")
    assert client.server_info(timeout=5)

    def keepalive_of_connections():
        found = []
        for connection in own_tcp_sockets():
            try:
                ports = {connection.getsockname()[1], connection.getpeername()[1]}
            except OSError:  # it listens, or has ended
                continue
            if server.port in ports:
                found.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        return found

    assert len(keepalive_of_connections()) >= 2
    eventually(lambda: all(keepalive_of_connections()))


def test_a_sample_that_does_not_come_is_not_waited_for(serve):
    """Reverb's samplers ask for ever; an eval actor behind a stalled wire would never look up again."""
    server = serve([reverb.Table.queue("some", 10)])
    samples = reverb.Client(f"127.0.0.1:{server.port}").sample("some", num_samples=1, emit_timesteps=False)
    with pytest.raises(messages.Unreachable, match="nothing arrived from table 'some' for 0.5 s"):
        list(messages.each_within(0.5, samples, "table 'some'"))
