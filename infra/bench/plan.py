"""How long a plan takes over a large dataset: a store of manifests alone, of shards, embeddings and latents, up to date and with
one new shard.

python infra/bench/plan.py [--shards 10000] [--rows-per-shard 10] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data import growth
from data.config import result_fields
from data.growth import WRITTEN
from data.manifest import FileRecord, Ledger, Parent, ShardRecord, Snapshot, publish_snapshot
from flows.assignments import edited
from flows.graph import prepare_nodes
from flows.plan import Plan, PlannedStage, make_plan
from flows.recipes import prepare, with_data

ENCODERS = ("clip.pretrained=ViT-L-14/openai", "vae.pretrained=stabilityai/sd-vae-ft-mse")
FILES = {
    "shard": ("{:05d}.tar", "{:05d}.parquet", "{:05d}_stats.json"),
    "embed": (
        "img_emb/img_emb_{:05d}.npy",
        "text_emb/text_emb_{:05d}.npy",
        "text_hidden/text_hidden_{:05d}.npy",
        "text_hidden/text_hidden_{:05d}.offsets.npy",
        "metadata/metadata_{:05d}.parquet",
    ),
    "encode": ("vae_moments/vae_moments_{:05d}.npy",),
}
"""Stage -> its files of a shard."""


def main() -> int:
    """Prints a table and writes JSON when asked; exit code 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000, help="shards of the dataset (default: 10,000)")
    parser.add_argument("--rows-per-shard", type=int, default=10, help="rows of each (default: 10)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.shards, arguments.rows_per_shard)
    table = Table("plan", "seconds", title=f"{arguments.shards:,} shards of {arguments.rows_per_shard} rows")
    for name, seconds in figures.items():
        table.add_row(name, f"{seconds:.2f}")
    Console().print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Console().print(f"peak memory {peak:,.0f} MiB")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**figures, "shards": arguments.shards, "peak_mib": peak}) + "\n"
        )
    return 0


def measure(folder: Path, shards: int, per_shard: int) -> dict[str, float]:
    """Seconds of each plan: of an empty store, of a store that has everything, and with one shard's rows more."""
    source = folder / "pairs.jsonl"
    _write_rows(source, shards * per_shard)
    figures = {}
    plan, figures["nothing made yet"] = _timed(source, folder, per_shard)
    _carry_out(plan, shards, per_shard)
    plan, figures["up to date"] = _timed(source, folder, per_shard)
    assert not plan.pending
    _write_rows(source, (shards + 1) * per_shard)
    plan, figures["one new shard"] = _timed(source, folder, per_shard)
    assert plan.stages[0].reason == f"{per_shard:,} new rows in 1 new shard" and len(plan.pending) == 3
    return figures


def _write_rows(path: Path, count: int) -> None:
    rows = (json.dumps({"url": f"s3://bucket/{i:09d}.jpg", "caption": f"picture {i}"}) for i in range(count))
    path.write_text("\n".join(rows) + "\n")


def _timed(source: Path, folder: Path, per_shard: int) -> tuple[Plan, float]:
    started = time.perf_counter()
    settings = [*ENCODERS, f"shard.samples_per_shard={per_shard}", "shard.image_size=256"]
    recipe = with_data(edited(prepare(), settings), str(source))
    plan = make_plan(recipe, prepare_nodes(recipe), str(folder / "runs"))
    return plan, time.perf_counter() - started


def _carry_out(plan: Plan, shards: int, per_shard: int) -> None:
    """Publishes what each stage of `plan` would: manifests of `shards` shards, and no shard."""
    made: dict[str, Snapshot] = {}
    for stage in plan.stages:
        opened = {role: made.get(ref.stage) or ref.open() for role, ref in stage.inputs.items()}
        parents = {
            role: Parent(
                stage=ref.stage, folder=ref.folder, fingerprint=ref.fingerprint, digest=opened[role].digest
            )
            for role, ref in stage.inputs.items()
        }
        of_source = _known(stage) if stage.node.identities is not None else {}
        digests = {role: parent.digest for role, parent in parents.items()}
        snapshot = Snapshot(
            stage=stage.name,
            version=stage.node.stage.version,
            fingerprint=stage.fingerprint,
            config=result_fields(stage.node.config),
            parents=parents,
            shards=tuple(_record(FILES[stage.name], index, per_shard, digests) for index in range(shards)),
            **of_source,
            created="2026-01-01T00:00:00+00:00",
            seconds=1.0,
        )
        made[stage.name] = publish_snapshot(stage.folder, snapshot)


def _known(stage: PlannedStage) -> dict[str, Any]:
    """What the snapshot of a source's shards keeps of its rows."""
    assert stage.node.identities is not None
    nothing = growth.nothing_known()
    change = growth.growth(nothing, stage.node.identities)
    assert change is not None
    known = growth.grown(nothing, change, stage.node.identities, [(WRITTEN, "")] * len(change.new))
    return {
        "files": (growth.save(stage.folder, stage.fingerprint, known),),
        "facts": {"reasons": list(known.reasons)},
    }


def _record(names: tuple[str, ...], index: int, samples: int, parents: dict[str, str]) -> ShardRecord:
    files = tuple(
        FileRecord(path=name.format(index), bytes=1 << 28, sha256=f"{index:064x}") for name in names
    )
    return ShardRecord(
        index=index,
        samples=samples,
        keys=f"{index:064x}",
        files=files,
        ledger=Ledger(written=samples),
        parents=parents or {"source": f"{index:012x}"},
    )


if __name__ == "__main__":
    sys.exit(main())
