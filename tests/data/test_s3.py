"""Every kind of source and a store in a real object store's interface: s3fs against a server on this machine."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from object_store import ObjectStore

from data import manifest, sources, storage
from data.errors import SampleError, UserError
from data.originals import Originals, is_retryable
from data.rows import Row
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig, list_rows

CONFIG = ShardConfig(image_size=16, encode_format="png", samples_per_shard=100)

pytestmark = pytest.mark.slow


def _picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _put(url: str, content: bytes | str) -> None:
    storage.write_bytes(url, content.encode() if isinstance(content, str) else content)


def _tar(keys: range) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for key in keys:
            for suffix, payload in [("png", _picture(key)), ("txt", f"picture {key}".encode())]:
                info = tarfile.TarInfo(f"{key:04d}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return stream.getvalue()


def _folder(bucket: str, _: Path) -> str:
    for i in range(4):
        _put(f"{bucket}/set/deep/{i}.png", _picture(i))
        _put(f"{bucket}/set/deep/{i}.txt", f"picture {i}")
    return f"{bucket}/set/"


def _metadata(bucket: str, _: Path) -> str:
    lines = [json.dumps({"file_name": f"images/{i}.png", "text": f"picture {i}"}) for i in range(4)]
    _put(f"{bucket}/set/metadata.jsonl", "\n".join(lines))
    for i in range(4):
        _put(f"{bucket}/set/images/{i}.png", _picture(i))
    return f"{bucket}/set"


def _remote_table(bucket: str, _: Path) -> str:
    _put(f"{bucket}/set/pairs.csv", "url,caption\n" + "".join(f"x/{i}.png,picture {i}\n" for i in range(4)))
    for i in range(4):
        _put(f"{bucket}/set/x/{i}.png", _picture(i))
    return f"{bucket}/set/pairs.csv"


def _pairs_in_another_place(bucket: str) -> dict[str, list[str]]:
    """The columns of a table of absolute places, of pictures that do not lie beside it."""
    for i in range(4):
        _put(f"{bucket}/elsewhere/{i}.png", _picture(i))
    places = [f"{bucket}/elsewhere/{i}.png" for i in range(4)]
    return {"url": places, "caption": [f"picture {i}" for i in range(4)]}


def _csv_of_places(bucket: str, _: Path) -> str:
    pairs = _pairs_in_another_place(bucket)
    lines = [",".join(line) for line in zip(*pairs.values(), strict=True)]
    _put(f"{bucket}/tables/pairs.csv", "\n".join(["url,caption", *lines]))
    return f"{bucket}/tables/pairs.csv"


def _parquet_of_places(bucket: str, tmp_path: Path) -> str:
    pq.write_table(pa.table(_pairs_in_another_place(bucket)), tmp_path / "pairs.parquet")
    _put(f"{bucket}/tables/pairs.parquet", (tmp_path / "pairs.parquet").read_bytes())
    return f"{bucket}/tables/pairs.parquet"


def _local_table(bucket: str, tmp_path: Path) -> str:
    for i in range(4):
        _put(f"{bucket}/{i}.png", _picture(i))
    table = tmp_path / "pairs.tsv"
    table.write_text("url\tcaption\n" + "".join(f"{bucket}/{i}.png\tpicture {i}\n" for i in range(4)))
    return str(table)


def _cells(bucket: str, tmp_path: Path) -> str:
    for part in range(2):
        images = [{"bytes": _picture(i), "path": None} for i in range(2 * part, 2 * part + 2)]
        texts = [f"picture {i}" for i in range(2 * part, 2 * part + 2)]
        pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "part.parquet")
        _put(f"{bucket}/set/train-{part}.parquet", (tmp_path / "part.parquet").read_bytes())
    return f"{bucket}/set"


def _archives(bucket: str, _: Path) -> str:
    for i in range(2):
        _put(f"{bucket}/set/{i:05d}.tar", _tar(range(2 * i, 2 * i + 2)))
    return f"{bucket}/set/{{00000..00001}}.tar"


def _folder_of_archives(bucket: str, tmp_path: Path) -> str:
    return _archives(bucket, tmp_path).rpartition("/")[0]


SOURCES = [
    *(_folder, _metadata, _remote_table, _csv_of_places, _parquet_of_places, _local_table),
    *(_cells, _archives, _folder_of_archives),
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_in_a_bucket_becomes_shards_in_a_bucket(
    bucket: str, tmp_path: Path, source: Callable[[str, Path], str]
) -> None:
    config = SourceConfig(path=source(bucket, tmp_path))
    rows = list_rows(config)
    record = write_shard(rows, 0, f"{bucket}/out", CONFIG)
    manifest.publish_receipt(f"{bucket}/out", record)
    assert manifest.load_receipt(f"{bucket}/out", 0) == record and record.samples == 4
    assert storage.list_files(f"{bucket}/out") == ["00000.parquet", "00000.tar", "00000_stats.json"]
    table = tmp_path / "00000.parquet"
    table.write_bytes(storage.read_bytes(f"{bucket}/out/00000.parquet"))
    assert pq.read_table(table)["caption"].to_pylist() == [f"picture {i}" for i in range(4)]
    with Originals(1 << 20) as originals:
        assert list(originals.read_all(rows)) == [_picture(i) for i in range(4)]
    assert sources.describe(config).rows == 4 and sources.prompts(config) == []


def test_the_identity_of_a_row_follows_its_image_and_its_caption(bucket: str, tmp_path: Path) -> None:
    config = SourceConfig(path=_folder(bucket, tmp_path))
    first = sources.describe(config).identities
    assert first is not None and sources.describe(config).identities.tolist() == first.tolist()  # type: ignore[union-attr]
    _put(f"{bucket}/set/deep/1.txt", "Picture 1")
    _put(f"{bucket}/set/deep/2.png", _picture(20))
    second = sources.describe(config).identities
    assert second is not None and (first != second).tolist() == [False, True, True, False]


def test_what_is_gone_or_was_never_there_is_one_row_or_one_sentence(bucket: str, tmp_path: Path) -> None:
    rows = list_rows(SourceConfig(path=_folder(bucket, tmp_path)))
    storage.remove(f"{bucket}/set/deep/1.png")
    storage.remove(f"{bucket}/set/deep/2.txt")
    _put(f"{bucket}/set/deep/3.png", b"")
    ledger = write_shard(rows, 0, f"{bucket}/out", CONFIG).ledger
    assert (
        ledger.failed == {"empty_file": 1, "missing_caption": 1, "missing_image": 1} and ledger.written == 1
    )
    for path in (f"{bucket}/nothing", f"{bucket}/no.csv", f"{bucket}/{{0..3}}.tar", "s3://no-such-bucket/x"):
        with pytest.raises(UserError, match="does not exist"):
            list_rows(SourceConfig(path=path))


def test_what_another_machine_wrote_is_seen_at_once(bucket: str, object_store: ObjectStore) -> None:
    _put(f"{bucket}/out/a.json", b"{}")
    assert storage.list_files(f"{bucket}/out") == ["a.json"]
    other: Any = fsspec.filesystem("s3", skip_instance_cache=True, endpoint_url=object_store.address)
    other.pipe_file("pictures/out/b.json", b"{}")
    assert storage.exists(f"{bucket}/out/b.json")
    assert storage.list_files(f"{bucket}/out") == ["a.json", "b.json"]


def test_a_put_that_fails_leaves_what_was_there_and_the_next_one_replaces_it(
    bucket: str, tmp_path: Path
) -> None:
    url, draft = f"{bucket}/out/00000.tar", tmp_path / "draft"
    _put(url, b"old")
    filesystem: Any = fsspec.filesystem("s3")
    draft.write_bytes(b"new" * 35_000_000)  # three parts
    upload = filesystem._call_s3

    async def fail_in_the_middle(method: str, *arguments: Any, **options: Any) -> Any:
        if method == "upload_part" and options.get("PartNumber") == 2:
            raise OSError("the connection broke")
        return await upload(method, *arguments, **options)

    filesystem._call_s3 = fail_in_the_middle
    try:
        with pytest.raises(OSError, match="broke"):
            storage.publish_file(draft, url)
    finally:
        filesystem._call_s3 = upload
    assert storage.read_bytes(url) == b"old" and draft.exists()
    storage.publish_file(draft, url)
    assert storage.sha256(url)[0] == 105_000_000 and not draft.exists()


@pytest.fixture
def overloaded() -> Iterator[str]:
    """A server that has no answer but 503."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>wait</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_store_that_is_overloaded_or_gone_costs_rows_that_may_be_tried_again(
    bucket: str, overloaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    row = Row(0, f"{bucket}/a.png", "caption", "a.png")
    for address in (overloaded, "http://127.0.0.1:1"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with Originals(1000) as originals:
            (outcome,) = originals.read_all([row])
        assert isinstance(outcome, SampleError) and is_retryable(outcome.reason), outcome
