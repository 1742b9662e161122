"""infra/compose.yaml: what an engine would refuse, what would listen to the world, what would start too early."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest

from tests.infra.conftest import INFRA, SCHEMAS, is_pinned, our_image, read_yaml

VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)(:[-?][^}]*)?\}")
SECRETS = {"POSTGRES_PASSWORD", "PREFECT_PASSWORD", "RAY_AUTH_TOKEN", "S3_SECRET_KEY", "GRAFANA_PASSWORD"}
CHECKED_BY_IMAGE = "DARKROOM_HEALTH"


def example() -> dict[str, str]:
    lines = (INFRA / "compose.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_every_field_is_one_of_the_compose_specification(name):
    schema = read_yaml(SCHEMAS / "compose.yaml")
    if name != "compose.yaml":  # an override says what differs
        del schema["$defs"]["service"]["required"]
    jsonschema.validate(read_yaml(INFRA / name), schema)


def test_a_misspelt_field_is_found():
    document = {"services": {"a": {"image": "a:1.0", "enviroment": {}}}}
    with pytest.raises(jsonschema.ValidationError, match="enviroment"):
        jsonschema.validate(document, read_yaml(SCHEMAS / "compose.yaml"))


def test_every_port_is_published_on_loopback_alone(compose):
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_the_database_is_reached_by_the_prefect_server_alone(compose):
    assert compose["networks"]["database"]["internal"] is True
    inside = {n for n, service in compose["services"].items() if "database" in service.get("networks", [])}
    assert inside == {"postgres", "prefect-server"}


def test_every_image_stays_what_it_is(compose):
    images = {service["image"] for service in compose["services"].values()}
    assert all(map(is_pinned, images)) and our_image("cpu") in images
    assert not is_pinned("postgres:17") and not is_pinned("postgres:latest") and not is_pinned("postgres")


def test_the_store_grants_a_lease_to_one_run_alone(compose):
    name, _, version = compose["services"]["s3"]["image"].partition(":")
    assert name == "chrislusf/seaweedfs"
    assert tuple(map(int, version.split("."))) > (4, 16), (
        "until then its conditional writes raced (issue 8800)"
    )


def test_a_secret_that_is_not_set_is_refused_before_anything_starts():
    used = dict(VARIABLE.findall((INFRA / "compose.yaml").read_text()))
    assert used.keys() >= SECRETS
    assert all(used[name].startswith(":?") for name in SECRETS), "`:?` refuses an empty value as well"


def test_the_example_names_every_variable_and_holds_no_secret():
    used = set(VARIABLE.findall((INFRA / "compose.yaml").read_text()))
    assert example().keys() == {name for name, _ in used}
    assert all(example()[name] == "" for name in SECRETS)
    assert "/infra/compose.env" in (INFRA.parent / ".gitignore").read_text().splitlines()


def test_no_secret_is_written_into_the_file(compose):
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|AUTH_STRING", variable):
                assert VARIABLE.search(value), f"{name}: {variable}"


def test_everything_that_serves_is_health_checked_and_waited_for_until_healthy(compose):
    services = compose["services"]
    for name, service in services.items():
        is_ours = service["image"] == our_image("cpu")
        assert ("healthcheck" in service) != is_ours, f"{name}: ours are checked by the image's own check"
        assert not is_ours or CHECKED_BY_IMAGE in service["environment"], name
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services and how["condition"] == "service_healthy", f"{name} needs {needed}"


def test_ray_asks_for_a_token_and_its_head_runs_no_tasks(compose):
    for name in ("ray-head", "ray-worker", "prefect-worker"):
        environment = compose["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" in environment
    assert "--num-cpus=0" in compose["services"]["ray-head"]["command"]


def test_our_containers_hold_no_privileges(compose):
    for service in compose["services"].values():
        if service["image"] == our_image("cpu"):
            assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]


def test_files_that_are_mounted_are_there(compose):
    mounts = [v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", [])]
    files = [mount for mount in mounts if mount.startswith("./")]
    assert files and all(Path(INFRA, file).is_file() for file in files)
    assert {mount for mount in mounts if not mount.startswith("./")} == set(compose["volumes"])
