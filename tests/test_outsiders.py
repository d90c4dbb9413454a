"""What somebody who reaches the port can read, spoil, stop and run: each line of the table in docs/operations.md."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading

import numpy as np
import pytest
import reverb

from actorlearner.evaluations.queue import EvaluationResult, take_evaluation_results
from actorlearner.experiment import load_experiment
from actorlearner.replay.durable_table import EXPERIENCE_TABLE
from actorlearner.replay.servers import JOINED_TABLE, MAX_SERVERS, ReplayServers
from actorlearner.roles import replay_server
from actorlearner.runtime.messages import Unreachable, read_server_info
from actorlearner.runtime.ports import find_free_ports
from actorlearner.runtime.tls.tunnel import open_to_peer, open_to_peers
from actorlearner.tools.certificates import make_certificates
from actorlearner.tools.strangers import _plausible, hostile_rows, insert
from actorlearner.variable_container import VARIABLES_TABLE

WITHOUT_TLS, WITHOUT_A_CERTIFICATE, WITH_A_STOLEN_KEY = "without TLS", "with TLS", "with a stolen actor key"
LISTED = "localhost:9"


class Outsider:
    """Somebody at the port, who may be let in, and the address of the server as its own roles see it."""

    def __init__(self, address: str, inside: str, is_let_in: bool):
        self.address, self.inside, self.is_let_in = address, inside, is_let_in

    def expect(self) -> contextlib.AbstractContextManager[object]:
        """What comes of something that only who is let in can do."""
        if self.is_let_in:
            return contextlib.nullcontext()
        return pytest.raises((Unreachable, reverb.errors.ReverbError, RuntimeError))

    def signature(self, table: str):
        return read_server_info(self.address, timeout_secs=5)[table].signature


@pytest.fixture(scope="module", params=[WITHOUT_TLS, WITHOUT_A_CERTIFICATE, WITH_A_STOLEN_KEY])
def outsider(request, tmp_path_factory):
    port, reverb_port = find_free_ports(2)
    tables = sum(replay_server._make_tables(load_experiment("dqn_cartpole"), [LISTED]), [])
    server = reverb.Server(tables, port=reverb_port)
    inside = f"localhost:{reverb_port}"
    tunnels = []
    if request.param == WITHOUT_TLS:
        yield Outsider(inside, inside, is_let_in=True)
    else:
        certs = tmp_path_factory.mktemp("certs")
        make_certificates(certs, [])
        tunnels.append(open_to_peers(port, certs / "replay-server", reverb_port))
        if request.param == WITHOUT_A_CERTIFICATE:
            yield Outsider(f"localhost:{port}", inside, is_let_in=False)
        else:
            stolen = tmp_path_factory.mktemp("stolen") / "key"
            shutil.copytree(certs / "collect-actor", stolen)
            tunnels.append(open_to_peer(f"localhost:{port}", stolen))
            yield Outsider(tunnels[-1].address, inside, is_let_in=True)
    for tunnel in tunnels:
        tunnel.close()
    server.stop()


def test_who_is_let_in_reads_all(outsider):
    """Weights and transitions may be worth more than the run."""
    with outsider.expect():
        row = _plausible(outsider.signature(VARIABLES_TABLE), 1)
        insert(outsider.inside, VARIABLES_TABLE, row)
        (sample,) = reverb.Client(outsider.address).sample(VARIABLES_TABLE, num_samples=1, emit_timesteps=False)
        assert len(sample.data) > 1


def test_who_is_let_in_spoils_by_lies_that_can_be_true_and_by_no_others(outsider):
    """A result of one's own decides which policy is handed over; a NaN of one's own ends nothing."""
    with outsider.expect():
        result = _plausible(outsider.signature(EvaluationResult.TABLE), 1)
        result = {**result, "num_episodes": np.int64(5)}
        for value in (np.nan, 500.0):
            insert(outsider.address, EvaluationResult.TABLE, {**result, "average_return": np.float64(value)})
    returns = [report.average_return for report in take_evaluation_results(outsider.inside)]
    assert returns == ([500.0] if outsider.is_let_in else [])


def test_who_is_let_in_empties_the_replay(outsider):
    """Nothing tells a client that may write from one that may not."""
    chunk = _plausible(read_server_info(outsider.inside, 5)[EXPERIENCE_TABLE].signature, 8)
    insert(outsider.inside, EXPERIENCE_TABLE, {**chunk, "length": np.int64(8)})
    with outsider.expect():
        read_server_info(outsider.address, timeout_secs=2)  # `reset` itself would ask for ever
        reverb.Client(outsider.address).reset(EXPERIENCE_TABLE)
    held = read_server_info(outsider.inside, 5)[EXPERIENCE_TABLE].current_size
    assert bool(held) is not outsider.is_let_in


def test_nobody_sends_the_roles_to_an_address_of_his_own(outsider, eventually, caplog):
    """A client of Reverb's takes a server's answer for pointers into its own memory: whoever is one may run code."""
    callers: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as mine:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    callers.append(mine.accept())

        threading.Thread(target=accept, daemon=True).start()
        port = mine.getsockname()[1]
        with outsider.expect():
            (row,) = hostile_rows(JOINED_TABLE, outsider.signature(JOINED_TABLE))
            text = f"127.0.0.1:{port},localhost:{port}".encode()
            mine_named = {"addresses": np.frombuffer(text.ljust(row["addresses"].size, b"\0"), np.uint8)}
            for lie in (row, mine_named):
                insert(outsider.address, JOINED_TABLE, lie)
        servers = ReplayServers([outsider.inside])
        heard: list[str] = []
        servers.for_each(heard.append)
        servers.watch(outsider.inside)  # has looked once when it returns
        servers.close()
    assert heard == [outsider.inside]
    assert not callers
    assert len(servers.all()) == 1 < MAX_SERVERS
    assert caplog.text.count("--may_join") == outsider.is_let_in
