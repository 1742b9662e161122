"""Originals come in the order of their rows, from wherever they lie, each as bytes or as the reason why there are none."""

from __future__ import annotations

import errno
import io
import os
import random
import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data import storage
from data.ahead import in_order
from data.errors import SampleError
from data.originals import Originals, is_retryable
from data.rows import Cell, Row, Slice
from data.shards import ShardConfig, write_shard
from data.web import FetchRules

FETCH = FetchRules(allow_private=True, attempts=1)


def row(image: str, within: Slice | Cell | None = None, **fields: Any) -> Row:
    return Row(0, image, "caption", image, within=within, **fields)


def read(*rows: Row, max_bytes: int = 1 << 20) -> list[bytes | str]:
    """The bytes of each row, or the reason why there are none."""
    with Originals(max_bytes, FETCH) as originals:
        return [o.reason if isinstance(o, SampleError) else o for o in originals.read_all(rows)]


@pytest.fixture(params=["here", "there"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on this machine, and one in an object store."""
    return str(tmp_path) if request.param == "here" else f"memory://originals-{uuid4().hex}"


@pytest.fixture
def web() -> Iterator[str]:
    """A server that answers with the path; one that ends in `pair` waits for another such request."""
    two = threading.Barrier(2)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("pair"):
                two.wait(timeout=20)
            body = self.path.encode()
            self.send_response(404 if "absent" in self.path else 200)
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


def test_files_slices_and_cells_are_read(folder: str) -> None:
    storage.write_bytes(f"{folder}/a.png", b"a picture")
    storage.write_bytes(f"{folder}/a.tar", b"0123456789")
    images = [{"bytes": b"first", "path": "1.png"}, {"bytes": None, "path": "2.png"}, None]
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": images, "raw": [b"x", b"y", b"z"]}), stream)
    storage.write_bytes(f"{folder}/a.parquet", stream.getvalue())
    table = f"{folder}/a.parquet"
    assert read(
        row(f"{folder}/a.png"),
        row(f"{folder}/a.tar", Slice(2, 3)),
        row(f"{folder}/a.tar", Slice(8, 5)),
        row(table, Cell(0, "image")),
        row(table, Cell(1, "image")),
        row(table, Cell(2, "image")),
        row(table, Cell(2, "raw")),
        row(table, Cell(3, "raw")),
        row(f"{folder}/b.png"),
        row(f"{folder}/b.tar", Slice(0, 1)),
        row(f"{folder}/b.parquet", Cell(0, "raw")),
        row(f"{folder}/a.png", Cell(0, "raw")),
    ) == [
        *[b"a picture", b"234", "unreadable", b"first", "missing_image", "missing_image", b"z", "unreadable"],
        *["missing_image"] * 3,
        "unreadable",
    ]


def test_neighbours_in_a_remote_archive_come_by_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = bytes(range(256)) * 40_000
    storage.write_bytes("memory://runs/a.tar", payload)
    storage.write_bytes("memory://runs/b.tar", payload)
    asked: list[tuple[int, int]] = []

    def counted(url: str, start: int, size: int) -> bytes:
        asked.append((start, size))
        return read_range(url, start, size)

    read_range = storage.read_range
    monkeypatch.setattr(storage, "read_range", counted)
    near = [Slice(600 + 3000 * i, 2000) for i in range(10)]
    far, second = Slice(200_000, 5), [Slice(512, 100), Slice(5000, 100)]
    large = [Slice(1_000_000 + n * 2_000_000, 1_900_000) for n in range(3)]
    cut = Slice(len(payload) - 10, 20)
    rows = [row("memory://runs/a.tar", part) for part in (*near, far, *large, cut)]
    rows += [row("memory://runs/b.tar", part) for part in second]
    found = read(*rows, max_bytes=4 << 20)
    wanted = [payload[part.start :][: part.size] for part in (*near, far, *large)]
    assert found == [*wanted, "unreadable", *(payload[part.start :][: part.size] for part in second)]
    one_by_one = [(part.start, part.size) for part in (far, *large, cut)]
    assert sorted(asked) == sorted([(600, 29_000), *one_by_one, (512, 4588)])


def test_the_next_remote_archive_is_asked_for_before_this_one_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, read_range = threading.Barrier(2), storage.read_range

    def together(url: str, start: int, size: int) -> bytes:
        both.wait(timeout=20)
        return read_range(url, start, size)

    for name in "ab":
        storage.write_bytes(f"memory://ahead/{name}.tar", name.encode() * 20)
    monkeypatch.setattr(storage, "read_range", together)
    rows = [row(f"memory://ahead/{name}.tar", Slice(0, 3)) for name in "ab"]
    assert read(*rows) == [b"aaa", b"bbb"]


def test_no_more_is_held_than_shows_that_it_is_too_much(folder: str) -> None:
    storage.write_bytes(f"{folder}/a", b"x" * 1000)
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x" * 1000]}), stream)
    storage.write_bytes(f"{folder}/b", stream.getvalue())
    rows = [row(f"{folder}/a"), row(f"{folder}/a", Slice(0, 1000)), row(f"{folder}/b", Cell(0, "image"))]
    assert read(*rows, max_bytes=10) == [b"x" * 11] * 3
    storage.write_bytes(f"{folder}/empty", b"")
    assert read(row(f"{folder}/empty")) == [b""]


def test_the_cells_of_a_file_are_read_in_any_order(folder: str) -> None:
    payloads = [f"{i}".encode() * 50 for i in range(400)]
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": payloads}), stream, row_group_size=90)
    storage.write_bytes(f"{folder}/a.parquet", stream.getvalue())
    order = list(range(400)) + random.Random(0).sample(range(400), 60) + [399, 399, 0]
    assert read(*[row(f"{folder}/a.parquet", Cell(i, "image")) for i in order]) == [
        payloads[i] for i in order
    ]


def test_rows_of_every_place_come_in_their_order(tmp_path: Path, web: str) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    store = f"memory://originals-{uuid4().hex}/a"
    storage.write_bytes(store, b"abcdefghij")
    kinds = [
        (row(str(tmp_path / "a")), b"0123456789"),
        (row(str(tmp_path / "a"), Slice(1, 2)), b"12"),
        (row(store), b"abcdefghij"),
        (row(store, Slice(1, 2)), b"bc"),
        (row(f"{web}/x"), b"/x"),
        (row(f"{web}/pair"), b"/pair"),  # fetched ahead, or it would wait in vain
        (row(f"{web}/absent"), "http_404"),
        (row(str(tmp_path / "b")), "missing_image"),
    ]
    chosen = kinds * 8
    random.Random(0).shuffle(chosen)
    assert read(*[kind for kind, _ in chosen]) == [result for _, result in chosen]


def test_a_private_address_is_not_asked(web: str) -> None:
    with Originals(100) as originals:
        (outcome,) = originals.read_all([row(f"{web}/x")])
    assert isinstance(outcome, SampleError) and outcome.reason == "private_address"


def test_what_is_no_file_is_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read(row(str(tmp_path)), row(str(tmp_path / "pipe"))) == ["unreadable"] * 2


def test_a_process_without_descriptors_says_so_and_blames_no_row(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            read(row(str(tmp_path / "a")))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE


class FailingStore(MemoryFileSystem):
    """A store whose errors are those of its file names."""

    protocol = "failing"
    cachable = False
    errors = {
        "busy": OSError(errno.EBUSY, "Please reduce your request rate"),
        "slow": TimeoutError("read timed out"),
        "own": RuntimeError("an error that only this store knows"),
        "closed": PermissionError(errno.EACCES, "Access Denied"),
    }

    def cat_file(self, path: str, **_: Any) -> bytes:
        raise self.errors[path.rpartition("/")[2]]


def test_a_store_that_fails_is_told_from_a_file_that_does() -> None:
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    found = read(*[row(f"failing://x/{name}") for name in FailingStore.errors])
    assert found == ["unavailable", "unavailable", "unavailable", "unreadable"]


def test_only_what_may_pass_is_worth_another_attempt() -> None:
    assert all(map(is_retryable, ["unavailable", "timeout", "http_503", "incomplete_body"]))
    assert not any(
        map(is_retryable, ["missing_image", "unreadable", "http_404", "truncated", "private_address"])
    )


def test_captions_that_the_listing_left_are_read_with_the_images(tmp_path: Path) -> None:
    folder = f"memory://originals-{uuid4().hex}"
    contents = {"good": b"a caption", "latin": b"caf\xe9", "dir/x": b""}
    for name, content in contents.items():
        storage.write_bytes(f"{folder}/{name}.txt", content)
    rows = [
        replace(row("x"), caption=None, source_id=name, caption_url=f"{folder}/{name}.txt")
        for name in ("good", "absent", "latin")
    ]
    with Originals(100, FETCH) as originals:
        found = originals.with_captions([*rows, row("y")])
    assert [(r.caption, r.defect and r.defect[0]) for r in found] == [
        ("a caption", None),
        (None, None),
        ("caf\ufffd", "invalid_utf8"),
        ("caption", None),
    ]
    ledger = write_shard(rows, 0, str(tmp_path), ShardConfig()).ledger
    assert ledger.failed == {"invalid_utf8": 1, "missing_caption": 1, "missing_image": 1}


def test_nothing_is_fetched_for_a_row_that_cannot_be_used(tmp_path: Path, web: str) -> None:
    rows = [replace(row(f"{web}/x"), caption=" "), replace(row(f"{web}/x"), defect=("malformed_row", "x"))]
    rows += [row(f"{web}/absent"), row(f"{web}/page")]
    record = write_shard(rows, 0, str(tmp_path), ShardConfig(fetch=FETCH))
    assert record.ledger.failed == {"empty_caption": 1, "http_404": 1, "malformed_row": 1, "not_an_image": 1}


def test_work_is_done_ahead_within_bounds_and_handed_over_in_order() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return number * 2

    results = in_order(work, range(100), 4, 8)
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert len(begun) <= 10 + 8
    results.close()
    assert len(begun) < 100
