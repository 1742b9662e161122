"""Where pairs come from: a listing of rows in a fixed order, made without opening one image.

    folder           metadata.jsonl, .csv or .parquet naming files of the folder (the ImageFolder convention);
                     without one, every NAME.jpg with its NAME.txt, by sorted relative path
    table            a CSV, TSV, JSONL or Parquet file of places and captions; relative paths start at its folder, object
                     stores and web addresses are taken too; or Parquet, one file or a folder of them, with image bytes
    webdataset       .tar shards: one, a folder of them, or a pattern with braces such as shards/{00000..00099}.tar
    shapes, digits   built-in datasets, drawn into a folder first (`materialise`)

All but the built-in ones lie at a path or at any fsspec URL. A row that is bad before its image is read carries a defect: it
is counted, and never moves the rows after it.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from data import builtin, folders, storage
from data.cells import BYTES_COLUMNS
from data.config import Config, fingerprint, operational
from data.listing import rows_at
from data.records import reading, refuse
from data.rows import Row
from data.tables import CAPTION_COLUMNS, PLACE_COLUMNS, Columns


class SourceConfig(Config):
    """Which pairs to read."""

    kind: Literal["auto", "folder", "table", "webdataset", "shapes", "digits"] = Field(
        default="auto",
        description="auto: what lies at `path`; shapes and digits are built in and take no path",
    )
    path: str | None = operational(
        None,
        description="a folder, a table, or .tar archives with {00..99} in their names, here or at an fsspec URL; "
        "the content counts, not the place",
    )
    limit: int | None = operational(None, ge=1, description="take the first rows only")
    image_column: str | None = Field(
        default=None,
        description=f"column of the places, None: one of {', '.join(PLACE_COLUMNS)}; or of image bytes in a Parquet, "
        f"None: one of {', '.join(BYTES_COLUMNS)}",
    )
    caption_column: str | None = Field(
        default=None,
        description=f"column of the captions, None: {' or '.join(CAPTION_COLUMNS)}; of archives, the field of the json "
        "member, None: the txt member, else as before",
    )
    count: int = Field(default=6000, ge=1, description="pictures that a built-in dataset draws")
    seed: int = Field(default=0, ge=0, description="seed of a built-in dataset")


@dataclass(frozen=True, eq=False)
class SourceSummary:
    """What a plan needs to know of a source."""

    digest: str
    rows: int
    identities: np.ndarray | None
    """(rows,) uint64, `row_identity` of each row in order; None for a built-in dataset, which never grows."""


class Prompt(Config):
    """A text to draw for evaluation, and what its picture must show where the dataset knows that."""

    text: str
    heldout: bool = False
    truth: dict[str, Any] | None = None


def materialise(config: SourceConfig, folder: Path) -> SourceConfig:
    """The source as files: draws a built-in dataset into a folder of its own under `folder`; others come back unchanged.

    Drawing the same dataset again finds it there and does nothing.
    """
    if not is_builtin(config):
        return config
    _refuse_path(config)
    target = builtin.draw(config.kind, config.count, config.seed, folder)
    return SourceConfig(kind="folder", path=str(target), limit=config.limit)


def list_rows(config: SourceConfig) -> list[Row]:
    """Every row in its fixed order, at most `limit`; of rows with one id only the first is sound.

    Raises UserError for a missing, empty or unreadable source, an unknown format, or a column that is not there.
    """
    place, columns = _place(config), Columns(config.image_column, config.caption_column)
    rows = list(_without_duplicates(itertools.islice(rows_at(place, config.kind, columns), config.limit)))
    if not rows:
        suffixes = ", ".join(sorted(folders.IMAGE_SUFFIXES))
        refuse(
            f"{place} has no rows",
            f"give a folder with images ({suffixes}) or a metadata file, a table, or .tar archives",
        )
    return rows


def source_digest(config: SourceConfig) -> str:
    """Identity of the rows without opening an image: ids, captions and defects, sizes and modification times.

    Objects behind URLs are taken as immutable. A built-in dataset is identified by what draws it. Raises as `list_rows`.
    """
    return describe(config).digest


def describe(config: SourceConfig) -> SourceSummary:
    """Digest and number of rows; a built-in dataset need not have been drawn. Raises as `list_rows`."""
    if is_builtin(config):
        _refuse_path(config)
        rows = builtin.pictures(config.kind, config.count)
        digest = builtin.digest(config.kind, config.count, config.seed, config.limit)
        return SourceSummary(digest=digest, rows=min(rows, config.limit or rows), identities=None)
    identities = row_identities(list_rows(config))
    return SourceSummary(digest=digest_of(identities), rows=len(identities), identities=identities)


def digest_of(identities: np.ndarray) -> str:
    """The digest of a source with these rows (rows,) uint64 in this order."""
    return fingerprint(hashlib.sha256(identities.astype("<u8").tobytes()).hexdigest())


def is_builtin(config: SourceConfig) -> bool:
    """Whether the source is drawn and not read."""
    return config.kind in builtin.GENERATORS


def row_identities(rows: Sequence[Row]) -> np.ndarray:
    """(rows,) uint64: `row_identity` of each row."""
    return np.fromiter(map(row_identity, rows), np.uint64, len(rows))


def row_identity(row: Row) -> int:
    """64 bits of SHA-256 that change when the row's id, caption, defect or stamp does (`storage.Entry.stamp`).

    The stamp is that of the local image, of the archive or Parquet that holds it, or of the objects of a remote folder; what
    a table names elsewhere has none and is taken as immutable. No file is looked at.
    """
    reason = row.defect[0] if row.defect else ""
    caption = "" if row.caption is None else f"+{row.caption}"
    content = f"{row.source_id}\0{reason}\0{row.stamp or ''}\0{caption}"
    return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def prompts(config: SourceConfig, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of `prompts.jsonl` in the source's folder; none where there is no such file.

    Raises UserError naming the line that is no prompt.
    """
    place = _place(config)
    with reading(place):
        file = f"{place if storage.is_folder(place) else posixpath.dirname(place)}/prompts.jsonl"
        payload = storage.read_bytes(file) if storage.exists(file) else b""
    found: list[Prompt] = []
    for number, line in enumerate(payload.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                found.append(Prompt.model_validate_json(line))
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                refuse(
                    f"line {number} of {file} is no prompt ({problem})",
                    'write {"text": …, "heldout": …, "truth": …}',
                )
    return found[:limit]


def _refuse_path(config: SourceConfig) -> None:
    if config.path is not None:
        refuse(
            f"source.kind={config.kind} is built in, but the path {config.path} was given too",
            "give one of the two",
        )


def _place(config: SourceConfig) -> str:
    """The absolute path or the URL of the source, without a slash at its end. Raises UserError where there can be none."""
    assert not is_builtin(config), f"{config.kind} must be materialised before its files are asked for"
    if config.path is None:
        refuse("no source was given", "name a folder or a table with --data, or set source.kind=shapes")
    if config.path.lower().startswith(("http://", "https://", "ftp://")):
        refuse(
            f"{config.path} is a web address",
            "copy the table, the folder or the archives here or to an object store; a table may name images on the web",
        )
    if storage.is_local(config.path):
        return str(storage.local_path(config.path).expanduser().absolute())
    return config.path.rstrip("/")


def _without_duplicates(rows: Iterable[Row]) -> Iterator[Row]:
    first: dict[str, int] = {}
    for row in rows:
        earlier = row.index if row.defect else first.setdefault(row.source_id, row.index)
        problem = ("duplicate_key", f"row {earlier} already names this image")
        yield row if earlier == row.index else replace(row, defect=problem)
