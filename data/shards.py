"""Shards in img2dataset's layout: written once, reproducible to the byte, read without unpacking.

{i:05d}.tar         the samples that succeeded; of each: {key}.jpg|png|webp, {key}.json, {key}.txt
{i:05d}.parquet     every attempted row
{i:05d}_stats.json  counts, written last
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import mmap
import secrets
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pydantic import Field

from data import captions, images, storage
from data.captions import CaptionRules
from data.columns import parquet_bytes, publish
from data.errors import CorruptArtifact, SampleError
from data.images import ImageRules, Prepared
from data.manifest import FileRecord, Ledger, ShardRecord, keys_digest
from data.sources import Row

BLOCK = 512
RECORD = 20 * BLOCK
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_IMAGE_EXTENSIONS = ("jpg", "png", "webp")

_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
        ("source_id", pa.string()),
    ]
)
"""`url` is the image's place as the source names it, `sha256` that of the original bytes, `error_class` the ledger's
reason; `status` is `success`, `failed_to_download` (no bytes were had), `failed_to_resize` or `filtered`."""


class ShardConfig(ImageRules, CaptionRules):
    """How rows become shards."""

    samples_per_shard: int = Field(
        default=10_000, ge=1, description="rows of the source per shard, whatever fails among them"
    )
    max_failed_fraction: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="the stage fails when a larger part of the dataset's rows failed (filtered ones do not count)",
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row: its line of the parquet, and the picture when it is to be written."""

    fields: dict[str, Any]
    image: Prepared | None = None


def sample_key(index: int, row: int, samples_per_shard: int) -> str:
    """The key of row `row` of shard `index`: five digits of the shard, then the row in at least four.

    With 1,001 to 10,000 samples per shard that is img2dataset's nine-digit key. Keys sort in the order of the source
    and are unique in a dataset.
    """
    width = max(4, len(str(samples_per_shard - 1)))
    return f"{index:05d}{row:0{width}d}"


def attempt(row: Row, key: str, config: ShardConfig) -> Outcome:
    """Reads, checks and prepares one row; whatever is wrong with the row is in the outcome, not raised."""
    fields = dict.fromkeys(_COLUMNS.names) | {
        "key": key,
        "url": row.source_id,
        "caption": row.caption,
        "source_id": row.source_id,
    }
    try:
        if row.defect is not None:
            raise SampleError(*row.defect)
        fields["caption"] = captions.clean(row.caption, config)
        payload = _read_image(row.image, config.max_bytes)
        fields["sha256"] = hashlib.sha256(payload).hexdigest()
        image = images.prepare(payload, config)
    except SampleError as error:
        failed = "failed_to_resize" if fields["sha256"] else "failed_to_download"
        status = "filtered" if error.filtered else failed
        return Outcome(fields | {"status": status, "error_class": error.reason, "error_message": str(error)})
    fields |= {"status": "success", "width": image.width, "height": image.height, "exif": image.exif}
    fields |= {"original_width": image.original_width, "original_height": image.original_height}
    return Outcome(fields, image)


def write_shard(rows: Sequence[Row], index: int, folder: str, config: ShardConfig) -> ShardRecord:
    """Writes shard `index` from its rows of the source under `folder`, an fsspec URL, and returns its record.

    Equal rows and files give equal bytes. Where no row succeeds there is no tar. OSError of the destination, such as a
    full disk, is raised; nothing half-written then lies under a final name.
    """
    assert len(rows) <= config.samples_per_shard, f"shard {index} was given {len(rows)} rows"
    lines: list[dict[str, Any]] = []
    with _scratch_file(folder, f"{index:05d}.tar") as scratch:
        with scratch.open("wb") as stream:
            tar = TarWriter(stream)
            for number, row in enumerate(rows):
                outcome = attempt(row, sample_key(index, number, config.samples_per_shard), config)
                lines.append(outcome.fields)
                if outcome.image is not None:
                    _add_sample(tar, outcome.fields, outcome.image)
            tar.finish()
        keys = [line["key"] for line in lines if line["status"] == "success"]
        files = _publish_tar(scratch, tar, folder, f"{index:05d}.tar") if keys else _remove_tar(folder, index)
    table = parquet_bytes(pa.Table.from_pylist(lines, schema=_COLUMNS))
    files.append(publish(folder, f"{index:05d}.parquet", table))
    files.append(publish(folder, f"{index:05d}_stats.json", _stats(lines)))
    return ShardRecord(
        index=index,
        samples=len(keys),
        keys=keys_digest(keys),
        files=tuple(files),
        ledger=_ledger(lines),
        parents={},
    )


class TarWriter:
    """Writes ustar members that depend on name and content alone: no times, no owners."""

    def __init__(self, stream: BinaryIO) -> None:
        self.bytes = 0
        self._stream = stream
        self._digest = hashlib.sha256()

    def add(self, name: str, payload: bytes) -> None:
        """Appends one file; `name` is ASCII of at most 100 bytes, `payload` below 8 GiB."""
        self._write(b"".join((_tar_header(name, len(payload)), payload, bytes(-len(payload) % BLOCK))))

    def finish(self) -> None:
        """Writes the end of the archive: two zero blocks, then zeros up to a whole record."""
        self._write(bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD))

    @property
    def sha256(self) -> str:
        """Hex digest of all that was written."""
        return self._digest.hexdigest()

    def _write(self, payload: bytes) -> None:
        self._stream.write(payload)
        self._digest.update(payload)
        self.bytes += len(payload)


class ShardReader:
    """Random access to a shard's tar by row; memory-mapped where local, never unpacked; safe to share among threads.

    Opening walks every header once and raises CorruptArtifact, naming the file and the byte, unless the archive ends
    as one should and each sample has its image, json and txt, adjacent, under a key of its own. FileNotFoundError
    where there is no file. `len()` is the number of samples, `keys` names them in order.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._buffer = _map(url)
        try:
            samples = list(_samples(self._buffer, url))
        except BaseException:
            self.close()
            raise
        self.keys = tuple(key for key, _ in samples)
        self._members = [members for _, members in samples]

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, row: int) -> bytes:
        """The encoded picture of sample `row`."""
        return self._payload(row, "image")

    def caption(self, row: int) -> str:
        """The caption of sample `row`. Raises CorruptArtifact when it is not UTF-8."""
        try:
            return self._payload(row, "txt").decode()
        except UnicodeDecodeError as error:
            raise CorruptArtifact(f"{self.url}: the caption of {self.keys[row]} is not UTF-8") from error

    def fields(self, row: int) -> dict[str, Any]:
        """The json member of sample `row`: its line of the parquet. Raises CorruptArtifact when it is not JSON."""
        try:
            return json.loads(self._payload(row, "json"))
        except ValueError as error:
            raise CorruptArtifact(f"{self.url}: the json of {self.keys[row]} cannot be parsed") from error

    def close(self) -> None:
        """Unmaps a local file; nothing may be read afterwards."""
        if isinstance(self._buffer, mmap.mmap):
            self._buffer.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _payload(self, row: int, kind: str) -> bytes:
        start, size = self._members[row][kind]
        return self._buffer[start : start + size]


def _read_image(location: str, max_bytes: int) -> bytes:
    """At most `max_bytes` + 1 bytes, so that what is too large is seen to be and never held."""
    try:
        if not storage.is_local(location):
            with storage.open_read(location) as stream:
                return stream.read(max_bytes + 1)
        path = storage.local_path(location)
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise SampleError(
                "unreadable", "there is something other than a file at the place that the source names"
            )
        with path.open("rb") as file:
            return file.read(min(facts.st_size, max_bytes) + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError("missing_image", "there is no file at the place that the source names") from error
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        raise SampleError(
            "unreadable", f"the file cannot be read: {error.strerror or type(error).__name__}"
        ) from error


def _add_sample(tar: TarWriter, fields: dict[str, Any], image: Prepared) -> None:
    key = fields["key"]
    tar.add(f"{key}.{image.extension}", image.payload)
    tar.add(f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())
    tar.add(f"{key}.txt", fields["caption"].encode())


@contextmanager
def _scratch_file(folder: str, name: str) -> Iterator[Path]:
    """A path to build a file at, on the same file system as a local `folder`; what is left there is deleted."""
    home = storage.local_path(folder) if storage.is_local(folder) else Path(tempfile.gettempdir())
    home.mkdir(parents=True, exist_ok=True)
    path = home / f".tmp-{secrets.token_hex(6)}-{name}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _publish_tar(scratch: Path, tar: TarWriter, folder: str, name: str) -> list[FileRecord]:
    storage.publish_file(scratch, storage.join(folder, name))
    return [FileRecord(path=name, bytes=tar.bytes, sha256=tar.sha256)]


def _remove_tar(folder: str, index: int) -> list[FileRecord]:
    """A killed attempt may have published a tar of rows that have failed since."""
    storage.remove(storage.join(folder, f"{index:05d}.tar"))
    return []


def _stats(lines: Sequence[dict[str, Any]]) -> bytes:
    """img2dataset's keys. Its times would make equal shards differ, and it divides by `duration`: hence a constant 1 s.

    It knows no `filtered`: as with its own filters, those rows are among `failed_to_resize`.
    """
    status = Counter(line["status"] for line in lines)
    stats = {
        "count": len(lines),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"] + status["filtered"],
        "duration": 1.0,
        "start_time": 0.0,
        "end_time": 1.0,
        "status_dict": dict(sorted(Counter(line["error_class"] or "success" for line in lines).items())),
    }
    return (json.dumps(stats, indent=4) + "\n").encode()


def _ledger(lines: Sequence[dict[str, Any]]) -> Ledger:
    filtered = Counter(line["error_class"] for line in lines if line["status"] == "filtered")
    failed = Counter(line["error_class"] for line in lines if line["status"].startswith("failed"))
    written = len(lines) - filtered.total() - failed.total()
    return Ledger(
        written=written, filtered=dict(sorted(filtered.items())), failed=dict(sorted(failed.items()))
    )


_MODE_AND_OWNER = b"0000644\0" + b"0000000\0" * 2
_NO_TIME = b"0" * 11 + b"\0"
_REGULAR = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
_CONSTANT_SUM = sum(_MODE_AND_OWNER) + sum(_NO_TIME) + sum(_REGULAR) + 8 * ord(" ")


def _tar_header(name: str, size: int) -> bytes:
    """One POSIX ustar header block: mode 0644, owner 0, time 0."""
    encoded, digits = name.encode("ascii"), b"%011o" % size
    assert len(encoded) <= 100 and len(digits) == 11, f"{name} of {size} bytes does not fit a ustar header"
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(100, b"\0"), _MODE_AND_OWNER, digits, b"\0", _NO_TIME, checksum, _REGULAR))


def _map(url: str) -> bytes | mmap.mmap:
    if not storage.is_local(url):
        return storage.read_bytes(url)
    with storage.local_path(url).open("rb") as file:
        is_empty = not file.seek(0, 2)
        return b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _samples(buffer: bytes | mmap.mmap, url: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {"image" | "json" | "txt": (start, size)}) of each sample, in the order of the archive."""
    known: set[str] = set()
    groups = itertools.groupby(_members(buffer, url), key=lambda member: member[1].partition(".")[0])
    for key, members in groups:
        found: dict[str, tuple[int, int]] = {}
        offset = 0
        for offset, name, size in members:
            extension = name.partition(".")[2].lower()
            kind = "image" if extension in _IMAGE_EXTENSIONS else extension
            if kind in found or key in known:
                raise _corrupt(url, offset, f"sample {key} has a second {extension}, or lies in two places")
            found[kind] = (offset + BLOCK, size)
        if missing := {"image", "json", "txt"} - set(found):
            raise _corrupt(url, offset, f"sample {key} has no {' and no '.join(sorted(missing))}")
        known.add(key)
        yield key, found


def _members(buffer: bytes | mmap.mmap, url: str) -> Iterator[tuple[int, str, int]]:
    """(offset of the header, name, size) of each file up to the end of the archive, which must be there."""
    offset = 0
    while any(block := buffer[offset : offset + BLOCK]):
        name, size = _parse_header(block, url, offset)
        following = offset + BLOCK + size + -size % BLOCK
        if following > len(buffer):
            raise _corrupt(url, offset, f"{name} has {size} bytes, which the file ends before")
        yield offset, name, size
        offset = following
    tail = buffer[offset:]
    if len(tail) < 2 * BLOCK or any(tail):
        raise _corrupt(url, offset, "the end of the archive is missing: the file was cut or overwritten")


def _parse_header(block: bytes, url: str, offset: int) -> tuple[str, int]:
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    try:
        is_header = int(block[148:156].rstrip(b"\0 "), 8) == checksum and block[156:157] in b"0\0"
        name, size = block[:100].rstrip(b"\0").decode("ascii"), int(block[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        is_header = False
    if not is_header or len(block) < BLOCK:
        raise _corrupt(url, offset, "there is no intact header of a file")
    return name, size


def _corrupt(url: str, offset: int, problem: str) -> CorruptArtifact:
    return CorruptArtifact(f"{url}, byte {offset}: {problem}")
