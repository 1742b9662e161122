"""The cache of remote shards: within its size, never half of a file, the same for one process and for several.

Run as a program, this file is one process that fetches: `test_shard_cache.py FOLDER LIMIT SOURCE RECORDS_JSON`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data import columns, storage
from data.errors import CorruptArtifact, UserError
from data.loader import ColumnSet, batches
from data.manifest import FileRecord, ShardRecord, Snapshot
from data.order import SampleOrder
from data.shard_cache import Fetcher, ShardCache

CHECKOUT = Path(__file__).parents[2]
SIZE = 1000


@pytest.fixture
def source() -> Iterator[str]:
    """An empty remote artifact."""
    yield "memory://shard-cache/embed"
    storage.remove_tree("memory://shard-cache")


def _put(source: str, names: str, size: int = SIZE) -> list[FileRecord]:
    return [columns.publish(source, f"x/{n}.npy", n.encode() * size) for n in names]


def _kept(folder: Path) -> set[str]:
    return {path.read_text()[0] for path in folder.glob("*/x/*.npy") if not path.parts[-3].startswith(".")}


def _open(cache: ShardCache, source: str, record: FileRecord) -> bytes:
    with cache.entry(source, [record]) as folder:
        return Path(folder, record.path).read_bytes()


def test_what_is_kept_is_not_fetched_again(source: str, tmp_path: Path) -> None:
    cache, (record,) = ShardCache(tmp_path, 10 * SIZE), _put(source, "a")
    assert _open(cache, source, record) == b"a" * SIZE
    storage.remove(storage.join(source, record.path))
    assert _open(ShardCache(tmp_path, 10 * SIZE), source, record) == b"a" * SIZE
    with pytest.raises(FileNotFoundError):
        _open(ShardCache(tmp_path / "other", 10 * SIZE), source, record)


def test_the_least_recently_opened_make_room(source: str, tmp_path: Path) -> None:
    cache, records = ShardCache(tmp_path, 3 * SIZE), _put(source, "abcd")
    for record in records[:3]:
        _open(cache, source, record)
    _open(cache, source, records[0])
    with cache.entry(source, [records[2]]) as folder:
        mapped = np.memmap(Path(folder, records[2].path), mode="r")
    _open(cache, source, records[3])
    assert _kept(tmp_path) == {"a", "c", "d"}
    _open(cache, source, records[1])
    _open(cache, source, records[0])
    assert _kept(tmp_path) == {"b", "d", "a"}
    assert bytes(mapped) == b"c" * SIZE, "what is open stays readable"


def test_what_is_not_on_record_is_refused_and_not_kept(source: str, tmp_path: Path) -> None:
    (record,) = _put(source, "a")
    storage.write_bytes(storage.join(source, record.path), b"b" * SIZE)
    with pytest.raises(
        CorruptArtifact, match=r"x/a.npy has 1000 bytes of SHA-256 .* on record .* `darkroom verify`"
    ):
        _open(ShardCache(tmp_path, 10 * SIZE), source, record)
    assert _kept(tmp_path) == set()
    storage.write_bytes(storage.join(source, record.path), b"a" * SIZE)
    assert _open(ShardCache(tmp_path, 10 * SIZE), source, record) == b"a" * SIZE


def test_a_file_that_was_cut_in_the_cache_is_fetched_again(source: str, tmp_path: Path) -> None:
    cache, (record,) = ShardCache(tmp_path, 10 * SIZE), _put(source, "a")
    with cache.entry(source, [record]) as folder:
        Path(folder, record.path).write_bytes(b"a")
    assert _open(cache, source, record) == b"a" * SIZE


def test_what_killed_processes_left_is_replaced_or_removed(source: str, tmp_path: Path) -> None:
    cache, (a, b) = ShardCache(tmp_path, 10 * SIZE), _put(source, "ab")
    with cache.entry(source, [a]) as folder:
        entry = Path(folder)
    entry.rename(entry.with_name(f".draft-{entry.name}"))
    (tmp_path / ".draft-0000").mkdir()
    (tmp_path / ".draft-0000" / "half").write_bytes(b"x")
    assert _open(cache, source, b) == b"b" * SIZE
    assert list(tmp_path.glob(".draft-*")) == [] and _kept(tmp_path) == {"b"}
    assert _open(cache, source, a) == b"a" * SIZE


def test_a_path_on_record_does_not_leave_the_cache(source: str, tmp_path: Path) -> None:
    record = _put(source, "a")[0].model_copy(update={"path": "../a.npy"})
    with pytest.raises(ValueError, match="leaves"):
        _open(ShardCache(tmp_path / "cache", 10 * SIZE), source, record)


def test_the_environment_names_folder_and_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path))
    monkeypatch.setenv("DARKROOM_CACHE_GB", "1.5")
    assert ShardCache.of_environment() == ShardCache(tmp_path, 1_500_000_000)
    monkeypatch.setenv("DARKROOM_CACHE_GB", "much")
    with pytest.raises(UserError, match="DARKROOM_CACHE_GB='much' is not a number of gigabytes"):
        ShardCache.of_environment()


def test_fetching_ahead_works_through_the_newest_list_and_outlives_failures() -> None:
    fetched, release = list[int](), threading.Event()

    def fetch(item: int) -> None:
        release.wait(10)
        if item % 2:
            raise OSError("gone")
        fetched.append(item)

    fetcher = Fetcher(fetch, threads=2)
    fetcher.want(range(100, 200))
    while fetcher._wanted[0] < 102:
        time.sleep(0.01)
    fetcher.want(range(10))
    release.set()
    deadline = time.monotonic() + 10
    while fetcher._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(fetched) == [0, 2, 4, 6, 8, 100]


def _dataset(folder: str, shards: int = 12, rows: int = 20) -> Snapshot:
    """img_emb of sample i is (i, i, i); its text_hidden are 1 to 3 tokens that are all i."""
    records = []
    for shard in range(shards):
        samples = np.arange(shard * rows, (shard + 1) * rows, dtype=np.float32)
        hidden = [np.full((1 + int(i) % 3, 2), i, np.float32) for i in samples]
        files = (
            columns.write_array(folder, "img_emb", shard, np.repeat(samples[:, None], 3, axis=1)),
            *columns.write_ragged(folder, "text_hidden", shard, hidden),
        )
        records.append(ShardRecord(index=shard, samples=rows, keys=str(shard), files=files))
    columns.publish(folder, "empty/text_hidden.npy", columns._npy(np.full((2, 2), 0.5, np.float16)))
    names = ("img_emb", "text_hidden")
    return Snapshot(
        stage="embed",
        version=1,
        fingerprint="e",
        config={},
        columns=names,
        shards=tuple(records),
        folder=folder,
    )


NAMES = ("img_emb", "text_hidden")


def _stream(columns: ColumnSet, steps: int) -> list[tuple[list[float], list[int]]]:
    stream = batches(columns, NAMES, seed=2, batch_size=10)
    batch_list = [next(stream) for _ in range(steps)]
    return [(b["img_emb"].sum(1).tolist(), b["text_length"].tolist()) for b in batch_list]


def _fetched_bytes(snapshot: Snapshot) -> int:
    return sum(file.bytes for shard in snapshot.shards for file in shard.files)


def test_remote_columns_give_the_batches_of_local_ones_within_the_size(source: str, tmp_path: Path) -> None:
    local = ColumnSet([_dataset(str(tmp_path / "local"))])
    remote = _dataset(source)
    cache = ShardCache(tmp_path / "cache", _fetched_bytes(remote))
    assert _stream(ColumnSet([remote], cache), 30) == _stream(local, 30)
    small = ShardCache(tmp_path / "small", _fetched_bytes(remote) - 1)
    needed = rf"reads 12 shards of img_emb, text_hidden at a time, .* GB, and the shard cache .*set {'DARKROOM_CACHE_GB'} to"
    with pytest.raises(UserError, match=needed):
        _stream(ColumnSet([remote], small), 1)


def test_shards_that_come_next_are_there_before_they_are_needed(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SampleOrder.__init__, "__defaults__", (20, 60))  # windows of three shards
    remote, cache = _dataset(source), ShardCache(tmp_path, 10**9)
    opened = ColumnSet([remote], cache)
    order = SampleOrder(opened.counts, 2)
    assert order.windows == 4
    opened.fetch_ahead(NAMES, order, 0)
    deadline = time.monotonic() + 20
    while opened._open._fetcher._running and time.monotonic() < deadline:
        time.sleep(0.01)
    here, following = order.near(0)
    assert len(list(tmp_path.glob("[!.]*"))) == 2 * len({*here, *following}) == 12
    fsspec.filesystem("memory").rm("/shard-cache/embed/img_emb", recursive=True)
    assert len(opened.rows("img_emb", order(np.arange(120)))) == 120, "nothing more is asked of the store"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket of a real S3 server."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").makedirs("columns", exist_ok=True)
    yield "s3://columns"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def _process(folder: Path, limit: int, source: str, records: list[FileRecord]) -> subprocess.Popen[bytes]:
    shown = json.dumps([record.model_dump() for record in records])
    line = [sys.executable, __file__, str(folder), str(limit), source, shown]
    return subprocess.Popen(line, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})


@pytest.mark.slow
def test_processes_share_a_cache_and_a_kill_leaves_nothing_half(bucket: str, tmp_path: Path) -> None:
    large = 30 << 20
    records = _put(f"{bucket}/embed", "abc", large)
    killed = _process(tmp_path, 10 * large, f"{bucket}/embed", records)
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size for f in tmp_path.glob(".draft-*/x/*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    for path in tmp_path.glob("[!.]*/x/*"):
        assert storage.sha256(str(path))[1] in {record.sha256 for record in records}
    assert list(tmp_path.glob(".draft-*")), "killed in the middle"
    together = [_process(tmp_path, 2 * large, f"{bucket}/embed", records) for _ in range(2)]
    assert [process.wait(300) for process in together] == [0, 0]
    assert list(tmp_path.glob(".draft-*")) == []
    assert sum(f.stat().st_size for f in tmp_path.glob("[!.]*/x/*")) <= 3 * large


@pytest.mark.slow
def test_a_stream_from_a_bucket_is_that_from_a_disk(bucket: str, tmp_path: Path) -> None:
    local, remote = _dataset(str(tmp_path / "local")), _dataset(f"{bucket}/embed")
    cache = ShardCache(tmp_path / "cache", _fetched_bytes(remote))
    assert _stream(ColumnSet([remote], cache), 30) == _stream(ColumnSet([local]), 30)


def _fetch_all_thrice(folder: str, limit: str, source: str, records: str) -> None:
    """Three rounds over all records: the contents are those on record every time."""
    cache = ShardCache(Path(folder), int(limit))
    for _, record in itertools.product(range(3), map(FileRecord.model_validate, json.loads(records))):
        with cache.entry(source, [record]) as entry:
            assert storage.sha256(f"{entry}/{record.path}") == (record.bytes, record.sha256)


if __name__ == "__main__":
    _fetch_all_thrice(*sys.argv[1:])
