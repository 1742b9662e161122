"""Two runs held against each other: what was set, what it was made from, what came out, what it cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data import columns, storage
from data.errors import UserError
from data.manifest import ShardRecord, Snapshot
from flows import assignments, runs, settings
from flows.comparing import measured_of, side_by_side
from flows.lineage import made_for
from flows.side_by_side import Pair, page
from stages.failures import table_of
from stages.pictures import png
from stages.prompts import read_prompts

SHOWN = 24
"""Prompts on the page, evenly spaced among those in common."""
UNTOLD = ("name", "summary", "expected_seconds")
"""Of a recipe, what is no setting."""


def diff(root: str, names: tuple[str, str], out: str | None) -> dict[str, Any]:
    """What `diff --json` prints: {"runs", "config", "data", "metrics", "samples", "spend"}; a page of pictures goes to `out`.

    What one of the two does not have, or has no more, is null. Raises UserError for the same run twice, and for `out` where
    the two drew no prompt in common.
    """
    records = [runs.find(root, name) for name in names]
    first, second = (record["run"] for record in records)
    if first == second:
        raise UserError(f"{' and '.join(names)} are the same run: name two")
    made = [made_for(root, record) for record in records]
    found = {
        "runs": [first, second],
        "config": _config(*(record.get("recipe") or {} for record in records)),
        "data": _of_both(_data, made, "shard"),
        "metrics": _metrics(root, first, second),
        "samples": _of_both(_samples, made, "generate"),
        "spend": _spend(*made),
    }
    if out is not None:
        _show(found, made, out)
    return found


def _of_both(question: Any, made: Sequence[Mapping[str, Snapshot]], stage: str) -> Any:
    return question(made[0][stage], made[1][stage]) if all(stage in each for each in made) else None


def _config(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings that differ; `operational` ones say how and not what, and are in no fingerprint."""
    fields = assignments.paths()
    then, now = settings.flat(a), settings.flat(b)
    return [
        {
            "path": path,
            "a": then.get(path),
            "b": now.get(path),
            "operational": _is_operational(fields.get(path)),
        }
        for path in dict.fromkeys([*then, *now])
        if then.get(path) != now.get(path) and path.split(".")[0] not in UNTOLD
    ]


def _is_operational(field: Any) -> bool:
    return bool(field and (field.json_schema_extra or {}).get("operational"))


def _data(a: Snapshot, b: Snapshot) -> dict[str, Any]:
    """`added` and `removed` count written samples, each told by its original's bytes and its caption."""
    shared = {s.digest for s in a.shards} & {s.digest for s in b.shards}
    apart = [[s for s in made.shards if s.digest not in shared] for made in (a, b)]
    removed, added = _uncommon(_contents(a, apart[0]), _contents(b, apart[1]))
    return {
        "source": [made.facts.get("source") for made in (a, b)],
        "digest": [made.config.get("source_digest") for made in (a, b)],
        "samples": [a.samples, b.samples],
        "added": added,
        "removed": removed,
        "shards": [len(a.shards), len(b.shards)],
        "shared_shards": len(a.shards) - len(apart[0]),
        "ledger": [made.ledger.model_dump() for made in (a, b)],
    }


def _contents(made: Snapshot, records: Sequence[ShardRecord]) -> np.ndarray:
    """(n,) uint64: a hash of each written sample's original and caption."""
    return np.fromiter((h for record in records for h in _hashes(made.folder, record)), np.uint64)


def _hashes(folder: str, record: ShardRecord) -> Iterator[int]:
    for row in table_of(folder, record, ["status", "sha256", "caption"]).to_pylist():
        if row["status"] == "success":
            content = f"{row['sha256']}\0{row['caption']}".encode("utf-8", "surrogatepass")
            yield int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _uncommon(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many of `a` are not in `b`, and of `b` not in `a`, equal ones counted as often as they occur."""
    _, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    counts = [np.bincount(part, minlength=len(codes)) for part in (codes[: len(a)], codes[len(a) :])]
    surplus = counts[1] - counts[0]
    return int(-surplus[surplus < 0].sum()), int(surplus[surplus > 0].sum())


def _metrics(root: str, a: str, b: str) -> dict[str, Any] | None:
    """As `compare`; `alone` names what only one of the two measured."""
    try:
        measured = {name: measured_of(root, name) for name in (a, b)}
    except UserError:
        return None
    alone = {a: sorted({*measured[a]} - {*measured[b]}), b: sorted({*measured[b]} - {*measured[a]})}
    return side_by_side(measured) | {"alone": alone}


def _samples(a: Snapshot, b: Snapshot) -> dict[str, Any]:
    pairs = _same_prompts(a, b)
    is_alike = all(a.config.get(name) == b.config.get(name) for name in ("seed", "images_per_prompt"))
    return {
        "pictures": [a.samples, b.samples],
        "same_prompts": len(pairs),
        "same_noise": is_alike and all(i == j for _, i, j in pairs),
    }


def _same_prompts(a: Snapshot, b: Snapshot) -> list[tuple[str, int, int]]:
    """(prompt, its picture's index in `a`, in `b`), the k-th picture of a prompt with the k-th."""
    there = _numbered(b)
    return [(text, i, there[text, k]) for (text, k), i in _numbered(a).items() if (text, k) in there]


def _numbered(made: Snapshot) -> dict[tuple[str, int], int]:
    seen: dict[str, int] = {}
    found = {}
    for index, prompt in enumerate(read_prompts(made.folder)):
        found[prompt.text, seen.setdefault(prompt.text, 0)] = index
        seen[prompt.text] += 1
    return found


def _spend(a: Mapping[str, Snapshot], b: Mapping[str, Snapshot]) -> list[dict[str, Any]]:
    """Seconds that each stage's artifact took to make; `shared`: both runs use one artifact."""
    return [
        {
            "stage": stage,
            "a": a[stage].seconds if stage in a else None,
            "b": b[stage].seconds if stage in b else None,
            "shared": stage in a and stage in b and a[stage].digest == b[stage].digest,
        }
        for stage in dict.fromkeys([*a, *b])
    ]


def _show(found: Mapping[str, Any], made: Sequence[Mapping[str, Snapshot]], out: str) -> None:
    pairs = _of_both(_same_prompts, made, "generate")
    if not pairs:
        raise UserError(
            f"--out {out}: {' and '.join(found['runs'])} drew no prompt in common, so no page was written"
        )
    chosen = np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).round().astype(int)
    a, b = (each["generate"] for each in made)
    shown = [
        Pair(text, png(_picture(a, i)), png(_picture(b, j))) for text, i, j in (pairs[at] for at in chosen)
    ]
    storage.write_bytes(out, page(found, shown).encode())


def _picture(made: Snapshot, index: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    for shard in made.shards:
        if index < shard.samples:
            return np.array(columns.open_array(made.folder, "generated", shard.index)[index])
        index -= shard.samples
    raise AssertionError("a prompt has no picture")
