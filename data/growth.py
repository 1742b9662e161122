"""How a sharded dataset grows: which rows of a source its shards already attempted, which are new, which may be tried again.

Every snapshot of a growing artifact has a file of rows: one line per attempted row, in the order of the shards. A state of
the source extends a snapshot when every row that was written is still in it, unchanged; rows that are new, or take the
place of one that was not written, go to new shards behind the old ones, which are never touched.

Legend: R attempted rows of a snapshot, N rows of the source now.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from data import storage
from data.columns import publish
from data.errors import CorruptArtifact
from data.manifest import FileRecord, Ledger, Snapshot

WRITTEN, FILTERED, FAILED = range(3)
ROWS = np.dtype([("identity", "<u8"), ("state", "|u1"), ("reason", "|u1"), ("superseded", "?")])
"""`identity` is `sources.row_identity`; `reason` indexes the snapshot's fact `reasons`; `superseded`: counts no longer."""
_OCCURRENCE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class KnownRows:
    """What a snapshot's shards attempted: (R,) of ROWS, and the words that its reasons index."""

    rows: np.ndarray
    reasons: tuple[str, ...]

    def of_reasons(self, wanted: Collection[str]) -> np.ndarray:
        """Positions (int64) of the rows that failed for one of the `wanted` reasons and were not tried again since."""
        codes = [code for code, reason in enumerate(self.reasons) if reason in wanted]
        failed = (self.rows["state"] == FAILED) & ~self.rows["superseded"]
        return np.flatnonzero(failed & np.isin(self.rows["reason"], codes))

    @property
    def superseded(self) -> Ledger:
        """The rows that count no longer, to be taken off the shards' ledgers."""
        rows = self.rows[self.rows["superseded"]]
        return Ledger(filtered=self._counts(rows, FILTERED), failed=self._counts(rows, FAILED))

    def _counts(self, rows: np.ndarray, state: int) -> dict[str, int]:
        codes, counts = np.unique(rows["reason"][rows["state"] == state], return_counts=True)
        return dict(
            sorted((self.reasons[code], int(count)) for code, count in zip(codes, counts, strict=True))
        )


@dataclass(frozen=True, eq=False)
class Growth:
    """What a state of the source adds to a snapshot."""

    new: np.ndarray
    """Positions (int64) in the source of the rows to attempt, in its order."""
    superseded: np.ndarray
    """Positions (int64) among the known rows of those that count no longer: gone, changed, or tried again. None was written."""


def nothing_known() -> KnownRows:
    """What is known before the first shard."""
    return KnownRows(np.zeros(0, ROWS), ())


def growth(known: KnownRows, identities: np.ndarray, again: Sequence[int] | np.ndarray = ()) -> Growth | None:
    """How the source with `identities` (N,) extends `known`; None when a written row is gone or changed.

    `again` are positions of known rows to attempt once more, such as `known.of_reasons` gives.
    """
    live = np.flatnonzero(~known.rows["superseded"])
    then, now = _numbered(known.rows["identity"][live]), _numbered(identities)
    retried = np.isin(live, np.asarray(again, np.int64))
    gone = ~np.isin(then, now)
    if (known.rows["state"][live[gone]] == WRITTEN).any():
        return None
    return Growth(new=np.flatnonzero(~np.isin(now, then[~retried])), superseded=live[gone | retried])


def grown(
    known: KnownRows, change: Growth, identities: np.ndarray, outcomes: Sequence[tuple[int, str]]
) -> KnownRows:
    """The rows known after `change` was carried out; `outcomes` has of each new row its state and its reason, "" if written."""
    assert len(outcomes) == len(change.new), f"{len(outcomes)} outcomes of {len(change.new)} new rows"
    reasons = tuple(dict.fromkeys([*known.reasons, *(reason for _, reason in outcomes)]))
    assert len(reasons) <= 256, f"{len(reasons)} reasons do not fit a byte"
    codes = {reason: code for code, reason in enumerate(reasons)}
    added = np.zeros(len(outcomes), ROWS)
    added["identity"] = identities[change.new]
    added["state"] = [state for state, _ in outcomes]
    added["reason"] = [codes[reason] for _, reason in outcomes]
    earlier = known.rows.copy()
    earlier["superseded"][change.superseded] = True
    return KnownRows(np.concatenate([earlier, added]), reasons)


def rebuilt(
    before: KnownRows, source: np.ndarray, added: np.ndarray, outcomes: Sequence[tuple[int, str]]
) -> KnownRows:
    """The rows of a snapshot whose list was lost: those `before` it, then the ones that its own shards attempted.

    `source` (N,) are the identities of the source, `added` (n,) those of the rows in the snapshot's own shards, with their
    outcomes. Earlier rows that were not written and are gone from the source, or attempted again, were superseded. True
    of a source that has not lost other rows since: the digest of the lost list tells.
    """
    rows = before.rows
    moved_on = ~np.isin(rows["identity"], source) | np.isin(rows["identity"], added)
    superseded = np.flatnonzero(~rows["superseded"] & (rows["state"] != WRITTEN) & moved_on)
    return grown(before, Growth(np.arange(len(added)), superseded), added, outcomes)


def save(folder: str, fingerprint: str, known: KnownRows) -> FileRecord:
    """Publishes the rows of the snapshot to come; equal rows give equal bytes."""
    return publish(folder, rows_path(fingerprint), encoded(known))


def encoded(known: KnownRows) -> bytes:
    """What `save` writes."""
    buffer = io.BytesIO()
    np.save(buffer, known.rows, allow_pickle=False)
    return buffer.getvalue()


def load(snapshot: Snapshot) -> KnownRows:
    """The rows that `snapshot` attempted. Raises CorruptArtifact when their file is missing or damaged."""
    url = storage.join(snapshot.folder, rows_path(snapshot.fingerprint))
    try:
        rows = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptArtifact(f"{url} cannot be read: {error}") from error
    if rows.dtype != ROWS or rows.ndim != 1:
        raise CorruptArtifact(f"{url} holds {rows.dtype} {rows.shape}, not a list of rows")
    return KnownRows(rows, tuple(snapshot.facts["reasons"]))


def rows_path(fingerprint: str) -> str:
    """Where the rows of a snapshot lie, relative to the artifact's folder."""
    return f"_meta/rows/{fingerprint}.npy"


def _numbered(identities: np.ndarray) -> np.ndarray:
    """`identities` (n,) made distinct: the k-th occurrence of one in it gets k mixed in. Equal multisets stay equal sets."""
    order = np.argsort(identities, kind="stable")
    ordered = identities[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else order
    occurrence = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    numbered = np.empty(len(identities), np.uint64)
    numbered[order] = ordered + occurrence.astype(np.uint64) * _OCCURRENCE
    return numbered
