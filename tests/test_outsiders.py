"""What a client at the port can read, spoil, stop and run: each line of the table in docs/operations.md."""

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
from actorlearner.replay.chunks import EXPERIENCE_TABLE
from actorlearner.replay.servers import JOINED_TABLE, MAX_SERVERS, ReplayServers
from actorlearner.roles import replay_server
from actorlearner.runtime.messages import Unreachable, read_server_info
from actorlearner.runtime.ports import find_free_ports
from actorlearner.runtime.tls.authority import make_certificates
from actorlearner.runtime.tls.tunnel import open_to_peer, open_to_peers
from actorlearner.variable_container import VARIABLES_TABLE, VERSION_TABLE, Belief, Phase, read_version
from drills.strangers import claim_the_end, hostile_rows, insert, plausible

WITHOUT_TLS, WITHOUT_A_CERTIFICATE, WITH_A_STOLEN_KEY = "without TLS", "with TLS", "with a stolen actor key"
LISTED = "localhost:9"


class Outsider:
    """Somebody at the port, who may be let in.

    `inside` is the address on the server's own machine, `of_a_role` that of a role on another machine, by way of a
    relay where there is one.
    """

    def __init__(self, address: str, inside: str, is_let_in: bool, of_a_role: str):
        self.address, self.inside, self.is_let_in, self.of_a_role = address, inside, is_let_in, of_a_role

    def expect(self) -> contextlib.AbstractContextManager[object]:
        """Checks the outcome of an action that only an admitted client can do."""
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
        yield Outsider(inside, inside, is_let_in=True, of_a_role=inside)
    else:
        certs = tmp_path_factory.mktemp("certs")
        make_certificates(certs, [])
        tunnels.append(open_to_peers(port, certs / "replay-server", reverb_port))
        tunnels.append(open_to_peer(f"localhost:{port}", certs / "learner"))
        of_a_role = tunnels[-1].address
        if request.param == WITHOUT_A_CERTIFICATE:
            yield Outsider(f"localhost:{port}", inside, is_let_in=False, of_a_role=of_a_role)
        else:
            stolen = tmp_path_factory.mktemp("stolen") / "key"
            shutil.copytree(certs / "collect-actor", stolen)
            tunnels.append(open_to_peer(f"localhost:{port}", stolen))
            yield Outsider(tunnels[-1].address, inside, is_let_in=True, of_a_role=of_a_role)
    for tunnel in tunnels:
        tunnel.close()
    server.stop()


def test_who_is_let_in_reads_all(outsider):
    """Weights and transitions may be worth more than the run."""
    with outsider.expect():
        row = plausible(outsider.signature(VARIABLES_TABLE), 1)
        insert(outsider.inside, VARIABLES_TABLE, row)
        (sample,) = reverb.Client(outsider.address).sample(VARIABLES_TABLE, num_samples=1, emit_timesteps=False)
        assert len(sample.data) > 1


def test_who_is_let_in_spoils_by_lies_that_can_be_true_and_by_no_others(outsider):
    """A result of one's own decides which policy is handed over; a NaN of one's own ends nothing."""
    with outsider.expect():
        result = plausible(outsider.signature(EvaluationResult.TABLE), 1)
        result = {**result, "num_episodes": np.int64(5)}
        for value in (np.nan, 500.0):
            insert(outsider.address, EvaluationResult.TABLE, {**result, "average_return": np.float64(value)})
    returns = [report.average_return for report in take_evaluation_results(outsider.inside)]
    assert returns == ([500.0] if outsider.is_let_in else [])


def test_who_is_let_in_empties_the_replay(outsider):
    """Nothing tells a client that may write from one that may not."""
    chunk = plausible(read_server_info(outsider.inside, 5)[EXPERIENCE_TABLE].signature, 8)
    insert(outsider.inside, EXPERIENCE_TABLE, {**chunk, "length": np.int64(8)})
    with outsider.expect():
        read_server_info(outsider.address, timeout_secs=2)  # `reset` itself would ask for ever
        reverb.Client(outsider.address).reset(EXPERIENCE_TABLE)
    held = read_server_info(outsider.inside, 5)[EXPERIENCE_TABLE].current_size
    assert bool(held) is not outsider.is_let_in


def test_who_is_let_in_fills_a_queue_of_the_roles_own(outsider):
    """Results behind a full queue wait until the learner has taken the forged ones."""
    table = read_server_info(outsider.inside, 5)[EvaluationResult.TABLE]
    with outsider.expect():
        row = plausible(outsider.signature(EvaluationResult.TABLE), 1)
        with reverb.Client(outsider.address).trajectory_writer(num_keep_alive_refs=1) as writer:
            for _ in range(table.max_size - table.current_size):
                writer.append(row)
                writer.create_item(EvaluationResult.TABLE, 1.0, {name: writer.history[name][-1] for name in row})
            writer.flush(timeout_ms=20_000)
    held = read_server_info(outsider.inside, 5)[EvaluationResult.TABLE].current_size
    assert held == (table.max_size if outsider.is_let_in else table.current_size)


def test_who_is_let_in_ends_a_run_by_announcing_the_end_again_and_again(outsider):
    """One announcement is not believed: the learner's next heartbeat contradicts it. One after each heartbeat is."""
    belief = Belief()
    believed = []
    for _ in range(2):
        with outsider.expect():
            outsider.signature(VERSION_TABLE)  # without an answer the row would wait for its time limit
            claim_the_end(outsider.address)
        version = read_version(outsider.inside)
        believed.append(version is not None and version.phase == Phase.OVER and belief.holds(version))
    assert believed == [False, outsider.is_let_in]


def test_a_flood_of_refused_connections_keeps_nobody_out_for_good(outsider):
    """With a key or without: the roles' own calls are slower beside it, and still answered within their deadline."""
    host, port = outsider.address.rsplit(":", 1)
    is_over = threading.Event()

    def flood():
        while not is_over.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(b"\x16\x03\x01 no handshake")
                connection.recv(1)

    floods = [threading.Thread(target=flood, daemon=True) for _ in range(8)]
    for thread in floods:
        thread.start()
    try:
        for _ in range(5):
            assert read_server_info(outsider.of_a_role, timeout_secs=20)
    finally:
        is_over.set()
        for thread in floods:
            thread.join(timeout=10)


def test_nobody_sends_the_roles_to_an_address_of_his_own(outsider, eventually, caplog):
    """A Reverb client uses a server's answer as pointers into its own memory, so a hostile server may run code."""
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
