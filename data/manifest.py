"""What a finished artifact is: ledgers, shard records, snapshots. A snapshot is written last: its existence is completion.

{folder}/                     named {stage}/{key}: what made it
    …                         the artifact's files
    _meta/receipts/00000.json one ShardRecord per finished shard
    _meta/snapshots/{fp}.json one Snapshot: an immutable list of shards and files
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from data import storage
from data.checksums import Checksum, checksum_of
from data.config import Config, canonical_json
from data.errors import CorruptArtifact


class Ledger(Config):
    """Where every attempted row went: attempted = written + filtered + failed, by reason."""

    written: int = 0
    filtered: dict[str, int] = {}
    failed: dict[str, int] = {}

    @property
    def attempted(self) -> int:
        """Rows that were looked at."""
        return self.written + sum(self.filtered.values()) + sum(self.failed.values())

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            written=self.written + other.written,
            filtered=_add_counts(self.filtered, other.filtered),
            failed=_add_counts(self.failed, other.failed),
        )

    def __sub__(self, other: Ledger) -> Ledger:
        return Ledger(
            written=self.written - other.written,
            filtered=_subtract_counts(self.filtered, other.filtered),
            failed=_subtract_counts(self.failed, other.failed),
        )


def _below(path: str) -> str:
    parts = path.split("/")
    if not path or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError("a path leaves its folder")
    return path


def _word(name: str) -> str:
    if "/" in name or name == ".":
        raise ValueError("a name is no part of a path")
    return _below(name)


def _moment(text: str) -> str:
    if text:
        datetime.fromisoformat(text)
    return text


Inside = Annotated[str, AfterValidator(_below)]
"""A relative path that stays below its folder."""
Word = Annotated[str, AfterValidator(_word)]
"""A name that is one part of a path."""
Moment = Annotated[str, AfterValidator(_moment)]
"""ISO 8601, or empty where it is not known."""


class FileRecord(Config):
    """One file of an artifact, by its path relative to the artifact's folder."""

    path: Inside
    bytes: int
    sha256: str
    blocks: str = Field(
        default="",
        description="CRC-32 of each successive MiB, 8 hex digits each: tells where a file changed; empty: not known",
    )


class ShardRecord(Config):
    """The receipt of one finished shard; pure in its inputs, so equal work gives an equal record."""

    index: int = Field(ge=0)
    samples: int = Field(ge=0)
    keys: str = Field(description="digest of the ordered sample keys; equal digests mean row-aligned shards")
    files: tuple[FileRecord, ...]
    ledger: Ledger = Ledger()
    parents: dict[str, str] = Field({}, description="role -> content digest of what this shard was made from")

    @property
    def digest(self) -> str:
        """Content identity: ordered keys and file digests."""
        return hashlib.sha256(
            canonical_json([self.samples, self.keys, [f.model_dump(exclude={"blocks"}) for f in self.files]])
        ).hexdigest()

    def file(self, prefix: str) -> FileRecord:
        """The one file whose path starts with `prefix`."""
        matches = [f for f in self.files if f.path.startswith(prefix)]
        assert len(matches) == 1, f"shard {self.index} has {len(matches)} files under {prefix!r}"
        return matches[0]


START = "start"
"""Role of the weights that a training began with: read once, and no part of what is needed to use its result."""


class Parent(Config):
    """A link of the lineage: which artifact was read, and what it held then."""

    stage: str
    folder: str
    fingerprint: Word
    digest: str


class Snapshot(Config):
    """An immutable, complete artifact: its producer, its parents, its shards and files."""

    format: int = 1
    stage: Word
    version: int
    fingerprint: Word
    config: dict[str, Any]
    columns: tuple[str, ...] = ()
    parents: dict[str, Parent] = {}
    shards: tuple[ShardRecord, ...] = ()
    files: tuple[FileRecord, ...] = ()
    superseded: Ledger = Field(
        Ledger(), description="rows in the shards' ledgers that later shards attempted anew: they count once"
    )
    facts: dict[str, Any] = Field(
        {}, description="small measured facts that readers need: sizes, scales, scores"
    )
    created: Moment = Field("", description="UTC, ISO 8601; not part of the digest")
    seconds: float = Field(0.0, description="wall time of the run that published; not part of the digest")
    device_seconds: dict[str, float] = Field(
        {},
        description="device (cpu, gpu) -> seconds that workers held it, over all attempts; not part of the digest",
    )
    folder: str = Field("", exclude=True, description="where it was read from; never written")

    @property
    def digest(self) -> str:
        """Content identity: everything but when and how long."""
        body = self.model_dump(
            mode="json", exclude={"created", "seconds", "device_seconds", "facts", "parents"}
        )
        body["parents"] = {role: parent.digest for role, parent in self.parents.items()}
        return hashlib.sha256(canonical_json(body)).hexdigest()

    @property
    def samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """The size of its files and of its shards'."""
        return sum(file.bytes for file in (*self.files, *(f for shard in self.shards for f in shard.files)))

    @property
    def ledger(self) -> Ledger:
        """The sum of the shards' ledgers, each row of the source counted once."""
        return sum((shard.ledger for shard in self.shards), Ledger()) - self.superseded

    def as_parent(self) -> Parent:
        """The link that a child records."""
        return Parent(stage=self.stage, folder=self.folder, fingerprint=self.fingerprint, digest=self.digest)


def file_record(folder: str, path: str) -> FileRecord:
    """The record of the file that lies at `path` under the artifact `folder`; reads it once."""
    return recorded(path, checksum_of(storage.join(folder, path)))


def recorded(path: str, found: Checksum) -> FileRecord:
    """The record of a file whose bytes have the checksum `found`."""
    return FileRecord(path=path, bytes=found.bytes, sha256=found.sha256, blocks=found.blocks)


def keys_digest(keys: Iterable[str]) -> str:
    """Digest of an ordered list of sample keys (SHA-256 of the newline-joined keys)."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def snapshot_path(folder: str, fingerprint: str) -> str:
    """Where the snapshot named `fingerprint` of an artifact lies."""
    return storage.join(folder, "_meta", "snapshots", f"{fingerprint}.json")


def receipt_path(folder: str, index: int) -> str:
    """Where the receipt of shard `index` lies."""
    return storage.join(folder, "_meta", "receipts", f"{index:05d}.json")


def publish_snapshot(folder: str, snapshot: Snapshot) -> Snapshot:
    """Commits `snapshot` under `folder` atomically and returns it as `load_snapshot` would."""
    storage.write_bytes(snapshot_path(folder, snapshot.fingerprint), _pretty(snapshot))
    return snapshot.model_copy(update={"folder": folder})


def load_snapshot(folder: str, fingerprint: str) -> Snapshot | None:
    """The snapshot, or None where none was committed. Raises CorruptArtifact when the file is not a snapshot."""
    return _load(Snapshot, snapshot_path(folder, fingerprint), folder=folder)


def snapshots(folder: str) -> list[Snapshot]:
    """Every snapshot committed under `folder`, by fingerprint."""
    listing = storage.list_files(storage.join(folder, "_meta", "snapshots"))
    names = sorted(name for name in listing if name.endswith(".json"))
    loaded = [load_snapshot(folder, name.removesuffix(".json")) for name in names]
    return [snapshot for snapshot in loaded if snapshot is not None]


def publish_receipt(folder: str, record: ShardRecord) -> None:
    """Commits the receipt of one shard atomically."""
    storage.write_bytes(receipt_path(folder, record.index), _pretty(record))


def load_receipt(folder: str, index: int) -> ShardRecord | None:
    """The receipt of shard `index`, or None while the shard is unfinished or its receipt is unreadable."""
    try:
        return _load(ShardRecord, receipt_path(folder, index))
    except CorruptArtifact:
        return None


def _load(kind: type, path: str, **extra: Any) -> Any:
    try:
        payload = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        loaded = kind.model_validate_json(payload)
    except ValueError as error:
        raise CorruptArtifact(f"{path} is not a {kind.__name__}: {str(error).splitlines()[0]}") from error
    return loaded.model_copy(update=extra) if extra else loaded


def _pretty(record: Config) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


def _add_counts(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {reason: left.get(reason, 0) + right.get(reason, 0) for reason in sorted({*left, *right})}


def _subtract_counts(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    counts = {reason: left.get(reason, 0) - right.get(reason, 0) for reason in sorted({*left, *right})}
    assert min(counts.values(), default=0) >= 0, f"{right} is not part of {left}"
    return {reason: count for reason, count in counts.items() if count}
