"""Makes again what a store lost: flipped bits from their checksums, shards from the source, columns from shards and encoders.

Repairing is a run of the stage that made the damaged shards, with the config and the inputs that their snapshot recorded:
the result is held against what the snapshot says, and the snapshot itself stays as it is. Killed at any time, it leaves a
store that `verify` still finds damaged, and that a second repair mends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data import growth, manifest, sources, storage
from data.checksums import checksum_of
from data.config import Config
from data.damage import restored
from data.errors import CorruptArtifact, DarkroomError
from data.inventory import Artifact, Problem, inventory
from data.lease import lease
from data.manifest import ShardRecord, Snapshot
from data.shards import ShardConfig
from data.sources import SourceConfig
from data.verify import Verdict, is_external, parent_folder, verify
from stages import prompts
from stages.catalogue import STAGES, with_gpus
from stages.contract import FanoutConfig, InputRef, Inputs, Progress, Workspace, silent
from stages.fanout import ShardTask, map_shards
from stages.rewriting import ShardRewriting, relist, rewrites, without_repeats

STAGING = "_repair"
"""Where shards are written anew, in the artifact's folder; gone when the repair ends."""
MADE_AGAIN = ("embed", "text", "encode", "generate", "evaluate")
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
    bench = _Bench(with_gpus(fanout or FanoutConfig()), progress)
    before = found or verify(uri)
    if before.ok:
        return Repair(mended=(), verdict=before)
    folders = {problem.folder for problem in before.problems if problem.folder}
    artifacts = {folder: inventory(folder)[0] for folder in folders}
    reasons: dict[str, str] = {}
    in_place: set[str] = set()
    for folder in sorted(folders, key=lambda f: (_order(artifacts[f]), f)):
        try:
            with lease(folder, patience=bench.fanout.lease_seconds, setting="fanout.lease_seconds"):
                # looked for again: a run may have changed the artifact before its lease was ours
                problems = [problem for problem in verify(folder).problems if problem.folder == folder]
                _mend(inventory(folder)[0], problems, bench, in_place)
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
        _shards_again(artifact, snapshot, [s for s in snapshot.shards if s.index in shards], files, bench)


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


def _shards_again(
    artifact: Artifact, snapshot: Snapshot, wanted: list[ShardRecord], files: set[str], bench: _Bench
) -> None:
    """Makes again, from the source, lists of rows, prompts and the wanted shards."""
    source = _source(snapshot)
    with tempfile.TemporaryDirectory(prefix="darkroom-repair-") as home:
        drawn = sources.materialise(source, Path(home))
        rows = sources.list_rows(drawn)
        if prompts.FILE in files:
            prompts.write_prompts(snapshot.folder, sources.prompts(drawn))
        for state in artifact.snapshots:
            if growth.rows_path(state.fingerprint) in files:
                relist(state, artifact.snapshots, rows)
        if wanted:
            _write_shards(snapshot, wanted, list(rewrites(snapshot, source, rows, wanted)), bench)


def _write_shards(
    snapshot: Snapshot, wanted: list[ShardRecord], tasks: list[ShardTask], bench: _Bench
) -> None:
    """Writes the wanted shards anew elsewhere, and takes from there what their records name; sound files stay untouched."""
    staging = storage.join(snapshot.folder, STAGING)
    config = ShardConfig.model_validate(snapshot.config["shard"])
    try:
        storage.remove_tree(staging)
        workspace = replace(bench.workspace(snapshot), folder=staging)
        made = map_shards(ShardRewriting, {"config": config}, tasks, workspace)
        settled = without_repeats(snapshot, staging, made, config)
        differ = [
            was.index
            for now, was in zip(settled, wanted, strict=True)
            if not _placed(snapshot.folder, staging, now, was)
        ]
    finally:
        storage.remove_tree(staging)
    if differ:
        listed = ", ".join(f"{index:05d}" for index in differ)
        raise CorruptArtifact(f"shard {listed} was made again, but came out differently: the source changed")


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
