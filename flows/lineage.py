"""What made an artifact, from which data: up from a run or an artifact through its parents to the rows of the source."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from data import storage
from data.config import Config, result_fields
from data.errors import CorruptArtifact, UserError
from data.manifest import Parent, Snapshot, load_snapshot, snapshots
from data.stored import name_of, under
from flows import places, runs, settings
from flows.recipes import RECIPES, Recipe, prepare

SNAPSHOTS = "/_meta/snapshots/"
DEPTH = 4
"""How far below its artifact's folder a file lies at most."""


class Source(Config):
    """The rows that shards were made from."""

    kind: str
    path: str | None
    limit: int | None
    rows: int
    """Attempted, each counted once."""
    digest: str
    """Of the rows when the plan was made."""
    is_there: bool | None
    """Whether something lies at the path; None where that was not looked at: built in, or not on this machine."""


class Link(Config):
    """One parent of an artifact."""

    artifact: str
    """Its `id`."""
    is_changed: bool = False
    """It holds other content now than the artifact was made from."""


class Artifact(Config):
    """One thing of the lineage. What is not known of it is None."""

    id: str
    """STAGE/FINGERPRINT."""
    stage: str
    fingerprint: str
    folder: str
    state: Literal["made", "missing", "damaged", "external"]
    """missing: no such snapshot any more; damaged: it cannot be read; external: weights made elsewhere."""
    version: int | None = None
    created: str = ""
    seconds: float | None = None
    samples: int | None = None
    shards: int | None = None
    bytes: int | None = None
    settings: dict[str, tuple[Any, Any]] = {}
    """Path -> (the recipe's value, this artifact's), where they differ."""
    source: Source | None = None
    grown_from: str | None = None
    """The snapshot whose shards come first in it."""
    parents: dict[str, Link] = {}
    """Role -> what was read."""


class Lineage(Config):
    """`artifacts` holds all that anything in `of` was made from, at any distance, each of them once."""

    of: str
    recipe: str
    """Whose settings the artifacts' are held against: the run's own, else the one that differs least."""
    run: dict[str, Any] | None
    tops: tuple[str, ...]
    """`id`s of what nothing else here was made from."""
    artifacts: tuple[Artifact, ...]


def lineage(root: str, place: str) -> Lineage:
    """The lineage of the run `place` under `root`, or of the artifact at a folder, a snapshot or a file of it.

    A parent that is missing, damaged or not what it was is part of the answer. Raises UserError when `place` is nothing
    that was made, CorruptArtifact when its own snapshot cannot be read.
    """
    record = None if "/" in place else runs.find(root, place)
    starts = [*_artifacts_of(root, record).values()] if record else [_artifact_at(root, place)]
    found, made = _walk(starts)
    recipe = _recipe(record, list(made.values()))
    defaults = settings.flat(result_fields(recipe))
    told = tuple(_told(artifact, made.get(artifact.id), defaults) for artifact in found.values())
    above = {id for ids in ancestors(told).values() for id in ids}
    run = {name: record.get(name) for name in ("run", "finished", "seconds")} if record else None
    ids = [_id(thing) for thing in starts]
    tops = [id for id in ids if id not in above] or ids
    return Lineage(of=place, recipe=recipe.name, run=run, tops=tuple(tops), artifacts=told)


def made_for(root: str, record: Mapping[str, Any]) -> dict[str, Snapshot]:
    """Stage -> what it made, of a run's record, as far as that is still there."""
    found = _artifacts_of(root, record)
    return {stage: made for stage, made in found.items() if isinstance(made, Snapshot)}


def ancestors(artifacts: Sequence[Artifact]) -> dict[str, set[str]]:
    """`id` -> `id`s of all that it was made from, at any distance."""
    parents = {a.id: {link.artifact for link in a.parents.values()} for a in artifacts}
    found: dict[str, set[str]] = {}
    for artifact in artifacts:
        above: set[str] = set()
        pending = set(parents[artifact.id])
        while pending:
            above |= pending
            pending = {up for id in pending for up in parents.get(id, ())} - above
        found[artifact.id] = above - {artifact.id}
    return found


def nearest_parents(artifacts: Sequence[Artifact]) -> dict[str, list[str]]:
    """`id` -> `id`s of its parents less those that another parent was made from: what a tree need not draw twice."""
    above = ancestors(artifacts)
    found = {}
    for artifact in artifacts:
        ids = dict.fromkeys(
            link.artifact for link in artifact.parents.values() if link.artifact != artifact.id
        )
        found[artifact.id] = [i for i in ids if not any(i in above[j] and j not in above[i] for j in ids)]
    return found


def _artifacts_of(root: str, record: Mapping[str, Any]) -> dict[str, Snapshot | Artifact]:
    """Stage -> what it made, of every stage that the run wanted and that did not fail."""
    wanted = [stage["name"] for stage in record.get("stages", []) if stage["status"] != "failed"]
    return {
        stage: _made_at(stage, under(root, folder), record.get("fingerprints", {}).get(stage))
        for stage, folder in record.get("folders", {}).items()
        if stage in wanted
    }


def _made_at(stage: str, folder: str, name: str | None) -> Snapshot | Artifact:
    """The snapshot `name`; without one, of runs that did not note it, the newest."""
    told = {"stage": stage, "fingerprint": name or folder.rsplit("/", 1)[-1], "folder": folder}
    id = f"{stage}/{told['fingerprint']}"
    try:
        made = load_snapshot(folder, name) if name else _newest(folder)
    except CorruptArtifact:
        return Artifact(id=id, state="damaged", **told)
    return made or Artifact(id=id, state="missing", **told)


def _newest(folder: str) -> Snapshot | None:
    return max(snapshots(folder), key=lambda s: (len(s.shards), s.created), default=None)


def _artifact_at(root: str, place: str) -> Snapshot:
    folder, _, file = (_there(root, place) + "/").partition(SNAPSHOTS)
    name = file.strip("/").removesuffix(".json")
    if name and "/" not in name and (made := load_snapshot(folder, name)):
        return made
    folder = folder.rstrip("/")
    for _ in range(DEPTH):
        if made := _newest(folder):
            return made
        folder = folder.rpartition("/")[0]
        if folder.endswith(("/", ":")) or not folder:
            break
    raise UserError(
        f"{place} belongs to no finished artifact: give a run's name, or the folder of an artifact such as "
        "runs/store/denoiser/…"
    )


def _there(root: str, place: str) -> str:
    """`place` as it is given, or under `root`."""
    is_whole = not storage.is_local(place) or place.startswith(("/", "~", ".", "file://"))
    try:
        found = places.readable(place)
    except UserError as error:
        if is_whole or not storage.exists(f"{root}/{place}"):
            raise error from None
        found = f"{root}/{place}"
    return str(storage.local_path(found).absolute()) if storage.is_local(found) else found


def _walk(tops: Sequence[Snapshot | Artifact]) -> tuple[dict[str, Artifact], dict[str, Snapshot]]:
    """All that `tops` were made from, and the snapshots of what is there, both by `id`."""
    found: dict[str, Artifact] = {}
    made: dict[str, Snapshot] = {}
    pending = deque(tops)
    while pending:
        thing = pending.popleft()
        if isinstance(thing, Artifact):
            found.setdefault(thing.id, thing)
            continue
        if (id := _id(thing)) in made:
            continue
        links = {}
        for role, parent in thing.parents.items():
            above = _parent(thing, parent)
            pending.append(above)
            is_changed = (
                isinstance(above, Snapshot) and not _is_weights(parent) and above.digest != parent.digest
            )
            links[role] = Link(artifact=_id(above), is_changed=is_changed)
        made[id] = thing
        found[id] = _artifact(thing, "made", parents=links)
    return found, made


def _parent(child: Snapshot, parent: Parent) -> Snapshot | Artifact:
    try:
        for folder in _places(child, parent):
            made = _newest(folder) if _is_weights(parent) else load_snapshot(folder, parent.fingerprint)
            if made:
                return made
    except CorruptArtifact:
        return _artifact(parent, "damaged")
    except (OSError, ValueError):  # a place that cannot be looked at, or none at all
        pass
    if _is_weights(parent) and not (parent.folder.startswith("/") and not storage.exists(parent.folder)):
        return _artifact(parent, "external")
    return _artifact(parent, "missing")


def _places(child: Snapshot, parent: Parent) -> Iterator[str]:
    """Where a parent may lie: in the store of its child, which may have moved, or where it was."""
    own, theirs = name_of(child.folder), name_of(parent.folder)
    if own and theirs:
        yield "/".join([child.folder.rsplit("/", 2)[0], *theirs])
    yield parent.folder


def _is_weights(parent: Parent) -> bool:
    """Whether weights from elsewhere were read, of which a child records the digest of their files and no snapshot."""
    weights = Snapshot(stage=parent.stage, version=0, fingerprint=parent.fingerprint, config={})
    return parent.digest == weights.digest


def _id(thing: Snapshot | Artifact | Parent) -> str:
    return f"{thing.stage}/{thing.fingerprint}"


def _artifact(
    thing: Snapshot | Parent, state: Literal["made", "missing", "damaged", "external"], **more: Any
) -> Artifact:
    return Artifact(
        id=_id(thing),
        stage=thing.stage,
        fingerprint=thing.fingerprint,
        folder=thing.folder,
        state=state,
        **more,
    )


def _told(artifact: Artifact, made: Snapshot | None, defaults: Mapping[str, Any]) -> Artifact:
    """`artifact` with what its snapshot says of it."""
    if made is None:
        return artifact
    then = settings.of_stage(made.stage, made.config)
    return artifact.model_copy(
        update={
            "version": made.version,
            "created": made.created,
            "seconds": made.seconds,
            "samples": made.samples if made.shards else None,
            "shards": len(made.shards) or None,
            "bytes": made.bytes,
            "settings": {p: (defaults[p], v) for p, v in then.items() if p in defaults and defaults[p] != v},
            "source": _source(made),
            "grown_from": made.config.get("after") or None,
        }
    )


def _source(made: Snapshot) -> Source | None:
    given = made.facts.get("source")
    if not isinstance(given, Mapping):
        return None
    path = given.get("path")
    looked = path is not None and storage.is_local(path) and "{" not in path
    return Source(
        kind=given.get("kind", ""),
        path=path,
        limit=given.get("limit"),
        rows=made.ledger.attempted,
        digest=made.config.get("source_digest", ""),
        is_there=storage.exists(path) if looked else None,
    )


def _recipe(record: Mapping[str, Any] | None, made: Sequence[Snapshot]) -> Recipe:
    name = ((record or {}).get("recipe") or {}).get("name")
    known = {recipe.name: recipe for recipe in (*(build() for build in RECIPES.values()), prepare())}
    if name in known:
        return known[name]
    then = [settings.of_stage(s.stage, s.config) for s in made]

    def apart(recipe: Recipe) -> int:
        defaults = settings.flat(result_fields(recipe))
        return sum(p in defaults and defaults[p] != v for paths in then for p, v in paths.items())

    return min(known.values(), key=apart)
