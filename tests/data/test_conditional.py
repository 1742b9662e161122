"""Files that are created only where there is none, and replaced only as they were read: on a disk and in S3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data import conditional, storage

CHECKOUT = Path(__file__).parents[2]
COUNTER = """
import sys
from data import conditional
for _ in range(20):
    while True:
        found = conditional.read(sys.argv[1])
        count = str(int(found.payload) + 1 if found else 1).encode()
        if conditional.replace(sys.argv[1], count, found.version) if found else conditional.create(sys.argv[1], count):
            break
"""


@pytest.fixture(params=["a disk", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = str(tmp_path) if request.param == "a disk" else request.getfixturevalue("bucket")
    return storage.join(folder, "deep", "file.json")


def test_of_two_who_create_one_does(url: str) -> None:
    assert conditional.read(url) is None
    assert conditional.create(url, b"first") and not conditional.create(url, b"second")
    found = conditional.read(url)
    assert found and found.payload == b"first" == storage.read_bytes(url)


def test_only_what_is_still_there_as_it_was_read_is_replaced_or_removed(url: str) -> None:
    conditional.create(url, b"first")
    first = conditional.read(url)
    assert first and conditional.replace(url, b"second", first.version)
    assert not conditional.replace(url, b"third", first.version)
    assert not conditional.remove(url, first.version) and storage.read_bytes(url) == b"second"
    second = conditional.read(url)
    assert second and second.version != first.version and conditional.remove(url, second.version)
    assert not storage.exists(url)
    assert not conditional.remove(url, second.version) and not conditional.replace(url, b"x", second.version)
    assert conditional.create(url, b"again")


def test_no_change_of_many_writers_is_lost(url: str) -> None:
    line = [sys.executable, "-c", COUNTER, url]
    writers = [subprocess.Popen(line, cwd=CHECKOUT) for _ in range(3)]
    try:
        assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    finally:
        for writer in writers:
            writer.kill()
    assert storage.read_bytes(url) == b"60"


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_no_refusal(bucket: str) -> None:
    with pytest.raises(FileNotFoundError):
        conditional.create(f"{bucket}-absent/x", b"")
