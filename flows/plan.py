"""What a run would do, and why: pure reading of the store, no Prefect, no Ray, nothing started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data import storage
from data.config import fingerprint, result_fields
from data.errors import CorruptArtifact
from data.manifest import Snapshot, load_snapshot, snapshots
from flows import placing, settings
from flows.estimates import Spending, estimate
from flows.graph import Node
from flows.placing import Place
from flows.recipes import Recipe
from stages import continuation
from stages.contract import InputRef
from training.systems.system import TrainConfig


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan."""

    place: Place
    fingerprint: str
    inputs: Mapping[str, InputRef]
    status: Literal["cached", "pending"]
    reason: str
    spending: Spending
    """cached: what it took; pending: an estimate."""
    snapshot: Snapshot | None

    @property
    def node(self) -> Node:
        """The stage with its config."""
        return self.place.node

    @property
    def folder(self) -> str:
        """Where its artifact lies, or will."""
        return self.place.folder

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.node.name

    def as_json(self) -> dict[str, Any]:
        """What `plan --json` prints of it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "status": self.status,
            "reason": self.reason,
            "uri": self.folder,
            "seconds": self.spending.seconds,
            "device_seconds": dict(self.spending.device_seconds),
            "bytes": self.spending.bytes,
        }


@dataclass(frozen=True)
class Plan:
    """Every stage of a run, in order."""

    recipe: Recipe
    root: str
    run: str
    stages: tuple[PlannedStage, ...]

    @property
    def pending(self) -> tuple[PlannedStage, ...]:
        """The stages that would run, in order."""
        return tuple(stage for stage in self.stages if stage.status == "pending")


def make_plan(recipe: Recipe, nodes: list[Node], root: str) -> Plan:
    """Fingerprints every node and looks up what the store under `root` already holds."""
    planned: dict[str, PlannedStage] = {}
    for node in nodes:
        inputs = {role: _resolve(ref, planned) for role, ref in node.inputs.items()}
        place = _place(node, root, inputs, planned)
        planned[node.name] = _look_up(recipe, place, _name(place.node, inputs), inputs, planned)
    stages = tuple(planned.values())
    return Plan(recipe, root, f"{recipe.name}-{stages[-1].fingerprint[:8]}", stages)


def _name(node: Node, inputs: Mapping[str, InputRef]) -> str:
    identity = {role: ref.fingerprint for role, ref in inputs.items()}
    return fingerprint(node.name, node.stage.version, result_fields(node.config), identity)


def _place(
    node: Node, root: str, inputs: Mapping[str, InputRef], planned: Mapping[str, PlannedStage]
) -> Place:
    if not node.stage.grows:
        return Place(storage.join(root, "store", node.name, _name(node, inputs)), node)
    if "data" not in inputs:
        return placing.of_shards(node, root)
    return placing.of_columns(node, root, inputs, planned[inputs["data"].stage].place)


def _resolve(ref: str | InputRef, planned: Mapping[str, PlannedStage]) -> InputRef:
    if isinstance(ref, InputRef):
        return ref
    stage = planned[ref]
    return InputRef(stage=ref, folder=stage.folder, fingerprint=stage.fingerprint)


def _look_up(
    recipe: Recipe,
    place: Place,
    name: str,
    inputs: Mapping[str, InputRef],
    planned: Mapping[str, PlannedStage],
) -> PlannedStage:
    node, folder = place.node, place.folder
    snapshot, damage = _load(folder, name)
    stale = snapshot and _stale(snapshot, inputs, planned)
    if snapshot and not stale:
        return PlannedStage(place, name, inputs, "cached", "", Spending.of(snapshot), snapshot)
    earlier = _nearest(node, folder, inputs)
    grows = (
        (place.reason or "new shards") if node.stage.grows and earlier and earlier.folder == folder else ""
    )
    reason = (
        damage
        or stale
        or grows
        or _resumes(folder)
        or _continues(place, inputs, planned)
        or _changes(node, inputs, earlier)
    )
    growth = max(1, place.new_shards) / max(1, len(earlier.shards)) if grows and earlier else 1.0
    return PlannedStage(place, name, inputs, "pending", reason, estimate(recipe, node, earlier, growth), None)


def _load(folder: str, name: str) -> tuple[Snapshot | None, str]:
    try:
        return load_snapshot(folder, name), ""
    except CorruptArtifact:
        return None, "its manifest is damaged"


def _stale(snapshot: Snapshot, inputs: Mapping[str, InputRef], planned: Mapping[str, PlannedStage]) -> str:
    for role, parent in snapshot.parents.items():
        ref = inputs.get(role)
        made = planned.get(ref.stage) if ref and not ref.external else None
        if made is None:
            continue
        if made.status == "pending":
            return f"{made.name} is made again"
        if made.snapshot is not None and made.snapshot.digest != parent.digest:
            return f"{made.name} has other content than it was made from"
    return ""


def _resumes(folder: str) -> str:
    if steps := storage.list_folders(storage.join(folder, "checkpoints")):
        done = [name for name in steps if name.startswith("step_")]
        if done:
            return f"resumes at step {int(done[-1].removeprefix('step_')):,}"
    if receipts := storage.list_files(storage.join(folder, "_meta", "receipts")):
        return f"resumes after {len(receipts)} finished shards"
    return ""


def _continues(place: Place, inputs: Mapping[str, InputRef], planned: Mapping[str, PlannedStage]) -> str:
    """From where a training goes on that a shorter one has begun."""
    node, digests = place.node, {}
    if not isinstance(node.config, TrainConfig):
        return ""
    for role, ref in inputs.items():
        made = planned[ref.stage].snapshot if ref.stage in planned else ref.open()
        if made is None:
            return ""
        digests[role] = made.digest
    identity = continuation.trajectory(node.name, node.stage.version, node.config, digests)
    given = continuation.donor(place.folder, node.config, identity)
    return f"continues from step {given.step:,} of {given.artifact}" if given else ""


def _nearest(node: Node, folder: str, inputs: Mapping[str, InputRef]) -> Snapshot | None:
    """The artifact of this stage in the store that differs least from what is wanted, the newest of equals."""
    family = folder.rsplit("/", 1)[0]
    made: list[Snapshot] = []
    for name in storage.list_folders(family):
        try:
            made += snapshots(storage.join(family, name))
        except CorruptArtifact:
            continue
    if not made:
        return None
    return min(
        sorted(made, key=lambda s: s.created, reverse=True), key=lambda s: len(_differences(node, inputs, s))
    )


def _changes(node: Node, inputs: Mapping[str, InputRef], earlier: Snapshot | None) -> str:
    if earlier is None:
        return "not made yet"
    return ", ".join(_differences(node, inputs, earlier)[:3]) or "not made yet"


def _differences(node: Node, inputs: Mapping[str, InputRef], earlier: Snapshot) -> list[str]:
    prefix = settings.SECTIONS.get(node.name, f"{node.name}.")
    now, then = settings.flat(result_fields(node.config)), settings.flat(earlier.config)
    found = (
        [f"stage version {earlier.version} → {node.stage.version}"]
        if earlier.version != node.stage.version
        else []
    )
    for path in sorted({*now, *then}):
        if now.get(path) != then.get(path):
            anew = path == "max_steps" and now.get("schedule") == "cosine"
            what = "the source's content" if path == "source_digest" else prefix + path
            found.append(
                f"{what} changed"
                if path == "source_digest"
                else f"{what} changed ({then.get(path)} → {now.get(path)})"
                + (", and a cosine schedule depends on it: trains anew" if anew else "")
            )
    for role, ref in inputs.items():
        if role in earlier.parents and earlier.parents[role].fingerprint != ref.fingerprint:
            found.append(f"{ref.stage} changed")
    return found
