"""How long a plan takes over a large dataset: a store of manifests alone, up to date and with one new shard.

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
    assert plan.stages[0].reason == f"{per_shard:,} new rows in 1 new shard"
    return figures


def _write_rows(path: Path, count: int) -> None:
    rows = (json.dumps({"url": f"s3://bucket/{i:09d}.jpg", "caption": f"picture {i}"}) for i in range(count))
    path.write_text("\n".join(rows) + "\n")


def _timed(source: Path, folder: Path, per_shard: int) -> tuple[Plan, float]:
    started = time.perf_counter()
    recipe = with_data(edited(prepare(), [f"shard.samples_per_shard={per_shard}"]), str(source))
    plan = make_plan(recipe, prepare_nodes(recipe), str(folder / "runs"))
    return plan, time.perf_counter() - started


def _carry_out(plan: Plan, shards: int, per_shard: int) -> None:
    stage: PlannedStage = plan.stages[0]
    assert stage.node.identities is not None
    nothing = growth.nothing_known()
    change = growth.growth(nothing, stage.node.identities)
    assert change is not None
    known = growth.grown(nothing, change, stage.node.identities, [(WRITTEN, "")] * len(change.new))
    parents: dict[str, Parent] = {}
    snapshot = Snapshot(
        stage="shard",
        version=stage.node.stage.version,
        fingerprint=stage.fingerprint,
        config=result_fields(stage.node.config),
        parents=parents,
        shards=tuple(_record(index, per_shard) for index in range(shards)),
        files=(growth.save(stage.folder, stage.fingerprint, known),),
        facts={"reasons": list(known.reasons)},
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )
    publish_snapshot(stage.folder, snapshot)


def _record(index: int, samples: int) -> ShardRecord:
    files = tuple(
        FileRecord(path=f"{index:05d}{end}", bytes=1 << 28, sha256=f"{index:064x}")
        for end in (".tar", ".parquet", "_stats.json")
    )
    ledger = Ledger(written=samples)
    parents = {"source": f"{index:012x}"}
    return ShardRecord(
        index=index, samples=samples, keys=f"{index:064x}", files=files, ledger=ledger, parents=parents
    )


if __name__ == "__main__":
    sys.exit(main())
