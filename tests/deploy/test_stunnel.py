"""A client that is not ours, through stunnel as docs/operations.md configures it; `tests/run.sh deploy`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import reverb

from actorlearner.runtime.messages import Unreachable, read_server_info
from actorlearner.runtime.ports import find_free_port
from actorlearner.runtime.tls.authority import make_certificates
from actorlearner.runtime.tls.tunnel import open_to_peers
from tests.deploy.infrastructure import needed_command

OPERATIONS = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()

pytestmark = pytest.mark.deploy


def test_a_stock_client_comes_through_stunnel(serve, tmp_path, eventually):
    """What the relays speak is plain TLS."""
    needed_command("stunnel", "stunnel4")
    make_certificates(tmp_path / "certs", [])
    port, local_port = find_free_port(), find_free_port()
    server = serve([reverb.Table.queue("some", 10)])
    entrance = open_to_peers(port, tmp_path / "certs" / "replay-server", server.port)
    (documented,) = re.findall(r"^\[reverb\]\n(?:\w+ = .*\n)+", OPERATIONS, re.MULTILINE)
    configuration = (
        documented.replace("127.0.0.1:8008", f"127.0.0.1:{local_port}")
        .replace("gpu1:8008", f"localhost:{port}")
        .replace("gpu1", "localhost")
        .replace("/home/me", str(tmp_path))
    )
    (tmp_path / "stunnel.conf").write_text(f"foreground = yes\npid =\n{configuration}")
    stunnel = subprocess.Popen(["stunnel", tmp_path / "stunnel.conf"])

    def answers() -> bool:
        try:
            return "some" in read_server_info(f"localhost:{local_port}", timeout_secs=2)
        except Unreachable:
            return False

    try:
        eventually(answers)
    finally:
        stunnel.kill()
        stunnel.wait()
        entrance.close()
