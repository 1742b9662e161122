"""What all tests share: their order, their time, a command line, a finished run, a T5."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import CHECKOUT, command, environment

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: threads of two test processes would wait for each other

STARTED = time.monotonic()
MINUTES = float(os.environ.get("DARKROOM_TEST_MINUTES", "inf"))
"""After so many minutes of a run, slow tests that have not begun are skipped: a slow machine, too, ends with an answer."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, those with most of them first of all: two workers then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a slow test or a peer's when the time for such tests is used up."""
    is_slow = any(item.get_closest_marker(name) for name in ("slow", "peers"))
    if is_slow and time.monotonic() - STARTED > 60 * MINUTES:
        pytest.skip(f"the {MINUTES:g} minutes of DARKROOM_TEST_MINUTES are used up")


OURS = ("RAY_", "PREFECT_", "DARKROOM_", "DO_NOT_TRACK")


@pytest.fixture(autouse=True, scope="module")
def variables_of_the_shell() -> Iterator[None]:
    """What a command that runs in this process sets is no other file's concern: a quiet Prefect would be, or `RAY_AUTH_MODE`."""
    before = {name: value for name, value in os.environ.items() if name.startswith(OURS)}
    yield
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    os.environ.update(before)


Darkroom = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory) -> Iterator[str]:
    """The API of a Prefect server for the commands of all tests: one that a command starts itself works for ten seconds first."""
    from ray_cluster import free_port

    from flows import serving

    with serving.server(tmp_path_factory.mktemp("prefect"), free_port()) as (url, _):
        yield url


@pytest.fixture
def darkroom(request: pytest.FixtureRequest) -> Darkroom:
    """Runs `darkroom` to its end: (*arguments, root=…, settings=…) -> the finished process, with its output."""

    def run(
        *arguments: str, root: Path, settings: dict[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        line, variables = command(*arguments, root=root, settings=settings), environment()
        if arguments[0] in ("run", "prepare", "evaluate"):
            variables |= {"PREFECT_API_URL": request.getfixturevalue("prefect_api")}
        return subprocess.run(line, env=variables, cwd=CHECKOUT, capture_output=True, text=True, timeout=550)

    return run


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A finished run of untrained networks: (root, its record). Shared by every test: copy it before changing it."""
    import untrained

    root = tmp_path_factory.mktemp("untrained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return root, untrained.finish(untrained.plan_of(root))


@pytest.fixture(scope="session")
def object_store() -> Iterator[Any]:
    """An S3 server on this machine (`tests/object_store.py`)."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    from object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def bucket(object_store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, which child processes reach too."""
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("pictures")
    yield "s3://pictures"
    object_store.heal()
    filesystem.invalidate_cache()
    filesystem.rm("pictures", recursive=True)
    kind.clear_instance_cache()


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """(mount options) -> a small file system of its own; called again, it is remounted with the new ones."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        if os.path.ismount(place):
            options = f"remount,{options}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this machine may not mount a file system of its own: {done.stderr.strip()}")
        return place

    if shutil.which("mount") is None:
        pytest.skip("this machine has no mount command")
    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes with a CPU each, which misses a dead one within seconds."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
    }
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """Weights of FID's Inception, drawn at random so that no layer fades a picture out, as a file."""
    import torch

    from training.metrics.inception_network import build_inception

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    model = build_inception()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory) -> Path:
    """A random DINOv2 of one layer, 16 wide."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(image_size=28, patch_size=14, **sizes)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A random T5 encoder with a tokenizer of single letters."""
    from networks import save_t5

    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    return save_t5(tmp_path_factory.mktemp("t5"), **sizes)
