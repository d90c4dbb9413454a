"""A run over TLS, with two replay servers: its roles pass, others are refused and say why, it outlives certificates."""

from __future__ import annotations

import json
import signal

from actorlearner.runtime.lifecycle import ExitCode
from actorlearner.runtime.ports import find_free_ports
from actorlearner.runtime.tls.authority import make_certificates
from tests.documented_commands import documented
from tests.e2e.processes import RUN_SECS, TINY, bind

SECTION = "TLS between machines"
ROLES = {
    "replay-server": "actorlearner replay-server dqn_cartpole --tls_dir=certs --port=8008 --root_dir=runs/tls",
    "learner": "actorlearner learner dqn_cartpole --tls_dir=certs --replay_address=gpu1:8008 --root_dir=runs/tls",
    "collect-actor": (
        "actorlearner collect-actor dqn_cartpole --tls_dir=certs --replay_address=gpu1:8008 --root_dir=runs/tls"
    ),
    "eval-actor": "actorlearner eval-actor dqn_cartpole --tls_dir=certs --replay_address=gpu1:8008",
}
ENDLESS = bind(*TINY, "train.num_iterations = 1_000_000", "train.eval_interval = 200")


def test_a_run_over_tls_refuses_strangers_and_outlives_its_certificates(processes, tmp_path):
    """Reverb has no authentication, and its clients see a refusal only as a deadline that passes."""

    def run_certs(command):
        assert processes.start(*documented(SECTION, command)[1:]).wait(60) == 0

    run_certs("actorlearner certs certs --hosts gpu1 10.0.0.7")
    make_certificates(tmp_path / "other", [])
    port, second_port = find_free_ports(2)
    both = f"--replay_address=localhost:{port},localhost:{second_port}"

    def start(role, *flags):
        here = {"8008": str(port)} if role == "replay-server" else {"gpu1:8008": f"localhost:{port}"}
        return processes.start(*documented(SECTION, ROLES[role], **here)[1:], *ENDLESS, *flags)

    server = start("replay-server", both)
    second = start("replay-server", both, "--task=1", f"--port={second_port}")
    inner_port = server.await_line(r"serving replay and variables on port (\d+), to this machine only").group(1)
    assert int(inner_port) != port
    learner = start("learner", both, "--num_video_episodes=0")
    actor = start("collect-actor", both, "--task=1")  # whatever is trained on comes through the second
    evaluator = start("eval-actor")
    of_another_ca = start("collect-actor", "--peer_patience_secs=5", "--tls_dir=other")
    in_the_clear = start("eval-actor", "--peer_patience_secs=5", "--tls_dir=")

    assert of_another_ca.wait(RUN_SECS) == ExitCode.REFUSED
    told = f"localhost:{port} shows a certificate that is of another CA than {tmp_path / 'other'}/collect-actor/ca.crt"
    assert f"W the TLS tunnel to localhost:{port}: {told}" in of_another_ca.output.replace(
        of_another_ca.await_line(r"W (\S+) the TLS").group(1) + " ", ""
    )
    assert "longer than --peer_patience_secs = 5 s" in of_another_ca.stderr
    assert of_another_ca.stderr.rstrip().endswith(f"TLS: {told}.")
    assert in_the_clear.wait(RUN_SECS) == ExitCode.REFUSED
    assert f"localhost:{port} uses TLS: give --tls_dir" in in_the_clear.stderr
    server.await_line(r"W .* TLS tunnel on port \d+: (127\.0\.0\.1|::1) does not speak TLS")

    learner.await_line(r"evaluation at train step \d+", RUN_SECS)
    servers = json.loads((tmp_path / "runs" / "tls" / "status.json").read_text())["replay"]["servers"]
    assert servers.keys() == {f"localhost:{port}", f"localhost:{second_port}"}
    second.await_line(r"saved the replay under train step \d+: [1-9]\d* items", RUN_SECS)
    run_certs("actorlearner certs certs --check --within_days=30")
    run_certs("actorlearner certs certs --renew --days=365")
    for old in (actor, evaluator):
        old.send(signal.SIGKILL)
    start("collect-actor", both, "--task=1")
    start("eval-actor").await_line("TF-TRT|Gym", RUN_SECS)
    seen = learner.output.count("evaluation at train step")
    learner.await_line(r"evaluation at train step \d+", RUN_SECS, count=seen + 2)
    assert "refuse" not in learner.output
