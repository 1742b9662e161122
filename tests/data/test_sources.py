"""A source lists its rows in a fixed order, and a bad row is counted, never lost and never fatal alone."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import sources, storage
from data.errors import UserError
from data.originals import Originals
from data.rows import Cell, Row
from data.sources import SourceConfig, list_rows


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _rows(path: Path, **fields: object) -> list[Row]:
    return list_rows(SourceConfig.model_validate({"path": str(path), **fields}))


def _reasons(rows: list[Row]) -> list[str | None]:
    return [row.defect and row.defect[0] for row in rows]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_an_image_folder_is_listed_in_the_order_of_its_metadata(tmp_path: Path, name: str) -> None:
    pairs = [("images/b.png", "a red circle"), ("images/a.png", 'a "blue", square')]
    if name.endswith("jsonl"):
        _write(tmp_path / name, "".join(json.dumps({"file_name": f, "text": t}) + "\n\n" for f, t in pairs))
    elif name.endswith("csv"):
        _write(
            tmp_path / name,
            '\ufefffile_name,text\r\nimages/b.png,a red circle\r\n\r\nimages/a.png,"a ""blue"", square"\r\n',
        )
    else:
        pq.write_table(
            pa.table({"file_name": [f for f, _ in pairs], "text": [t for _, t in pairs]}), tmp_path / name
        )
    rows = _rows(tmp_path)
    assert [(row.source_id, row.caption) for row in rows] == pairs
    assert [row.index for row in rows] == [0, 1]
    assert rows[0].image == str(tmp_path / "images" / "b.png") and _reasons(rows) == [None, None]


def test_a_folder_of_pairs_is_listed_by_sorted_relative_path(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a.png", "b/10.webp", ".hidden.png", ".cache/x.png", "notes.md"):
        _write(tmp_path / name, b"x")
    _write(tmp_path / "a.txt", "first\n")
    _write(tmp_path / "b" / "2.txt", b"caf\xe9")
    rows = _rows(tmp_path)
    assert [row.source_id for row in rows] == ["a.png", "b/10.webp", "b/2.JPG"]
    assert [row.caption for row in rows] == ["first\n", None, "caf\ufffd"]
    assert _reasons(rows) == [None, None, "invalid_utf8"]


def test_a_table_may_name_relative_absolute_object_store_and_web_places(tmp_path: Path) -> None:
    places = {
        "x.png": (str(tmp_path / "x.png"), None),
        "/data/y.png": ("/data/y.png", None),
        "s3://bucket/z.png": ("s3://bucket/z.png", None),
        "https://example.org/w.png?size=1": ("https://example.org/w.png?size=1", None),
        "../v.png": ("", "path_escapes_source"),
        "ftp://example.org/u.png": ("", "unsupported_url"),
        "simplecache::https://example.org/t.png": ("", "unsupported_url"),
        "nowhere://bucket/s.png": ("", "unsupported_url"),
    }
    table = _write(tmp_path / "pairs.tsv", "url\tcaption\n" + "".join(f"{place}\tc\n" for place in places))
    rows = _rows(table)
    assert [(row.image, row.defect and row.defect[0]) for row in rows] == list(places.values())
    assert [row.source_id for row in rows] == list(places)


def test_a_parquet_table_gives_its_text_columns(tmp_path: Path) -> None:
    captions = pa.array(["one", None, "one"]).dictionary_encode()
    table = pa.table({"URL": ["a.png", "b.png", "c.png"], "TEXT": captions, "weights": [[1.0], [2.0], []]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    rows = _rows(tmp_path / "pairs.parquet")
    assert [(row.source_id, row.caption) for row in rows] == [
        ("a.png", "one"),
        ("b.png", None),
        ("c.png", "one"),
    ]


def test_a_parquet_string_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    broken = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "text": broken}), tmp_path / "pairs.parquet")
    assert _reasons(_rows(tmp_path / "pairs.parquet")) == [None, "invalid_utf8"]


def test_bad_lines_of_jsonl_are_counted_rows(tmp_path: Path) -> None:
    lines = [
        b'{"file_name": "a.png", "text": "good"}',
        b'{"file_name": "b.png", "text": ',
        b'["c.png", "text"]',
        b'{"text": "names no image"}',
        b'{"file_name": "d.png", "text": ["two", "captions"]}',
        b'{"file_name": "e.png", "text": "caf\xe9"}',
        rb'{"file_name": "f.png", "text": "\ud800"}',
        b'{"file_name": "../g.png", "text": "outside"}',
        b'{"file_name": "/etc/hostname", "text": "outside"}',
        b'{"file_name": "file:///etc/hostname", "text": "outside"}',
        b'{"file_name": "x/../../h.png", "text": "outside"}',
        b'{"file_name": "./x/../a.png", "text": "again"}',
        b'{"file_name": "i.png"}',
        b'{"file_name": "j.png", "text": 7}',
        rb'{"file_name": "k\u0000.png", "text": "nul"}',
        b"[" * 100_000,
        '{"file_name": "l.png", "text": "one\u2028line"}'.encode(),
    ]
    _write(tmp_path / "metadata.jsonl", b"\n".join(lines))
    rows = _rows(tmp_path)
    assert len(rows) == len(lines)
    assert _reasons(rows) == [
        None,
        *["malformed_row"] * 4,
        *["invalid_utf8"] * 2,
        *["path_escapes_source"] * 4,
        "duplicate_key",
        None,
        None,
        *["malformed_row"] * 2,
        None,
    ]
    assert rows[1].source_id == "metadata.jsonl:2" and "metadata.jsonl:2" in str(rows[1].defect)
    assert rows[5].source_id == "e.png" and rows[12].caption is None and rows[13].caption == "7"
    for row in rows:
        (row.source_id + (row.caption or "") + str(row.defect)).encode()


def test_bad_lines_of_csv_are_counted_rows(tmp_path: Path) -> None:
    table = _write(tmp_path / "pairs.csv", b'path,text\na.png,good\nb.png,too,many\nc.png\nd.png,"open\n')
    rows = _rows(table)
    assert _reasons(rows) == [None, "malformed_row", "malformed_row", "malformed_row"]
    assert [row.source_id for row in rows[1:]] == ["pairs.csv:3", "pairs.csv:4", "pairs.csv:5"]


def test_a_file_name_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    _write(tmp_path / "a.png", b"x")
    try:
        _write(Path(os.fsdecode(bytes(tmp_path) + b"/b\xe9.png")), b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    rows = _rows(tmp_path)
    assert _reasons(rows) == [None, "invalid_utf8"] and rows[1].source_id == "b\ufffd.png"


def test_columns_can_be_named(tmp_path: Path) -> None:
    table = _write(tmp_path / "pairs.csv", "where,what,text\na.png,x,y\n")
    row = _rows(table, image_column="where", caption_column="what")[0]
    assert (row.source_id, row.caption) == ("a.png", "x")


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    table = _write(tmp_path / "pairs.csv", "path,text\n" + "".join(f"{i}.png,c\n" for i in range(9)))
    assert [row.source_id for row in _rows(table, limit=2)] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("files", "fields", "sentence"),
    [
        ({}, {"path": "absent"}, "absent does not exist: give an existing folder"),
        ({}, {"path": None}, "no source was given"),
        ({}, {"path": "https://example.org/pairs.parquet"}, "is a web address: copy the table"),
        ({}, {"path": "nowhere://bucket/pairs.csv"}, "cannot be read .*Protocol not known"),
        ({}, {"path": "memory://no-such-folder"}, "does not exist"),
        ({"a.png": "x", "b.tar": "x"}, {"path": "."}, "holds images and .tar archives: set source.kind="),
        ({"a.png": "x"}, {"path": ".", "kind": "webdataset"}, "holds no .tar"),
        ({"a.csv": "path,text\n"}, {"path": "a.csv", "kind": "webdataset"}, "is a file"),
        ({}, {"path": "."}, "has no rows"),
        ({"metadata.jsonl": "\n\n"}, {"path": "."}, "has no rows"),
        ({"metadata.jsonl": "not json\n{]\n"}, {"path": "."}, "not one row of .*metadata.jsonl can be read"),
        ({"pairs.parquet": "PAR1"}, {"path": "pairs.parquet"}, "cannot be read as Parquet"),
        ({"pairs.xlsx": "x"}, {"path": "pairs.xlsx"}, "no known format: .*\\.csv, \\.tsv"),
        (
            {"a.csv": "path,txt\na,b\n"},
            {"path": "a.csv"},
            "lacks a column named text or caption; it has path, txt: .*=txt",
        ),
        (
            {"a.csv": "path,text\na,b\n"},
            {"path": "a.csv", "image_column": "paths"},
            "lacks the column 'paths'.*=path$",
        ),
        ({"a.csv": "path,text\n"}, {"path": "a.csv", "kind": "folder"}, "is a file"),
        ({"a.csv": "path,text\n"}, {"path": ".", "kind": "table"}, "is a folder"),
        ({}, {"path": ".", "kind": "shapes"}, "built in"),
    ],
)
def test_a_source_that_cannot_be_listed_gets_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict, fields: dict, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        _write(tmp_path / name, content)
    with pytest.raises(UserError, match=sentence) as caught:
        sources.describe(SourceConfig.model_validate(fields))
    assert "\n" not in str(caught.value)


def _cells(path: Path, count: int, **columns: list[Any]) -> Path:
    images = [{"bytes": f"{path.name} {i}".encode() * 100, "path": f"{i}.png"} for i in range(count)]
    table = {"image": images, "text": [f"caption {i}" for i in range(count)], "id": list(range(count))}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), path, compression="none", use_dictionary=False)
    return path


def test_the_images_of_a_parquet_are_listed_without_being_read(tmp_path: Path) -> None:
    file = _cells(tmp_path / "train.parquet", 3)
    content = file.read_bytes()
    rows = _rows(file)
    assert [(row.source_id, row.caption, row.within) for row in rows] == [
        (f"train.parquet:{i + 1}", f"caption {i}", Cell(i, "image")) for i in range(3)
    ]
    at = content.index(b"train.parquet 0") - 60
    file.write_bytes(content[:at] + b"\xff" * 600 + content[at + 600 :])
    assert [row.caption for row in _rows(file)] == [row.caption for row in rows]
    with Originals(1000) as originals:
        assert [getattr(original, "reason", None) for original in originals.read_all(rows)] == [
            "unreadable"
        ] * 3


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    for part in range(2):
        _cells(tmp_path / "data" / f"train-{part}.parquet", 2)
    pq.write_table(pa.table({"url": ["https://example.org/x.png"], "text": ["x"]}), tmp_path / "urls.parquet")
    _write(tmp_path / "README.md", "---")
    rows = _rows(tmp_path)
    assert [row.source_id for row in rows] == [
        *[f"data/train-{part}.parquet:{i}" for part in range(2) for i in (1, 2)],
        "https://example.org/x.png",
    ]
    assert [row.index for row in rows] == list(range(5)) and rows == _rows(tmp_path, kind="table")
    with Originals(10_000) as originals:
        assert list(originals.read_all(rows[1:3])) == [b"train-0.parquet 1" * 100, b"train-1.parquet 0" * 100]


def test_the_column_of_image_bytes_can_be_named(tmp_path: Path) -> None:
    file = _cells(tmp_path / "a.parquet", 2, mask=[b"m0", b"m1"])
    rows = _rows(file, image_column="mask", caption_column="id")
    assert [(row.caption, row.within) for row in rows] == [("0", Cell(0, "mask")), ("1", Cell(1, "mask"))]
    with pytest.raises(UserError, match="lacks the column 'masks'"):
        _rows(file, image_column="masks")


def test_a_folder_in_an_object_store_is_listed_like_one_here(tmp_path: Path) -> None:
    url = f"memory://sources-{uuid4().hex}"
    files = {"b/2.JPG": "x", "a.png": "x", "a.txt": "first", "b/.hidden.png": "x", ".cache/y.png": "x"}
    for name, content in files.items():
        _write(tmp_path / name, content)
        storage.write_bytes(f"{url}/{name}", content.encode())
    here, there = _rows(tmp_path), list_rows(SourceConfig(path=f"{url}/"))
    assert [row.source_id for row in here] == [row.source_id for row in there] == ["a.png", "b/2.JPG"]
    assert [row.image for row in there] == [f"{url}/a.png", f"{url}/b/2.JPG"]
    assert [row.caption_url for row in there] == [f"{url}/a.txt", None]
    with Originals(1000) as originals:
        assert [row.caption for row in originals.with_captions(there)] == [row.caption for row in here]


def test_metadata_and_tables_in_an_object_store_name_what_lies_beside_them() -> None:
    url = f"memory://sources-{uuid4().hex}"
    storage.write_bytes(f"{url}/metadata.csv", b"file_name,text\nx/a.png,c\n../b.png,c\n/c.png,c\n")
    storage.write_bytes(f"{url}/x/a.png", b"x")
    folder, table = (list_rows(SourceConfig(path=path)) for path in (url, f"{url}/metadata.csv"))
    assert [row.image for row in folder] == [row.image for row in table] == [f"{url}/x/a.png", "", ""]
    assert _reasons(folder) == _reasons(table) == [None, "path_escapes_source", "path_escapes_source"]
    assert folder[0].stamp is not None and table[0].stamp is None
    storage.write_bytes(f"{url}/prompts.jsonl", b'{"text": "a cat"}')
    assert [prompt.text for prompt in sources.prompts(SourceConfig(path=url))] == ["a cat"]
    assert [prompt.text for prompt in sources.prompts(SourceConfig(path=f"{url}/metadata.csv"))] == ["a cat"]


def test_an_archive_beside_the_images_is_left_out_when_the_kind_is_given(tmp_path: Path) -> None:
    _write(tmp_path / "a.png", "x")
    _write(tmp_path / "b.tar", bytes(10_240))
    assert [row.source_id for row in _rows(tmp_path, kind="folder")] == ["a.png"]
    with pytest.raises(UserError, match="has no rows"):
        _rows(tmp_path, kind="webdataset")


def test_an_identity_follows_what_a_row_says_and_what_its_file_shows() -> None:
    row = Row(3, "/x/a.png", "caption", "a.png", stamp="5-1")
    others = [
        replace(row, caption="Caption"),
        replace(row, caption=None),
        replace(row, caption=""),
        replace(row, source_id="b.png"),
        replace(row, stamp="5-2"),
        replace(row, stamp=None),
        replace(row, defect=("missing_image", "x")),
    ]
    assert len({sources.row_identity(other) for other in [row, *others]}) == 8
    elsewhere = replace(row, index=9, image="/y/a.png")
    assert sources.row_identities([row, elsewhere]).tolist() == [sources.row_identity(row)] * 2


def test_the_digest_follows_content_and_not_place(tmp_path: Path) -> None:
    def digest(name: str, caption: str = "c", payload: bytes = b"x", time: int = 5) -> str:
        image = _write(tmp_path / name / "a.png", payload)
        _write(tmp_path / name / "a.txt", caption)
        os.utime(image, (time, time))
        return sources.source_digest(SourceConfig(path=str(tmp_path / name)))

    first = digest("one")
    assert digest("two") == first
    assert len({first, digest("one", caption="d"), digest("one", payload=b"xy"), digest("one", time=6)}) == 4


def test_the_digest_sees_an_image_appear(tmp_path: Path) -> None:
    _write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "c"}\n')
    config = SourceConfig(path=str(tmp_path))
    before = sources.describe(config)
    _write(tmp_path / "a.png", b"x")
    assert before.rows == 1 and sources.describe(config).digest != before.digest


def test_a_built_in_dataset_is_described_before_it_is_drawn() -> None:
    config = SourceConfig(kind="shapes", count=12, seed=3)
    assert sources.describe(config).rows == 12
    assert sources.describe(config.model_copy(update={"limit": 5})).rows == 5
    assert sources.describe(SourceConfig(kind="digits", count=10**6)).rows < 10**6
    others = [{"count": 13}, {"seed": 4}, {"kind": "digits"}, {"limit": 5}]
    digests = {sources.source_digest(config.model_copy(update=other)) for other in [{}, *others]}
    assert len(digests) == 5


def test_a_built_in_dataset_becomes_a_folder_of_real_images(tmp_path: Path) -> None:
    config = sources.materialise(SourceConfig(kind="shapes", count=3, limit=2), tmp_path)
    assert sources.materialise(SourceConfig(kind="shapes", count=3, limit=2), tmp_path) == config
    rows = list_rows(config)
    assert config.kind == "folder" and len(rows) == 2
    with Image.open(rows[0].image) as image:
        assert image.size == (32, 32)
    prompts = sources.prompts(config, limit=4)
    assert len(prompts) == 4 and all(prompt.text and prompt.truth for prompt in prompts)


def test_a_source_of_files_is_its_own_material(tmp_path: Path) -> None:
    config = SourceConfig(path=str(tmp_path))
    assert sources.materialise(config, tmp_path / "unused") is config


def test_prompts_are_read_where_there_are_any(tmp_path: Path) -> None:
    config = SourceConfig(path=str(tmp_path))
    assert sources.prompts(config) == []
    file = _write(
        tmp_path / "prompts.jsonl",
        '{"text": "a cat", "heldout": true}\n\n{"text": "a dog", "truth": {"n": 1}}\n',
    )
    found = sources.prompts(config)
    assert [(prompt.text, prompt.heldout, prompt.truth) for prompt in found] == [
        ("a cat", True, None),
        ("a dog", False, {"n": 1}),
    ]
    file.write_text('{"text": "a cat"}\n{"txt": "a dog"}\n')
    with pytest.raises(UserError, match=r"line 2 of .*prompts\.jsonl is no prompt"):
        sources.prompts(config)
