"""launch/kubernetes: what it promises, read from its files; kubectl or kustomize renders them, if one is here."""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from actorlearner import cli

KUBERNETES = Path(__file__).resolve().parents[2] / "launch" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
ROLES = ("replay-server", "learner", "collect-actor", "eval-actor")
COMPONENT = "app.kubernetes.io/component"
VERSIONS = ("1.29", "1.32")  # of the schemas: the oldest that we look at, and one that is in wide use


@functools.cache
def render(overlay: str) -> list[dict[str, Any]]:
    """Returns the objects of an overlay as a cluster would get them; skips the test where nothing can render."""
    program = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if not shutil.which(program[0]):
        pytest.skip("neither kustomize nor kubectl is here")
    rendered = subprocess.run(
        [*program, KUBERNETES / "overlays" / overlay], capture_output=True, text=True, check=True, timeout=60
    )
    return list(yaml.safe_load_all(rendered.stdout))


def read_base() -> Iterator[dict[str, Any]]:
    for path in sorted((KUBERNETES / "base").glob("*.yaml")):
        if path.name != "kustomization.yaml":
            yield from yaml.safe_load_all(path.read_text())


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the pod of each role, by the role's name."""
    workloads = [thing for thing in objects if thing["kind"] in ("StatefulSet", "Job", "Deployment")]
    return {thing["metadata"]["name"]: thing["spec"]["template"] for thing in workloads}


BASE = list(read_base())
PODS = pods(BASE)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("thing", BASE, ids=lambda thing: f"{thing['kind']}-{thing['metadata']['name']}")
def test_every_object_fits_kubernetes_schemas_strictly(thing: dict[str, Any], version: str):
    """The cluster silently ignores a misspelt field."""
    kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_renders_and_fits_the_schemas_strictly(overlay: str):
    """A patch that fits nothing, or the wrong thing, shows only in what is rendered."""
    objects = render(overlay)
    for thing in objects:
        kubernetes_validate.validate(thing, VERSIONS[-1], strict=True)
        assert thing["metadata"]["namespace"] == "actorlearner"
    assert set(pods(objects)) == set(ROLES)
    for role, pod in pods(objects).items():
        (container,) = pod["spec"]["containers"]
        assert container["image"] == f"actorlearner:{'gpu' if overlay.startswith('gpu') else 'cpu'}"
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == ("1" if overlay.startswith("gpu") and role == "learner" else None)


@pytest.mark.parametrize(("overlay", "without"), [("tls", "cpu"), ("gpu-tls", "gpu")])
def test_over_tls_each_pod_has_its_own_roles_certificate_and_no_other(overlay: str, without: str):
    """With the replay server's key an actor could pass for it."""
    objects = render(overlay)
    (settings,) = [thing for thing in objects if thing["kind"] == "ConfigMap"]
    assert settings["data"]["ACTORLEARNER_TLS_DIR"] == "/tls"
    for role, pod in pods(objects).items():
        (volume,) = [volume for volume in pod["spec"]["volumes"] if "secret" in volume]
        assert volume["secret"] == {"secretName": f"tls-{role}", "defaultMode": 0o440}
        (container,) = pod["spec"]["containers"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
        assert mount == {"name": volume["name"], "mountPath": f"/tls/{role}", "readOnly": True}
        assert {"configMapRef": {"name": "settings"}} in container["envFrom"]
    in_the_clear = render(without)
    assert "tls" not in str(in_the_clear).lower()
    policies = [thing for thing in objects if thing["kind"] == "NetworkPolicy"]
    assert policies and all(policy in in_the_clear for policy in policies)


def test_a_validator_that_finds_nothing_would_not_help():
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**BASE[0], "spce": {}}, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_can_do_little(role: str):
    """What Kubernetes calls the restricted pod security standard, and a read-only root file system beside it."""
    spec = PODS[role]["spec"]
    (container,) = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_starts_its_role_with_flags_that_exist(role: str):
    """A flag that was renamed would be found by the cluster, as a pod that crashes in a loop."""
    (container,) = PODS[role]["spec"]["containers"]
    settings = {"EXPERIMENT": "dqn_cartpole", "GIN_BINDINGS": "", "SEED": "0"}
    arguments = list(container["args"])
    for name, value in settings.items():
        arguments = [argument.replace(f"$({name})", value) for argument in arguments]
    assert not [argument for argument in arguments if "$(" in argument]
    parsed = cli.make_parser().parse_args(arguments)
    assert parsed.command == role
    for probe in ("startupProbe", "livenessProbe"):
        health = container[probe]["exec"]["command"]
        assert cli.make_parser().parse_args(health[1:]).file == parsed.health_file
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(parsed.health_file.parent) in writable
    if role in ("replay-server", "learner"):
        assert str(parsed.root_dir) in writable  # a volume: what is saved outlives the pod


def test_collect_actors_number_themselves_differently(tmp_path: Path):
    """With the same number they would have the same seeds, and collect the same episodes."""
    (container,) = PODS["collect-actor"]["spec"]["containers"]
    (tmp_path / "actorlearner").write_text('#!/bin/sh\nfor last; do :; done\necho "$last"\n')
    (tmp_path / "actorlearner").chmod(0o755)
    numbers = []
    for uid in ("0a1b2c3d-0000-4000-8000-000000000000", "fffffffd-0000-4000-8000-000000000000"):
        said = subprocess.run(
            [*container["command"], "collect-actor", "dqn_cartpole"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "POD_UID": uid},
            capture_output=True,
            text=True,
            check=True,
        )
        numbers.append(said.stdout.strip())
    assert numbers == [f"--task={0x0A1B2C3}", f"--task={0xFFFFFFF}"], shlex.join(container["command"])


def test_only_the_roles_reach_the_replay_server():
    """Reverb has no authentication: any client that reaches its port can write into the replay, or reset it."""
    policies = {thing["metadata"]["name"]: thing["spec"] for thing in BASE if thing["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (ingress,) = policies["replay-server"]["ingress"]
    (source,) = ingress["from"]
    (expression,) = source["podSelector"]["matchExpressions"]
    assert set(source) == {"podSelector"}  # of this namespace only
    assert expression == {"key": COMPONENT, "operator": "In", "values": ["learner", "collect-actor", "eval-actor"]}
    assert [rule for name in policies if name != "replay-server" for rule in policies[name].get("ingress", [])] == []
    assert {pod["metadata"]["labels"][COMPONENT] for pod in PODS.values()} == set(ROLES)


def test_the_job_gives_up_on_exactly_the_codes_that_starting_again_cannot_help():
    from actorlearner.runtime.lifecycle import ExitCode

    job = next(thing for thing in BASE if thing["kind"] == "Job")
    (rule,) = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    final = {ExitCode.USAGE, ExitCode.DATA, ExitCode.CANNOT_CREATE, ExitCode.OCCUPIED}
    assert set(rule["onExitCodes"]["values"]) == final
