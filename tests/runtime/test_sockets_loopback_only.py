"""A closed port is one that others run into a deadline at, and this machine does not."""

from __future__ import annotations

import socket

import pytest
import reverb

from actorlearner.runtime import messages
from actorlearner.runtime.sockets import close_to_other_machines

SOMEWHERE_ELSE = {socket.AF_INET: "192.0.2.77", socket.AF_INET6: "2001:db8::77"}  # nobody has these addresses


@pytest.fixture(params=list(SOMEWHERE_ELSE), ids=["IPv4", "IPv6"])
def outer_address(request):
    """The address at which other machines would find this one."""
    with socket.socket(request.param, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((SOMEWHERE_ELSE[request.param], 9))
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        return probe.getsockname()[0]


def _answers(host, port):
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _serve_queue(serve):
    return serve([reverb.Table.queue("some", 10)])


def test_a_closed_port_answers_this_machine_alone(serve, outer_address):
    """Reverb has no authentication: any client at the port can empty the replay and change the weights."""
    server = _serve_queue(serve)
    assert _answers(outer_address, server.port)
    close_to_other_machines(server.port)
    assert not _answers(outer_address, server.port)
    assert _answers("127.0.0.1", server.port)
    assert _answers("::1", server.port)
    assert "some" in messages.read_server_info(f"localhost:{server.port}", timeout_secs=5)


def test_who_was_connected_from_elsewhere_is_cut_off(serve, outer_address):
    """A filter on the listening socket does not reach the connections that it accepted before."""
    server = _serve_queue(serve)
    with socket.create_connection((outer_address, server.port), timeout=5.0) as early:
        assert early.recv(1 << 12)  # the server's greeting: it has accepted
        close_to_other_machines(server.port)
        while early.recv(1 << 12):  # blocks at most its time-out
            pass


def test_who_was_connected_from_this_machine_stays(serve):
    server = _serve_queue(serve)
    with socket.create_connection(("localhost", server.port), timeout=5.0) as early:
        early.recv(1 << 12)
        close_to_other_machines(server.port)
        early.settimeout(0.2)
        with pytest.raises(socket.timeout):
            early.recv(1 << 12)


def test_a_port_of_another_process_is_not_said_to_be_closed(serve):
    """A port that is believed closed is worse than an open one."""
    with pytest.raises(OSError, match="no socket of this process that listens on port 1 "):
        close_to_other_machines(1)
