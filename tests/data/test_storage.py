"""Bytes on any URL: published whole or not at all, and the same on a disk and in an object store."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from data import storage
from data.storage import Entry

CHECKOUT = Path(__file__).parents[2]
ROUNDS = 5

WRITER = """
import sys
from data import storage
for version in range(1_000_000):
    storage.write_bytes(sys.argv[1], str(version % 10).encode() * 300_000)
"""


@pytest.fixture(params=["a disk", "a file URL", "an object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder of each kind."""
    name = f"storage-{uuid4().hex}"
    yield {"a disk": f"{tmp_path}", "a file URL": f"file://{tmp_path}"}.get(request.param, f"memory://{name}")
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)


def test_what_is_published_can_be_read_listed_measured_and_removed(folder: str) -> None:
    url = storage.join(folder, "a", "b.bin")
    assert not storage.exists(url) and storage.list_files(storage.join(folder, "a")) == []
    storage.write_bytes(url, b"old")
    storage.write_bytes(url, b"new bytes")
    storage.write_bytes(storage.join(folder, "a", "c", "d.bin"), b"")
    assert storage.read_bytes(url) == b"new bytes"
    assert storage.sha256(url) == (9, hashlib.sha256(b"new bytes").hexdigest())
    assert storage.exists(url) and storage.exists(storage.join(folder, "a"))
    assert storage.list_files(storage.join(folder, "a")) == ["b.bin"]
    assert storage.list_folders(storage.join(folder, "a")) == ["c"]
    with storage.open_read(url) as stream:
        stream.seek(4)
        assert stream.read() == b"bytes"
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)


def test_a_finished_file_is_moved_to_its_place(folder: str, tmp_path: Path) -> None:
    draft = tmp_path / "drafts" / "draft"
    draft.parent.mkdir()
    draft.write_bytes(b"x" * 3_000_000)
    url = storage.join(folder, "final", "file")
    storage.publish_file(draft, url)
    assert not draft.exists() and storage.sha256(url)[0] == 3_000_000
    assert storage.list_files(storage.join(folder, "final")) == ["file"]


def test_a_tree_is_listed_at_once_with_what_shows_that_a_file_changed(folder: str) -> None:
    for name in ("b/2", "b/10", "a", "b/.hidden", ".cache/x", "ab/c/d"):
        storage.write_bytes(storage.join(folder, name), b"x")
    entries = storage.list_tree(folder)
    assert [entry.name for entry in entries] == ["a", "ab/c/d", "b/10", "b/2"]
    assert all(entry.stamp == storage.stamp(storage.join(folder, entry.name)) for entry in entries)
    storage.write_bytes(storage.join(folder, "a"), b"yy")
    assert [entry.stamp for entry in storage.list_tree(folder)][1:] == [entry.stamp for entry in entries][1:]
    assert storage.stamp(storage.join(folder, "a")) not in (None, entries[0].stamp)
    assert storage.list_tree(storage.join(folder, "b")) == [
        Entry(e.name[2:], e.stamp) for e in entries if e.name[:2] == "b/"
    ]
    assert storage.is_folder(storage.join(folder, "b")) and not storage.is_folder(storage.join(folder, "a"))
    assert storage.stamp(storage.join(folder, "absent")) is None


def test_links_are_looked_through_and_folders_behind_them_are_not_entered(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "there").symlink_to("a")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "loop").symlink_to(".")
    stamp = storage.stamp(str(tmp_path / "a"))
    assert storage.list_tree(str(tmp_path)) == [("a", stamp), ("nowhere", None), ("there", stamp)]


def test_a_range_of_a_file_is_read(folder: str) -> None:
    url = storage.join(folder, "a")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_range(url, 2, 3) == b"234"
    assert storage.read_range(url, 8, 100) == b"89"
    with storage.open_read(url, 4) as stream:
        assert stream.read(1) == b"0" and stream.seek(-1, 2) == 9 and stream.read() == b"9"
    storage.write_bytes(url, b"")
    assert storage.read_range(url, 0, 5) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_range(storage.join(folder, "absent"), 0, 1)


def test_folders_that_are_not_there_are_empty(folder: str) -> None:
    absent = storage.join(folder, "absent")
    assert storage.list_files(absent) == storage.list_folders(absent) == []


@pytest.mark.parametrize("part", ["..", "../x", "a/../../x", "/etc/passwd"])
def test_no_part_leaves_the_folder(part: str) -> None:
    with pytest.raises(ValueError, match="only relative paths"):
        storage.join("s3://bucket/store", part)


@pytest.mark.parametrize(
    ("url", "joined"),
    [
        ("store", "store/a/b"),
        ("/", "/a/b"),
        ("/store/", "/store/a/b"),
        ("s3://bucket", "s3://bucket/a/b"),
        ("file:///store/", "file:///store/a/b"),
        ("file:///", "file:///a/b"),
    ],
)
def test_parts_are_joined_by_one_slash(url: str, joined: str) -> None:
    assert storage.join(url, "a", "b") == joined


def test_the_root_of_an_object_store_is_no_path_of_this_machine() -> None:
    url = storage.join("memory://", f"storage-{uuid4().hex}")
    storage.write_bytes(url, b"x")
    assert not storage.is_local(url) and storage.read_bytes(url) == b"x"
    storage.remove(url)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(url, "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(url) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_writer_killed_at_any_moment_leaves_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "store" / "file"
    for kill_after in itertools.islice(itertools.count(0.01, 0.017), ROUNDS):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=CHECKOUT)
        seen = _watch(path, child, kill_after)
        child.kill()
        child.wait()
        assert _is_whole(path.read_bytes()) and seen > 0
        assert storage.list_files(str(path.parent)) == ["file"], "a killed writer's draft is not listed"


def _watch(path: Path, child: subprocess.Popen, seconds: float) -> int:
    """Reads the file as often as possible while it is replaced; how often it was there."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    seen, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline or not seen:
        assert _is_whole(path.read_bytes())
        seen += 1
    return seen


def _is_whole(payload: bytes) -> bool:
    return len(payload) == 300_000 and len(set(payload)) == 1
