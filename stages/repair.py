"""Makes again what a store lost: flipped bits from their checksums, shards from the source, columns from shards and encoders.

Repairing is a run of the stage that made the damaged shards, with the config and the inputs that their snapshot recorded:
the result is held against what the snapshot says, and the snapshot itself stays as it is. Killed at any time, it leaves a
store that `verify` still finds damaged, and that a second repair mends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import growth, manifest, sources, storage
from data.checksums import checksum_of
from data.config import Config
from data.damage import restored
from data.duplicates import REASONS, Repeat
from data.errors import CorruptArtifact, DarkroomError
from data.inventory import Artifact, Problem, inventory
from data.lease import lease
from data.manifest import ShardRecord, Snapshot
from data.shards import ShardConfig, settle_shard
from data.sources import Row, SourceConfig
from data.verify import Verdict, is_external, parent_folder, verify
from stages import prompts
from stages.catalogue import STAGES
from stages.contract import FanoutConfig, InputRef, Inputs, Progress, Workspace, silent
from stages.fanout import ShardTask, map_shards
from stages.shard import ShardWriting

STAGING = "_repair"
"""Where shards are written anew, in the artifact's folder; gone when the repair ends."""
MADE_AGAIN = ("embed", "encode", "generate", "evaluate")
"""Stages whose shards follow from their inputs alone, to the byte on like machines; `shard` is read from its source."""


class Mended(Config):
    """One thing that is as its manifest says again."""

    uri: str
    how: str


class Repair(Config):
    """What was done, and what `verify` says now; each problem that is left says what to run."""

    mended: tuple[Mended, ...]
    verdict: Verdict


@dataclass(frozen=True)
class _Bench:
    """How to work."""

    fanout: FanoutConfig
    progress: Progress

    def workspace(self, snapshot: Snapshot) -> Workspace:
        return Workspace(snapshot.folder, snapshot.fingerprint, self.fanout, self.progress)


def repair(
    uri: str,
    *,
    found: Verdict | None = None,
    fanout: FanoutConfig | None = None,
    progress: Progress = silent,
) -> Repair:
    """Repairs what `verify` finds at or below `uri`, artifacts before those made from them, on the connected cluster.

    `found` is what it just found, if that is known. Raises UserError as `verify` does; what cannot be made again is in
    the verdict.
    """
    bench = _Bench(fanout or FanoutConfig(), progress)
    before = found or verify(uri)
    if before.ok:
        return Repair(mended=(), verdict=before)
    folders = {problem.folder for problem in before.problems if problem.folder}
    artifacts = {folder: inventory(folder)[0] for folder in folders}
    reasons: dict[str, str] = {}
    in_place: set[str] = set()
    for folder in sorted(folders, key=lambda f: (_order(artifacts[f]), f)):
        with lease(folder):
            try:
                _mend(artifacts[folder], [p for p in before.problems if p.folder == folder], bench, in_place)
            except (DarkroomError, OSError) as error:
                reasons[folder] = str(error)
    after = verify(uri)
    left = {problem.uri for problem in after.problems}
    uris = dict.fromkeys(problem.uri for problem in before.problems if problem.uri not in left)
    mended = tuple(
        Mended(uri=uri, how="mended in place" if uri in in_place else "made again") for uri in uris
    )
    told = tuple(_advised(p, artifacts.get(p.folder), reasons.get(p.folder, "")) for p in after.problems)
    return Repair(mended=mended, verdict=after.model_copy(update={"problems": told}))


def _order(artifact: Artifact) -> int:
    names = list(STAGES)
    return names.index(artifact.newest.stage) if artifact.newest and artifact.newest.stage in names else 0


def _mend(artifact: Artifact, problems: Sequence[Problem], bench: _Bench, in_place: set[str]) -> None:
    snapshot = artifact.newest
    if snapshot is None:
        _forget(artifact, {problem.shard for problem in problems if problem.shard is not None})
        return
    in_place |= {problem.uri for problem in problems if _mended_in_place(artifact, problem)}
    left = [problem for problem in problems if problem.uri not in in_place]
    listed = {shard.index for shard in snapshot.shards}
    shards = {problem.shard for problem in left if problem.shard is not None}
    files = {problem.path for problem in left if problem.path in artifact.files}
    if snapshot.stage in MADE_AGAIN and (shards or files):
        # what belongs to no shard is written along with the first one, or by the stage itself
        first = {min(artifact.shards, default=0)} if files else set()
        _run_again(snapshot, shards | first, bench)
        return
    _forget(artifact, shards - listed)
    if snapshot.stage == "shard":
        _write_shards(snapshot, [s for s in snapshot.shards if s.index in shards], files, bench)


def _mended_in_place(artifact: Artifact, problem: Problem) -> bool:
    """Mends one flipped bit, or a receipt that its snapshot can give back."""
    records = [*artifact.files.values(), *(f for s in artifact.shards.values() for f in s.files)]
    record = next((file for file in records if file.path == problem.path), None)
    if record is not None:
        try:
            payload = restored(problem.uri, record, checksum_of(problem.uri))
        except OSError:
            return False
        if payload is not None:
            storage.write_bytes(problem.uri, payload)
        return payload is not None
    if problem.path.startswith("_meta/receipts/") and artifact.newest:
        known = {shard.index: shard for shard in artifact.newest.shards}
        if problem.shard in known:
            manifest.publish_receipt(artifact.folder, known[problem.shard])
            return True
    return False


def _forget(artifact: Artifact, shards: set[int]) -> None:
    """Removes receipts of shards that no snapshot has: the next run of the recipe makes them anew."""
    for index in shards:
        storage.remove(manifest.receipt_path(artifact.folder, index))


def _run_again(snapshot: Snapshot, shards: set[int], bench: _Bench) -> None:
    """Runs the artifact's stage over the receipts of its sound shards, and keeps its snapshot as it was."""
    stage, inputs = STAGES[snapshot.stage], _inputs(snapshot)
    for index in shards:
        storage.remove(manifest.receipt_path(snapshot.folder, index))
    try:
        made = stage.run(stage.config.model_validate(snapshot.config), inputs, bench.workspace(snapshot))
    finally:
        manifest.publish_snapshot(snapshot.folder, snapshot)
    if made.digest != snapshot.digest:
        raise CorruptArtifact("it was made again, but came out differently")


def _inputs(snapshot: Snapshot) -> Inputs:
    inputs = {}
    for role, parent in snapshot.parents.items():
        external = is_external(parent)
        folder = parent.folder if external else parent_folder(snapshot, parent)
        ref = InputRef(stage=parent.stage, folder=folder, fingerprint=parent.fingerprint, external=external)
        inputs[role] = ref.open()
        if inputs[role].digest != parent.digest:
            raise CorruptArtifact(f"its {role} is not what it was made from any more")
    return inputs


def _write_shards(snapshot: Snapshot, wanted: list[ShardRecord], files: set[str], bench: _Bench) -> None:
    """Writes the wanted shards anew elsewhere, and takes from there what their records name; sound files stay untouched."""
    source = _source(snapshot)
    staging = storage.join(snapshot.folder, STAGING)
    with tempfile.TemporaryDirectory(prefix="darkroom-repair-") as home:
        drawn = sources.materialise(source, Path(home))
        rows = sources.list_rows(drawn)
        if prompts.FILE in files:
            prompts.write_prompts(snapshot.folder, sources.prompts(drawn))
        if not wanted:
            return
        tasks = list(_tasks(snapshot, source, rows, wanted))
        config = ShardConfig.model_validate(snapshot.config["shard"])
        try:
            storage.remove_tree(staging)
            workspace = replace(bench.workspace(snapshot), folder=staging)
            made = map_shards(ShardWriting, {"config": config}, tasks, workspace)
            settled = [_settled(snapshot.folder, staging, record) for record in made]
            differ = [
                w.index
                for m, w in zip(settled, wanted, strict=True)
                if not _placed(snapshot.folder, staging, m, w)
            ]
        finally:
            storage.remove_tree(staging)
    if differ:
        listed = ", ".join(f"{index:05d}" for index in differ)
        raise CorruptArtifact(f"shard {listed} was made again, but came out differently: the source changed")


def _settled(folder: str, staging: str, record: ShardRecord) -> ShardRecord:
    """The shard in `staging` without the repeats that its parquet under `folder` names, where that can be read."""
    try:
        with storage.open_read(storage.join(folder, f"{record.index:05d}.parquet")) as stream:
            lines = pq.read_table(stream, columns=["key", "error_class", "error_message"]).to_pylist()
    except (OSError, pa.ArrowException):
        return record
    dropped = [
        Repeat(line["key"], line["error_class"], line["error_message"].rpartition(" ")[2])
        for line in lines
        if line["error_class"] in REASONS
    ]
    if not dropped:
        return record
    draft = storage.join(staging, "draft")
    for file in record.files:
        storage.write_bytes(
            storage.join(draft, file.path), storage.read_bytes(storage.join(staging, file.path))
        )
    return settle_shard(draft, staging, record.index, dropped)


def _placed(folder: str, staging: str, made: ShardRecord, was: ShardRecord) -> bool:
    """Copies each file of `was` that is damaged and came out as recorded; False when one did not."""
    fresh, all_placed = {file.path: file.sha256 for file in made.files}, True
    for file in was.files:
        url = storage.join(folder, file.path)
        if storage.exists(url) and checksum_of(url).sha256 == file.sha256:
            continue
        if fresh.get(file.path) != file.sha256:
            all_placed = False
            continue
        storage.write_bytes(url, storage.read_bytes(storage.join(staging, file.path)))
    manifest.publish_receipt(folder, was)
    return all_placed


def _source(snapshot: Snapshot) -> SourceConfig:
    recorded = snapshot.facts.get("source")
    if recorded is None:
        raise CorruptArtifact("its snapshot does not say where its source lies")
    return SourceConfig.model_validate(recorded)


def _tasks(
    snapshot: Snapshot, source: SourceConfig, rows: list[Row], wanted: list[ShardRecord]
) -> Iterator[ShardTask]:
    """Each wanted shard's rows as the source has them now, found by identity, whatever their order became."""
    starts = np.cumsum([0, *(shard.ledger.attempted for shard in snapshot.shards)])
    places = {shard.index: n for n, shard in enumerate(snapshot.shards)}
    if sources.is_builtin(source):
        listed, by_identity = np.arange(len(rows)), dict(enumerate(rows))
    else:
        listed = growth.load(snapshot).rows["identity"]
        by_identity = dict(zip(sources.row_identities(rows).tolist(), rows, strict=True))
    for shard in wanted:
        at = places[shard.index]
        identities = listed[starts[at] : starts[at + 1]].tolist()
        lost = sum(identity not in by_identity for identity in identities)
        if lost:
            where = source.path or source.kind
            raise CorruptArtifact(
                f"{lost} of the {len(identities)} rows of shard {shard.index:05d} are gone from {where}"
            )
        chosen = [by_identity[identity] for identity in identities]
        yield ShardTask(shard.index, chosen, dict(shard.parents), len(chosen))


def _advised(problem: Problem, artifact: Artifact | None, reason: str) -> Problem:
    """The problem with why it was not mended, and what the user can do."""
    snapshot = artifact.newest if artifact else None
    told = [problem.problem, *([f"it could not be made again: {reason}"] if reason else [])]
    if problem.path.startswith("_meta/snapshots/"):
        advice = "remove this file and run its recipe again; shards that have receipts are kept"
    elif snapshot is None or "belongs to no snapshot" in problem.problem:
        advice = ""
    elif snapshot.stage == "shard":
        source = snapshot.facts.get("source") or {}
        place = source.get("path") or source.get("kind", "its source")
        advice = f"bring {place} back as it was and repair again, or remove {snapshot.folder} and run its recipe again"
    else:
        advice = f"remove {snapshot.folder} and run its recipe again, which makes {snapshot.stage} anew"
    return problem.model_copy(update={"problem": "; ".join([*told, *([advice] if advice else [])])})
