"""A source in an object store that fails and loses a picture while its shards are cut: counted, tried again, made good."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import command
from object_store import ObjectStore
from pictures import add_pictures
from processes import finish, kill, launch, wait_for

from data.verify import verify

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

PICTURES, PER_SHARD = 12, 3
LOST, SILENT = "011.png", "010.png"
"""Both of the last shard: one vanishes after the stage began, the other is answered with 500 each time."""


class Failing:
    """What the store refuses: the first request for each object, and every one for `SILENT`. It lets nobody read the third
    shard before `gone` is set, so that what vanishes does so in the middle of the run."""

    def __init__(self, root: Path) -> None:
        self.root, self.gone = root, threading.Event()
        self.asked: Counter[str] = Counter()
        self.finished_before: dict[str, int] = {}

    def __call__(self, method: str, path: str) -> bool:
        name = path.rpartition("/")[2]
        if method != "GET" or not name.endswith((".png", ".txt")):
            return False
        self.asked[name] += 1
        self.finished_before.setdefault(name, len(receipts(self.root)))
        if int(name[:3]) >= 2 * PER_SHARD:
            self.gone.wait(120)
        return name == SILENT or self.asked[name] == 1


def receipts(root: Path) -> list[Path]:
    return list(root.glob("store/shard/*/_meta/receipts/0*.json"))


@pytest.fixture
def source(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")  # the default is five, with longer and longer pauses
    folder = add_pictures(tmp_path / "pictures", range(PICTURES), side=64)
    fsspec.filesystem("s3").put(str(folder), f"{bucket}/set", recursive=True)
    return f"{bucket}/set"


def start(source: str, root: Path, *options: str) -> subprocess.Popen[str]:
    settings: dict[str, Any] = {"shard.samples_per_shard": PER_SHARD, "shard.image_size": 64}
    settings |= {"shard.encode_format": "png", "shard.max_failed_fraction": 0.5, "fanout.num_workers": 1}
    return launch(command("prepare", source, "--json", *options, root=root, settings=settings))


def contents(root: Path) -> dict[str, bytes]:
    """name -> bytes of the files beside the one data set's manifests."""
    (folder,) = root.glob("store/shard/*")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def stored(root: Path) -> dict[str, bytes]:
    """source id -> the picture as it is stored, of all shards."""
    found = {}
    for path in root.glob("store/shard/*/*.tar"):
        with tarfile.open(path) as tar:
            read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in read:
            if name.endswith(".json"):
                found[json.loads(read[name])["source_id"]] = read[name.replace(".json", ".png")]
    return found


def outcomes(root: Path, shard: int) -> dict[str, str]:
    (path,) = root.glob(f"store/shard/*/{shard:05d}.parquet")
    lines = pq.read_table(path).to_pylist()
    return {line["source_id"]: line["error_class"] or line["status"] for line in lines}


def test_what_a_store_refused_or_lost_is_counted_and_made_good_by_another_attempt(
    source: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    finish(start(source, tmp_path / "undisturbed"))
    root, failing = tmp_path / "root", Failing(tmp_path / "root")
    object_store.refuses = failing
    run = start(source, root)
    try:
        wait_for(lambda: receipts(root), run)
        fsspec.filesystem("s3").rm_file(f"{source}/{LOST}")
        failing.gone.set()
        finish(run)
    finally:
        failing.gone.set()
        kill(run)

    assert failing.asked[SILENT] > 2 and failing.finished_before[SILENT] > 0, (
        "it failed in mid-run, many times"
    )
    others = [f"{i:03d}{kind}" for i in range(PICTURES - 2) for kind in (".png", ".txt")]
    assert {failing.asked[name] for name in others} == {2}, "a passing fault costs one more request"
    assert outcomes(root, 3) == {"009.png": "success", SILENT: "unavailable", LOST: "missing_image"}
    whole, before = contents(tmp_path / "undisturbed"), contents(root)
    complete = [name for name in whole if not name.startswith("00003")]
    assert {name: before[name] for name in complete} == {name: whole[name] for name in complete}

    object_store.heal()
    fsspec.filesystem("s3").put_file(str(tmp_path / "pictures" / LOST), f"{source}/{LOST}")
    finish(start(source, root, "--retry-failed"))
    after = contents(root)
    assert {name: after[name] for name in before} == before, "what was there is untouched"
    assert outcomes(root, 4) == {SILENT: "success", LOST: "success"}
    assert stored(root) == stored(tmp_path / "undisturbed") and len(stored(root)) == PICTURES
    verdict = verify(str(root))
    assert verdict.ok and (verdict.attempted, verdict.written, verdict.failed) == (PICTURES, PICTURES, 0)
