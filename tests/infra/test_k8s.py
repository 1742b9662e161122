"""The manifests: what an API server would refuse, what would be reachable, what a spot node would take with it."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml

from stages import autoscaler
from tests.infra.conftest import INFRA, SCHEMAS, our_image, pinned, read_yaml

K8S = INFRA / "k8s"
KUSTOMIZATION = read_yaml(K8S / "kustomization.yaml")
FILES = [*KUSTOMIZATION["resources"], "rayjob.yaml"]
SCHEMA = read_yaml(SCHEMAS / "kubernetes.yaml")
MANIFESTS: list[dict[str, Any]] = [
    doc for name in FILES for doc in yaml.safe_load_all((K8S / name).read_text())
]
RAY_PORTS = {6379, 8265, 10001, 8080, 52365}
OUTSIDE: dict[str, str] = {}
"""The labels of a pod that nobody knows."""


def kind(name: str) -> list[dict[str, Any]]:
    return [manifest for manifest in MANIFESTS if manifest["kind"] == name]


def check(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError for a field that its kind does not have."""
    spec = SCHEMA["$defs"]["specs"][f"{manifest['apiVersion']} {manifest['kind']}"]
    top = {
        "$defs": SCHEMA["$defs"],
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", *(["spec"] if spec else [])],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {},
            "kind": {},
            "metadata": {"$ref": "#/$defs/metadata"},
            "spec": spec,
            "data": {"$ref": "#/$defs/map"},
            "automountServiceAccountToken": {"type": "boolean"},
        },
    }
    jsonschema.validate(manifest, top)


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template that a manifest holds."""
    found = []
    for key, value in manifest.items():
        if key in ("template", "submitterPodTemplate"):
            found.append(value)
        children = value if isinstance(value, list) else [value]
        found += [pod for child in children if isinstance(child, dict) for pod in pods(child)]
    return found


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda m: f"{m['kind']}-{m['metadata'].get('name', 'job')}"
)
def test_every_field_is_one_of_its_kind(manifest):
    check(manifest)
    assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "darkroom"


def test_a_misspelt_field_is_found():
    (cluster,) = kind("RayCluster")
    broken = {**cluster, "spec": {**cluster["spec"], "enableAutoscaling": True}}
    with pytest.raises(jsonschema.ValidationError, match="enableAutoscaling"):
        check(broken)


def test_every_file_is_applied_or_is_the_job():
    there = {path.name for path in K8S.glob("*.yaml")} - {"kustomization.yaml"}
    assert there == set(FILES)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_kubectl_puts_them_together():
    built = subprocess.run(["kubectl", "kustomize", str(K8S)], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    assert len(list(yaml.safe_load_all(built.stdout))) == len(MANIFESTS) - 1


def test_the_job_runs_a_stage_on_a_cluster_like_the_one_that_stays():
    (cluster,), (job,) = kind("RayCluster"), kind("RayJob")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["entrypoint"] == "python -m stages SPEC_URI --address auto"


def test_the_job_ends_whatever_happens():
    spec = kind("RayJob")[0]["spec"]
    assert spec["backoffLimit"] >= 1, "a lost head fails an attempt, not the stage"
    assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"] is True


def test_ray_asks_for_a_token_from_a_secret_and_is_the_pinned_version():
    spec = kind("RayCluster")[0]["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "darkroom-ray-token"}
    assert spec["rayVersion"] == pinned("ray")


def test_the_head_is_on_demand_and_works_nothing_the_gpus_are_spot_and_start_at_none():
    spec = kind("RayCluster")[0]["spec"]
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["template"]["spec"]["nodeSelector"] == {"darkroom/capacity": "on-demand"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu-spot"}
    for group in groups.values():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert group["template"]["spec"]["nodeSelector"] == {"darkroom/capacity": "spot"}
        assert "restartPolicy" not in group["template"]["spec"], (
            "autoscaler v2 replaces pods, it restarts none"
        )
    asked = {
        name: "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for name, group in groups.items()
    }
    assert asked == {"cpu": False, "gpu-spot": True}


def test_programs_are_told_what_the_autoscaler_may_start():
    (settings,) = kind("ConfigMap")
    told = json.loads(settings["data"][autoscaler.VARIABLE])
    groups = kind("RayCluster")[0]["spec"]["workerGroupSpecs"]
    assert [autoscaler.NodeGroup(**group) for group in told] == [_startable(group) for group in groups]
    for pod in (group["template"] for group in [kind("RayCluster")[0]["spec"]["headGroupSpec"], *groups]):
        sources = pod["spec"]["containers"][0]["envFrom"]
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in sources


def _startable(group: dict[str, Any]) -> autoscaler.NodeGroup:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return autoscaler.NodeGroup(
        nodes=group["maxReplicas"], cpus=int(limits["cpu"]), gpus=int(limits.get("nvidia.com/gpu", 0))
    )


def test_a_spot_node_tells_ray_before_it_goes_and_is_given_the_time():
    for group in kind("RayCluster")[0]["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        *program, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert program == ["/bin/bash", "/opt/darkroom/infra/docker/leave.sh"]
        assert (INFRA / "docker" / "leave.sh").is_file()
        assert int(seconds) < pod["terminationGracePeriodSeconds"] <= 120, "clouds give two minutes at most"


def test_every_container_is_one_of_ours_without_root_with_limits():
    containers = [c for manifest in MANIFESTS for pod in pods(manifest) for c in pod["spec"]["containers"]]
    assert len(containers) == 8
    for container in containers:
        assert container["image"] in {our_image("cpu"), our_image("cuda")}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    assert kind("Namespace")[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_secrets_are_referred_to_and_never_held():
    assert not kind("Secret")
    for manifest in MANIFESTS:
        for pod in pods(manifest):
            for container in pod["spec"]["containers"]:
                literal = {entry["name"] for entry in container.get("env", []) if "value" in entry}
                assert not any(
                    word in name for name in literal for word in ("TOKEN", "SECRET", "PASSWORD", "KEY")
                )


def allowed(source: dict[str, str], target: dict[str, str], port: int, namespace: str = "darkroom") -> bool:
    """Whether the policies let a pod labelled `source` in `namespace` reach `port` of a pod labelled `target`."""
    policies = [p["spec"] for p in kind("NetworkPolicy") if _selects(p["spec"]["podSelector"], target)]
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    return not policies or any(
        any(_is_peer(peer, source, namespace) for peer in rule["from"])
        and ("ports" not in rule or port in {entry["port"] for entry in rule["ports"]})
        for rule in rules
    )


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def _is_peer(peer: dict[str, Any], labels: dict[str, str], namespace: str) -> bool:
    if "namespaceSelector" in peer:
        name = {"kubernetes.io/metadata.name": namespace}
        return _selects(peer["namespaceSelector"], name) and _selects(peer.get("podSelector", {}), labels)
    return namespace == "darkroom" and _selects(peer["podSelector"], labels)


HEAD = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
WORKER = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
FLOWS = {"app": "prefect-worker", "darkroom/submits-jobs": "yes"}


@pytest.mark.parametrize("namespace", ["darkroom", "default", "monitoring", "kuberay-system"])
@pytest.mark.parametrize("target", [HEAD, WORKER], ids=["head", "worker"])
def test_rays_ports_are_closed_to_strangers(target, namespace):
    reached = {port for port in RAY_PORTS if allowed(OUTSIDE, target, port, namespace)}
    open_to = {"monitoring": {8080}, "kuberay-system": {8265} if target is HEAD else set()}
    assert reached == open_to.get(namespace, set())


def test_rays_nodes_reach_each_other_and_those_who_submit_reach_the_heads_job_port_alone():
    assert all(allowed(a, b, port) for a in (HEAD, WORKER) for b in (HEAD, WORKER) for port in RAY_PORTS)
    assert {port for port in RAY_PORTS if allowed(FLOWS, HEAD, port)} == {8265}
    assert not any(allowed(FLOWS, WORKER, port) for port in RAY_PORTS)
    labels = [
        pod["metadata"]["labels"]
        for m in kind("Deployment") + kind("RayJob")
        for pod in pods(m)
        if "labels" in pod.get("metadata", {})
    ]
    assert len(labels) == 2 and all("darkroom/submits-jobs" in each for each in labels)
