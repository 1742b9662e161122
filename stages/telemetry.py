"""Figures for Prometheus, at the metrics endpoint of the Ray node where they arise, tagged with run and stage.

Ray puts `ray_` before a name and `_total` behind a counter's. Without Ray nothing is told, and nothing is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from data.manifest import ShardRecord
from stages import logs

METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "darkroom_samples": ("counter", "samples that are done; their rate is samples per second", ()),
    "darkroom_rows": ("counter", "rows attempted, by outcome and reason", ("outcome", "reason")),
    "darkroom_failed_attempts": (
        "counter",
        "attempts at a shard or a training that failed, by reason",
        ("reason",),
    ),
    "darkroom_bytes": ("counter", "bytes of files written", ()),
    "darkroom_device_seconds": ("counter", "seconds that devices were held, times devices", ("device",)),
    "darkroom_shard_seconds": ("histogram", "seconds from a shard's start to its receipt", ()),
    "darkroom_shards_waiting": ("gauge", "shards that have not begun", ()),
    "darkroom_batches_ready": ("gauge", "decoded batches that wait when the device asks for one", ()),
    "darkroom_skipped_steps": (
        "counter",
        "training steps without effect, since gradients were not finite",
        (),
    ),
    "darkroom_loss": ("gauge", "training loss, mean of the newest steps", ()),
    "darkroom_data_wait": ("gauge", "share of the time that training waited for data", ()),
    "darkroom_mfu": ("gauge", "share of the device's peak arithmetic that training uses", ()),
}
"""Name -> (kind, what it says, tags besides run and stage)."""
SHARD_SECONDS = [1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0]


def tell(name: str, value: float, **tags: str) -> None:
    """Adds `value` to a counter, observes it in a histogram, or sets a gauge to it, for the run and stage around the caller."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    kind, metric = METRICS[name][0], _metric(name)
    ids = logs.place()
    tags |= {"run": str(ids.get("run", "")), "stage": str(ids.get("stage", ""))}
    if kind == "gauge":
        metric.set(value, tags=tags)
    elif kind == "histogram":
        metric.observe(value, tags=tags)
    elif value > 0:
        metric.inc(value, tags=tags)


def tell_shard(record: ShardRecord, samples: int, seconds: float) -> None:
    """A shard of so many samples has its receipt."""
    tell("darkroom_samples", samples)
    tell("darkroom_bytes", sum(file.bytes for file in record.files))
    tell("darkroom_shard_seconds", seconds)
    tell("darkroom_rows", record.ledger.written, outcome="written", reason="")
    for outcome in ("filtered", "failed"):
        for reason, count in getattr(record.ledger, outcome).items():
            tell("darkroom_rows", count, outcome=outcome, reason=reason)


def tell_row(row: Mapping[str, Any], batch_size: int) -> None:
    """A row of a training's curve: so many steps of `batch_size` samples, and what they came to."""
    tell("darkroom_samples", row["steps"] * batch_size)
    tell("darkroom_skipped_steps", row["skipped"])
    for field in ("loss", "data_wait", "mfu"):
        if row.get(field) is not None:
            tell(f"darkroom_{field}", row[field])


@functools.cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind, description, tags = METRICS[name]
    keys = ("run", "stage", *tags)
    if kind == "histogram":
        return metrics.Histogram(name, description, boundaries=SHARD_SECONDS, tag_keys=keys)
    return {"counter": metrics.Counter, "gauge": metrics.Gauge}[kind](name, description, tag_keys=keys)
