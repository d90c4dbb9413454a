"""Which machines can reach a run on this machine."""

from __future__ import annotations

import errno
import re
import socket
import sys

import pytest

from actorlearner.runtime.ports import find_free_port
from tests.e2e.processes import FOLDER, TINY, bind


@pytest.fixture
def outer_address():
    """The address at which other machines would find this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect(("192.0.2.77", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        return probe.getsockname()[0]


def has_ipv6_loopback() -> bool:
    """Returns whether this machine has ::1; a container often has none."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(("::1", 9)) == 0  # sends nothing


def test_other_machines_cannot_reach_a_run_on_this_one(processes, outer_address):
    """Reverb has no authentication: any client at the port can empty the replay and change the weights."""
    train = processes.start(
        "train", "dqn_cartpole", "--root_dir=run", "--num_video_episodes=0",
        *bind(*TINY, "train.num_iterations = 1_000_000"),
    )  # fmt: skip
    port = int(train.await_line(r"serving replay and variables on port (\d+), to this machine only").group(1))
    # Dropped by a filter, or refused where only the privileged may set one.
    closed = pytest.raises((socket.timeout, ConnectionRefusedError))
    with socket.create_connection(("localhost", port), timeout=5.0), closed:
        socket.create_connection((outer_address, port), timeout=1.0)
    train.await_line("train step 50:")
    assert "can be reached from other machines" not in train.output


def test_a_port_that_cannot_be_closed_is_warned_of(processes, outer_address):
    """Believing it closed, people would leave the run on a network they do not trust."""
    port = find_free_port()
    server = processes.start_python(
        FOLDER / "without_socket_filters.py",
        "--nor-devices",
        *(sys.executable, "-m", "actorlearner", "replay-server", "dqn_cartpole", f"--port={port}", "--local_only"),
    )
    server.await_line(rf"serving replay and variables on port {port}$")
    warning = server.await_line(rf"W .* port {port} can be reached from other machines.*").group()
    assert f"iptables -I INPUT ! -i lo -p tcp --dport {port} -j DROP" in warning
    with socket.create_connection((outer_address, port), timeout=5.0):
        pass  # as warned


CLOSE = """
import reverb, socket, sys
from actorlearner.runtime.sockets import close_to_other_machines
server = reverb.Server([reverb.Table.queue("some", 10)])
close_to_other_machines(server.port)
for host in ("127.0.0.1", "127.0.0.2", "::1", sys.argv[1]):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as client:
        client.settimeout(2.0)
        print("answer to", host, client.connect_ex((host, server.port)), flush=True)
"""


def test_where_filters_are_for_the_privileged_the_port_is_closed_all_the_same(processes, outer_address, tmp_path):
    """In an unprivileged container some kernels refuse filters; a tunnel beside an open port protects nothing."""
    (tmp_path / "close.py").write_text(CLOSE)
    closing = processes.start_python(
        FOLDER / "without_socket_filters.py", sys.executable, tmp_path / "close.py", outer_address
    )
    assert closing.wait(120) == 0, closing.output
    assert re.findall(r"answer to (\S+) (\d+)", closing.output) == [
        ("127.0.0.1", "0"),
        ("127.0.0.2", "0"),
        ("::1", "0" if has_ipv6_loopback() else str(errno.EADDRNOTAVAIL)),
        (outer_address, str(errno.ECONNREFUSED)),
    ]
