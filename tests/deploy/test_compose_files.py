"""What docker/ promises, read from its files: no engine is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKER = CHECKOUT / "docker"
ROLES = ("replay-server", "learner", "collect-actor", "eval-actor")
ONE_SHOT = ("run-directory", "check", "outcome", "report")
OPERATIONS = (CHECKOUT / "docs" / "operations.md").read_text()


def services(name: str = "compose.yaml") -> dict[str, dict[str, Any]]:
    return yaml.safe_load((DOCKER / name).read_text())["services"]


SERVICES = services()


def test_the_roles_are_there():
    """The tests below look at what is there; this one at what must be."""
    assert {*ROLES, *ONE_SHOT, "tensorboard", "prometheus", "grafana", "metrics"} == set(SERVICES)
    for role in ROLES:
        assert SERVICES[role]["command"][0] == role


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_can_do_little(name):
    """An intruder must find nothing to write to, no capability and no way to gain one."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service.get("cap_add", []) == (["CHOWN"] if name == "run-directory" else [])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["user"].startswith("0:") == (name == "run-directory")
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"] and limits["pids"]


@pytest.mark.parametrize("name", sorted(set(SERVICES) - set(ONE_SHOT)))
def test_what_lasts_is_checked_and_started_again(name):
    """A role that hangs looks like a slow one from outside."""
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert re.fullmatch(r"on-failure:\$\{RESTARTS:-\d+\}", SERVICES[name]["restart"])


def test_every_role_beats_where_its_health_check_looks():
    for role in ROLES:
        assert SERVICES[role]["healthcheck"]["test"][1:] == ["actorlearner", "health", "/tmp/alive"]
        assert "--health_file=/tmp/alive" in SERVICES[role]["command"]


def test_a_final_exit_code_ends_a_role_and_reaches_the_outcome():
    """Docker would start again what can only fail again, and the training would look alive for hours."""
    (told,) = re.findall(r"cat (/run-directory/\S+)", SERVICES["outcome"]["command"][0])
    for role in ROLES:
        flags = [flag for flag in SERVICES[role]["command"] if flag.startswith("--final_code_file=")]
        assert flags == [f"--final_code_file={told if role in ROLES[:2] else '/tmp/final-exit-code'}"]
    assert f"rm -f {told}" in SERVICES["check"]["entrypoint"][2]  # the last run's says nothing about this one
    assert SERVICES["outcome"]["depends_on"] == {"learner": {"condition": "service_completed_successfully"}}
    assert SERVICES["report"]["depends_on"] == {"outcome": {"condition": "service_completed_successfully"}}


def test_reverb_is_reached_from_the_roles_alone():
    """Reverb has no authentication: a published port or a network that leads out hands the run to anybody."""
    networks = yaml.safe_load((DOCKER / "compose.yaml").read_text())["networks"]
    assert networks["roles"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "roles" in service.get("networks", [])} == set(ROLES)
    for role in ROLES:
        assert SERVICES[role]["networks"] == ["roles"]
        assert "ports" not in SERVICES[role]
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"tensorboard", "grafana"}
    for name, ports in published.items():
        assert all(port.startswith(f"${{{name.upper()}_ADDRESS:-127.0.0.1}}:") for port in ports)


def test_roles_wait_for_a_healthy_replay_server():
    for role in ROLES[1:]:
        assert SERVICES[role]["depends_on"] == {"replay-server": {"condition": "service_healthy"}}


def test_gpus_are_for_the_learner_alone():
    gpu = services("compose.gpu.yaml")
    assert set(gpu) == {"learner"}
    (device,) = gpu["learner"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "devices" not in (DOCKER / "compose.yaml").read_text()  # engines without GPUs refuse it


def test_over_tls_each_role_has_its_own_certificate_and_the_tunnel_alone_is_published():
    """With the replay server's key an actor could pass for it; Reverb's own port must not be reachable beside it."""
    tls = services("compose.tls.yaml")
    assert set(tls) == set(ROLES)
    for role, service in tls.items():
        assert service["environment"] == {"ACTORLEARNER_TLS_DIR": "/tls"}
        (volume,) = service["volumes"]
        assert re.fullmatch(rf"\$\{{TLS_DIR(:\?.*)?\}}/{role}", volume["source"])
        assert volume["target"] == f"/tls/{role}" and volume["read_only"]
        assert volume["bind"] == {"create_host_path": False}  # else a missing one would be made, empty and root's
        assert "command" not in service  # compose replaces commands as a whole: a flag of compose.yaml would be lost
    assert [role for role in tls if "ports" in tls[role]] == ["replay-server"]
    assert tls["replay-server"]["ports"] == ["${TLS_ADDRESS:-127.0.0.1}:${TLS_PORT:-8008}:8008"]
    assert "--port=8008" in SERVICES["replay-server"]["command"]


def test_every_setting_is_documented():
    """A variable that compose reads and no page names does not exist for users."""
    used = set()
    for name in ("compose.yaml", "compose.gpu.yaml", "compose.tls.yaml"):
        used |= set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", (DOCKER / name).read_text()))
    assert "EXPERIMENT" in used
    assert {name for name in used if f"`{name}`" not in OPERATIONS} == set()


def test_image_installs_what_the_lock_files_say_and_runs_as_no_root():
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert "-r requirements.lock" in dockerfile and "-r /build/requirements-gpu.lock" in dockerfile
    assert dockerfile.count("--no-deps") == 3  # of every install but the build tools': nothing is resolved anew
    last_stage = dockerfile.rpartition("FROM ")[2]
    assert "\nUSER 1000:1000\n" in last_stage
    assert '\nENTRYPOINT ["actorlearner"]\n' in last_stage
    assert "RUN" not in last_stage  # it only copies


def test_gpu_lock_is_of_the_locked_tensorflow():
    """CUDA libraries of another TensorFlow version may fail to load at any time."""
    from importlib import metadata

    asked = {
        re.sub(r"[() ]", "", requirement.partition(";")[0])
        for requirement in metadata.requires("tensorflow") or []
        if "and-cuda" in requirement
    }
    lines = (CHECKOUT / "requirements-gpu.lock").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == asked


def test_dockerignore_lets_through_what_the_image_copies():
    """A file that .dockerignore holds back ends the build far from its cause."""
    ignored = (CHECKOUT / ".dockerignore").read_text().splitlines()
    copied = {
        source
        for line in (DOCKER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied and {f"!{source}" for source in copied} <= set(ignored)


def test_the_dashboard_asks_the_data_source_that_grafana_is_given():
    grafana = DOCKER / "monitoring" / "grafana"
    sources = yaml.safe_load((grafana / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    panels = json.loads((grafana / "dashboards" / "actorlearner.json").read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"] for source in sources["datasources"]}
