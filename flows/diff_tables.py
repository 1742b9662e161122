"""What `darkroom diff` found, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from flows.console import difference, duration, interval, plain_table


def tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Settings, data, scores, samples, spend: each a table or a line."""
    yield _config(found) if found["config"] else "no setting differs"
    yield from _data(found)
    yield from _metrics(found)
    yield _samples(found)
    yield _spend(found)


def _config(found: Mapping[str, Any]) -> RenderableType:
    rows = [
        [row["path"], _text(row["a"]), _text(row["b"]), "in no fingerprint" if row["operational"] else ""]
        for row in found["config"]
    ]
    return plain_table(["setting", *found["runs"], ""], rows, "left")


def _data(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    data = found["data"]
    if data is None:
        yield "the shards of one of the two are not there any more"
        return
    (then, now), (before, after) = data["source"], data["ledger"]
    rows = [
        ["source", *(_text((each or {}).get("path") or (each or {}).get("kind")) for each in (then, now))]
    ]
    rows.append(["digest of its rows", *map(_text, data["digest"])])
    rows.append(["rows written", f"{before['written']:,}", f"{after['written']:,}"])
    for outcome in ("filtered", "failed"):
        for reason in sorted({*before[outcome], *after[outcome]}):
            rows.append(
                [f"{outcome}: {reason}", *(f"{each[outcome].get(reason, 0):,}" for each in (before, after))]
            )
    rows.append(["shards", *(f"{count:,}" for count in data["shards"])])
    yield plain_table(["data", *found["runs"]], rows, "left")
    yield f"{data['added']:,} samples added, {data['removed']:,} removed; {data['shared_shards']:,} shards in common"


def _metrics(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    metrics = found["metrics"]
    if metrics is None:
        yield "one of the two has no evaluation"
        return
    first, second = found["runs"]
    rows = []
    for row in [*metrics["metrics"], *metrics["incomparable"]]:
        held = row.get("against_first", {}).get(second)
        values = [interval(row["values"][run]) for run in found["runs"]]
        rows.append([row["name"], *values, difference(held) if held else "another protocol"])
    if rows:
        yield plain_table(["score", *found["runs"], f"{second} − {first}, 95 %"], rows)
    for row in metrics["incomparable"]:
        yield f"{row['name']}: {'; '.join(row['differences'])}"
    for run, names in metrics["alone"].items():
        if names:
            yield f"only {run} measured {', '.join(names)}"


def _samples(found: Mapping[str, Any]) -> RenderableType:
    samples = found["samples"]
    if samples is None:
        return "one of the two has no generated pictures"
    noise = "from the same noise" if samples["same_noise"] else "each from noise of its own"
    return f"{samples['same_prompts']:,} pictures of the same prompts, {noise}"


def _spend(found: Mapping[str, Any]) -> RenderableType:
    rows = [
        [row["stage"], *map(_seconds, (row["a"], row["b"])), "one artifact" if row["shared"] else ""]
        for row in found["spend"]
    ]
    total = [duration(sum(row[side] or 0 for row in found["spend"])) for side in ("a", "b")]
    return plain_table(["time", *found["runs"], ""], [*rows, ["all", *total, ""]])


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
