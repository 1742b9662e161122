"""Shards: img2dataset's layout, every attempted row accounted for, the same bytes every time, and no damage unseen."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import storage
from data.errors import CorruptArtifact
from data.images import decode
from data.manifest import ShardRecord, keys_digest
from data.shards import ShardConfig, sample_key, write_shard
from data.sources import Row, SourceConfig, list_rows
from data.tars import ShardReader, TarWriter

CONFIG = ShardConfig(image_size=16, encode_format="png", samples_per_shard=100)


def _picture(seed: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _source(folder: Path, count: int = 5) -> list[Row]:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.png").write_bytes(_picture(i))
        (folder / f"{i}.txt").write_text(f"picture  number {i} \u2603\n")
    return list_rows(SourceConfig(path=str(folder)))


HOSTILE = {
    "good.png": (_picture(0), "a good one", "success", None),
    "page.jpg": (b"<html>gone</html>", "c", "failed_to_resize", "html"),
    "zero.jpg": (b"", "c", "failed_to_resize", "empty_file"),
    "cut.png": (_picture(1)[:-300], "c", "failed_to_resize", "truncated"),
    "wide.png": (_picture(2, 4), "c", "filtered", "too_small"),
    "silent.png": (_picture(3), None, "failed_to_download", "missing_caption"),
    "blank.png": (_picture(4), " \n", "failed_to_download", "empty_caption"),
    "long.png": (_picture(5), "w" * 200, "filtered", "caption_too_long"),
    "absent.png": (None, "c", "failed_to_download", "missing_image"),
    "../outside.png": (None, "c", "failed_to_download", "path_escapes_source"),
    "folder.png": ("a folder", "c", "failed_to_download", "unreadable"),
    "good.jpg": (_picture(6), "named jpg, is png", "success", None),
}


def _hostile_source(folder: Path) -> list[Row]:
    folder.mkdir()
    lines = []
    for name, (payload, caption, *_) in HOSTILE.items():
        if isinstance(payload, bytes):
            (folder / name).write_bytes(payload)
        elif payload:
            (folder / name).mkdir()
        lines.append(json.dumps({"file_name": name, "text": caption}).encode())
    lines += [
        b"not json",
        b'{"file_name": "good.png", "text": "twice"}',
        b'{"file_name": "l.png", "text": "\xe9"}',
    ]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return list_rows(SourceConfig(path=str(folder)))


def test_every_attempted_row_is_accounted_for(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"min_size": 8, "max_caption_chars": 100})
    record = write_shard(_hostile_source(tmp_path / "source"), 3, str(tmp_path / "out"), config)
    lines = pq.read_table(tmp_path / "out" / "00003.parquet").to_pylist()
    expected = [outcome for *_, status, reason in HOSTILE.values() for outcome in [(status, reason)]]
    expected += [
        ("failed_to_download", reason) for reason in ("malformed_row", "duplicate_key", "invalid_utf8")
    ]
    assert [(line["status"], line["error_class"]) for line in lines] == expected
    assert all(line["error_message"] for line in lines if line["status"] != "success")
    assert not any(str(tmp_path) in str(line) for line in lines)
    ledger = record.ledger
    assert (ledger.written, ledger.attempted) == (2, len(lines)) == (record.samples, len(HOSTILE) + 3)
    assert ledger.filtered == {"too_small": 1, "caption_too_long": 1}
    assert sum(ledger.failed.values()) == len(lines) - 4
    with ShardReader(str(tmp_path / "out" / "00003.tar")) as reader:
        assert reader.keys == ("000030000", "000030011")
        assert record.keys == keys_digest(reader.keys)
        assert reader.fields(1) == lines[11]
        assert lines[11]["caption"] == reader.caption(1) == "named jpg, is png"
        assert lines[11]["sha256"] == hashlib.sha256(_picture(6)).hexdigest()


def test_the_stats_have_img2datasets_keys_and_add_up(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"min_size": 8})
    write_shard(_hostile_source(tmp_path / "source"), 0, str(tmp_path / "out"), config)
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    keys = "count successes failed_to_download failed_to_resize duration start_time end_time status_dict"
    assert list(stats) == keys.split()
    assert stats["count"] == stats["successes"] + stats["failed_to_download"] + stats["failed_to_resize"]
    assert stats["count"] == sum(stats["status_dict"].values()) and stats["duration"] > 0
    assert stats["status_dict"]["success"] == stats["successes"] == 3


def test_a_record_names_its_files_by_digest(tmp_path: Path) -> None:
    record = write_shard(_source(tmp_path / "source"), 0, str(tmp_path / "out"), CONFIG)
    assert [file.path for file in record.files] == ["00000.tar", "00000.parquet", "00000_stats.json"]
    assert storage.list_files(str(tmp_path / "out")) == sorted(file.path for file in record.files)
    for file in record.files:
        assert (file.bytes, file.sha256) == storage.sha256(str(tmp_path / "out" / file.path))


def test_the_same_rows_give_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    records = [
        write_shard(_hostile_source(tmp_path / name), 0, str(tmp_path / f"{name}-out"), CONFIG)
        for name in "ab"
    ]
    folder = f"memory://shards-{uuid4().hex}"
    records.append(write_shard(list_rows(SourceConfig(path=str(tmp_path / "a"))), 0, folder, CONFIG))
    assert records[0] == records[1] == records[2]


def test_a_shard_without_a_success_has_no_tar(tmp_path: Path) -> None:
    rows = _source(tmp_path / "source", 2)
    write_shard(rows, 0, str(tmp_path / "out"), CONFIG)
    for row in rows:
        Path(row.image).unlink()
    record = write_shard(rows, 0, str(tmp_path / "out"), CONFIG)
    assert record.samples == 0 and record.ledger.failed == {"missing_image": 2}
    assert storage.list_files(str(tmp_path / "out")) == ["00000.parquet", "00000_stats.json"]


def test_keys_are_img2datasets_and_sort_as_the_source() -> None:
    assert sample_key(1, 5, 10_000) == "000010005"
    assert sample_key(0, 7, 50) == "000000007"
    assert sample_key(2, 10_000, 10_001) == "0000210000"
    keys = [sample_key(index, row, 10_001) for index in range(3) for row in range(0, 10_001, 500)]
    assert keys == sorted(set(keys))


def test_the_rules_are_flat_paths_of_the_config() -> None:
    assert {"samples_per_shard", "image_size", "max_failed_fraction", "max_caption_chars"} <= set(
        ShardConfig.model_fields
    )


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # webdataset leaves its files to the collector
def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    for extension in ("png", "jpg", "webp"):
        config = CONFIG.model_copy(update={"encode_format": extension})
        rows = (
            list_rows(SourceConfig(path=str(tmp_path / "source")))
            if extension != "png"
            else _source(tmp_path / "source")
        )
        write_shard(rows, 0, str(tmp_path / extension), config)
        url = str(tmp_path / extension / "00000.tar")
        samples = list(webdataset.WebDataset(url, shardshuffle=False))
        with ShardReader(url) as reader:
            assert tuple(sample["__key__"] for sample in samples) == reader.keys
            for row, sample in enumerate(samples):
                assert [name for name in sample if not name.startswith("__")] == [extension, "json", "txt"]
                assert sample["txt"].decode() == reader.caption(row) == f"picture number {row} \u2603"
                assert sample[extension] == reader.image(row)
                assert json.loads(sample["json"]) == reader.fields(row)
                assert decode(reader.image(row)).shape == (16, 16, 3)


def test_bytes_are_those_of_the_standard_librarys_ustar() -> None:
    members = [
        ("000000000.jpg", b"x" * 512),
        ("000000000.json", b"{}"),
        ("000000000.txt", b""),
        ("n" * 100, b"y" * 9000),
    ]
    ours, theirs = io.BytesIO(), io.BytesIO()
    writer = TarWriter(ours)
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            writer.add(name, payload)
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    writer.finish()
    assert ours.getvalue() == theirs.getvalue()
    assert (
        writer.bytes == len(ours.getvalue()) and writer.sha256 == hashlib.sha256(ours.getvalue()).hexdigest()
    )


Samples = list[tuple[bytes, str]]


def _tar(samples: Samples) -> bytes:
    stream = io.BytesIO()
    writer = TarWriter(stream)
    for number, (image, caption) in enumerate(samples):
        key = sample_key(0, number, 100)
        for extension, payload in [("jpg", image), ("json", b"{}"), ("txt", caption.encode())]:
            writer.add(f"{key}.{extension}", payload)
    writer.finish()
    return stream.getvalue()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.binary(max_size=1500), st.text(max_size=300)), max_size=6))
def test_any_samples_come_back_as_they_went_in(tmp_path: Path, samples: Samples) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(_tar(samples))
    with ShardReader(str(path)) as reader:
        assert [(reader.image(row), reader.caption(row)) for row in range(len(reader))] == samples
        assert reader.keys == tuple(sample_key(0, row, 100) for row in range(len(samples)))


SAMPLES = [(bytes([i]) * 700, f"caption {i}") for i in range(3)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_tar_cut_before_its_end_is_corrupt_wherever_it_was_cut(tmp_path: Path, data: st.DataObject) -> None:
    whole = _tar(SAMPLES)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 2 * 512
    boundary = st.sampled_from([0, 512, 512 + 1024, 512 + 1024 + 512, end - 1, end - 512, end - 1024])
    path = tmp_path / "00000.tar"
    path.write_bytes(whole[: data.draw(st.one_of(st.integers(0, end - 1), boundary))])
    with pytest.raises(CorruptArtifact, match=r"00000\.tar, byte \d+: "):
        ShardReader(str(path))


def _replaced(whole: bytes, offset: int, new: bytes) -> bytes:
    return whole[:offset] + new + whole[offset + len(new) :]


def test_damaged_headers_and_incomplete_samples_are_corrupt(tmp_path: Path) -> None:
    whole = _tar(SAMPLES)
    second = 512 + 1024 + 512 + 512 + 512 + 512  # where sample 1 begins
    damaged = {
        "a garbage header": _replaced(whole, second, bytes(range(256)) * 2),
        "a zeroed header": _replaced(whole, second, bytes(512)),
        "a flipped bit in a name": _replaced(whole, second, b"\xb0"),
        "something behind the end": whole[:-1] + b"x",
        "no txt at the end of a sample": whole[: second - 1024] + whole[second:],
        "a sample twice": whole[:second] + whole,
    }
    for name, payload in damaged.items():
        path = tmp_path / f"{name.replace(' ', '-')}.tar"
        path.write_bytes(payload)
        with pytest.raises(CorruptArtifact, match="byte"):
            ShardReader(str(path))


def test_a_reader_is_shared_by_threads_and_reads_object_stores(tmp_path: Path) -> None:
    url = f"memory://reader-{uuid4().hex}/00000.tar"
    payload = _tar(SAMPLES)
    (tmp_path / "00000.tar").write_bytes(payload)
    with fsspec.open(url, "wb") as stream:
        stream.write(payload)  # type: ignore[union-attr]
    for place in (url, str(tmp_path / "00000.tar")):
        with ShardReader(place) as reader, ThreadPoolExecutor(4) as threads:
            rows = [i % 3 for i in range(300)]
            assert list(threads.map(reader.image, rows)) == [SAMPLES[row][0] for row in rows]
    with pytest.raises(FileNotFoundError):
        ShardReader(str(tmp_path / "00001.tar"))


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail in the kernel, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [3000, 6000, 20_000])
def test_a_full_disk_is_raised_and_leaves_nothing_half_written(tmp_path: Path, room: int) -> None:
    rows = _source(tmp_path / "source", 20)
    with _largest_file(room), pytest.raises(OSError, match="large"):
        write_shard(rows, 0, str(tmp_path / "out"), CONFIG)
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_shard_is_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    rows = _source(tmp_path / "source", 20)
    whole = write_shard(rows, 0, str(tmp_path / "whole"), CONFIG)
    with _largest_file(6000), pytest.raises(OSError, match="large"):
        write_shard(rows, 0, str(tmp_path / "again"), CONFIG)
    again: ShardRecord = write_shard(rows, 0, str(tmp_path / "again"), CONFIG)
    assert again == whole
