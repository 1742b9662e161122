"""Existing WebDataset shards are listed by their headers, and no damage shortens the list unseen."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import storage
from data.errors import UserError
from data.originals import Originals
from data.rows import Row
from data.sources import SourceConfig, list_rows

Member = tuple[str, bytes]


def tar_of(*members: Member, format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return stream.getvalue()


def pair(key: str) -> list[Member]:
    return [(f"{key}.jpg", f"picture {key}".encode() * 100), (f"{key}.txt", f"caption {key}".encode())]


def rows_of(path: object, **fields: Any) -> list[Row]:
    return list_rows(SourceConfig.model_validate({"path": str(path), **fields}))


def reasons(rows: list[Row]) -> list[str | None]:
    return [row.defect and row.defect[0] for row in rows]


def payloads(rows: list[Row]) -> list[object]:
    with Originals(1 << 20) as originals:
        return list(originals.read_all(rows))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Where tests put their one archive."""
    return tmp_path / "00000.tar"


def test_a_sample_is_what_shares_the_name_up_to_the_first_dot(archive: Path) -> None:
    archive.write_bytes(
        tar_of(
            *[("a/0.cls", b"7"), ("a/0.JPG", b"first"), ("a/0.seg.png", b"mask"), ("a/0.txt", b"one")],
            *[("b/0.txt", b"two"), ("b/0.webp", b"second")],
            *[("._b.jpg", b"x"), ("__meta__.json", b"{}"), ("README", b"text")],
            *[("c.d.jpg", b"not an image"), ("c.txt", b"three")],
        )
    )
    rows = rows_of(archive)
    assert [row.source_id for row in rows] == [
        "00000.tar/a/0",
        "00000.tar/b/0",
        "00000.tar/README",
        "00000.tar/c",
    ]
    assert [row.caption for row in rows] == ["one", "two", None, None]
    assert reasons(rows) == [None, None, "missing_image", "missing_image"]
    assert payloads(rows[:2]) == [b"first", b"second"]


def test_captions_come_from_the_txt_the_json_or_the_field_that_is_named(archive: Path) -> None:
    def sample(key: str, **members: str) -> list[Member]:
        return [
            (f"{key}.png", b"x"),
            *((f"{key}.{suffix}", text.encode()) for suffix, text in members.items()),
        ]

    both = json.dumps({"caption": "from json", "alt": "alternative"})
    archive.write_bytes(
        tar_of(
            *sample("0", json=both, txt="from txt"),
            *sample("1", json=both),
            *sample("2", json='{"text": "a text"}'),
            *sample("3", json="{"),
            *sample("4", json='{"caption": 5}'),
            *sample("5"),
            *sample("6", txt="x" * (1 << 20) + "x"),
        )
    )
    rows = rows_of(archive)
    assert [row.caption for row in rows] == ["from txt", "from json", "a text", None, None, None, None]
    assert reasons(rows) == [None, None, None, "malformed_row", "malformed_row", None, "malformed_row"]
    assert [row.caption for row in rows_of(archive, caption_column="alt")][:3] == ["alternative"] * 2 + [None]


def test_what_webdataset_wrote_is_listed_as_webdataset_reads_it(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:  # type: ignore[attr-defined]
        for key in range(5):
            writer.write({"__key__": f"dir/{key:03d}", "jpg": bytes([key]) * 1000, "txt": f"caption {key}"})
    rows = rows_of(tmp_path)
    assert [row.caption for row in rows] == [f"caption {key}" for key in range(5)]
    assert payloads(rows) == [bytes([key]) * 1000 for key in range(5)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_links_and_folders_are_understood(archive: Path, format: int) -> None:
    key = "é" * 150 + "/0"
    with tarfile.open(archive, "w", format=format, pax_headers={"comment": "of the archive"}) as tar:
        folder = tarfile.TarInfo("é" * 150)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, payload in [(f"{key}.jpg", b"picture"), (f"{key}.txt", b"caption")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(payload))
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname, link.size = tarfile.LNKTYPE, f"{key}.jpg", 7
        tar.addfile(link)
    rows = rows_of(archive)
    assert [(row.source_id, row.caption) for row in rows] == [(f"00000.tar/{key}", "caption")]
    assert payloads(rows) == [b"picture"]


def test_a_folder_a_pattern_and_one_archive_name_the_same_samples(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number:05d}.tar").write_bytes(tar_of(*pair(f"{number}0"), *pair(f"{number}1")))
        (tmp_path / f"{number:05d}.parquet").write_bytes(b"img2dataset writes one beside each archive")
        (tmp_path / f"{number:05d}_stats.json").write_text("{}")
    everything = rows_of(tmp_path)
    assert [row.source_id for row in everything] == [
        f"{n:05d}.tar/{n}{k}" for n in range(3) for k in range(2)
    ]
    assert [row.index for row in everything] == list(range(6)) and reasons(everything) == [None] * 6
    assert rows_of(f"{tmp_path}/{{00000..00002}}.tar", kind="webdataset") == everything
    assert rows_of(tmp_path, limit=3) == everything[:3]
    assert [row.source_id for row in rows_of(tmp_path / "00001.tar")] == ["00001.tar/10", "00001.tar/11"]


def test_archives_of_several_folders_keep_their_ids_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(tar_of(*pair("0")))
    assert [row.source_id for row in rows_of(f"{tmp_path}/{{a,b}}/0.tar")] == ["a/0.tar/0", "b/0.tar/0"]


def test_a_sample_in_two_places_is_counted_and_not_joined(archive: Path) -> None:
    archive.write_bytes(
        tar_of(*pair("0"), *pair("1"), ("0.jpg", b"again"), ("2.txt", b"no image"), ("3.jpg", b"x"))
    )
    rows = rows_of(archive)
    assert [row.source_id[-1] for row in rows] == ["0", "1", "0", "2", "3"]
    assert reasons(rows) == [None, None, "duplicate_key", "missing_image", None]
    assert rows[4].caption is None


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("{0..2}.tar", r"1\.tar does not exist, nor do 1 more"),
        ("absent.tar", "does not exist"),
        ("{0..1.tar", "the braces of .* do not match"),
        ("0.tar", "names archives, but source.kind=table was given"),
    ],
)
def test_archives_that_are_not_there_get_one_sentence(tmp_path: Path, path: str, sentence: str) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of(*pair("0")))
    kind = "table" if path == "0.tar" else "auto"
    with pytest.raises(UserError, match=sentence):
        rows_of(tmp_path / path, kind=kind)


WHOLE = tar_of(*pair("0"), *pair("1"), *pair("2"))
END = len(WHOLE.rstrip(b"\0")) // 512 * 512 + 512


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.integers(0, END), st.sampled_from(range(0, END + 1, 512))))
def test_an_archive_that_was_cut_says_so_wherever_it_was_cut(archive: Path, size: int) -> None:
    archive.write_bytes(WHOLE[:size])
    *sound, last = rows_of(archive)
    assert last.defect is not None and last.defect[0] == "corrupt_archive" and last.source_id == "00000.tar"
    assert last.defect[1].startswith("00000.tar, byte ")
    assert [row.source_id for row in sound] == ["00000.tar/0", "00000.tar/1", "00000.tar/2"][: len(sound)]
    assert reasons(sound) == [None] * len(sound)
    assert payloads(sound) == [payload for _, payload in [pair(row.source_id[-1])[0] for row in sound]]


SECOND = 512 + 1024 + 512 + 512


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (
            WHOLE[:SECOND] + bytes(range(256)) * 2 + WHOLE[SECOND + 512 :],
            "byte 2560: there is no intact header",
        ),
        (WHOLE[:SECOND] + bytes(512) + WHOLE[SECOND + 512 :], "byte 2560: something follows the end"),
        (WHOLE[:SECOND] + b"x" + WHOLE[SECOND + 1 :], "byte 2560: there is no intact header"),
        (WHOLE + WHOLE, "something follows the end"),
        (b"<html>not found</html>".ljust(2048), "byte 0: there is no intact header"),
        (b"", "byte 0: the end of the archive is missing"),
    ],
    ids=[
        "a garbage header",
        "a zeroed header",
        "a flipped bit",
        "two archives in one",
        "a web page",
        "nothing",
    ],
)
def test_a_damaged_archive_is_named_with_the_byte(archive: Path, damaged: bytes, problem: str) -> None:
    archive.write_bytes(damaged)
    *sound, last = rows_of(archive)
    assert last.defect is not None and last.defect[0] == "corrupt_archive" and problem in last.defect[1]
    assert [row.source_id for row in sound] == [f"00000.tar/{i}" for i in range(len(sound))]


def test_listing_reads_headers_and_captions_and_no_pictures(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    open_read = storage.open_read

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            payload = super().read(size)
            read.append(len(payload))
            return payload

    def counted(url: str, block_bytes: int | None = None) -> BinaryIO:
        return Counting(open_read(url, block_bytes).detach())  # type: ignore[attr-defined, return-value]

    archive.write_bytes(
        tar_of(*[(f"{i}.{s}", b"x" * n) for i in range(20) for s, n in [("jpg", 50_000), ("txt", 20)]])
    )
    monkeypatch.setattr(storage, "open_read", counted)
    assert len(rows_of(archive)) == 20
    assert sum(read) < 50_000, "each header, each caption, the zeros at the end"


def test_archives_in_an_object_store_are_read_like_local_ones(tmp_path: Path) -> None:
    folder = f"memory://archives-{uuid4().hex}"
    for number in range(3):
        content = tar_of(*pair(f"{number}0"), *pair(f"{number}1"))
        storage.write_bytes(f"{folder}/{number}.tar", content[: 2000 if number == 2 else None])
        (tmp_path / f"{number}.tar").write_bytes(content[: 2000 if number == 2 else None])
    here, there = rows_of(tmp_path), rows_of(folder)
    assert [(row.source_id, row.caption, row.defect, row.within) for row in here] == [
        (row.source_id, row.caption, row.defect, row.within) for row in there
    ]
    assert reasons(there) == [None] * 4 + ["corrupt_archive"] and payloads(there[:4]) == payloads(here[:4])
    assert rows_of(f"{folder}/{{0..2}}.tar") == there
