"""What a deployed run leaves in Prefect beside its state: pictures of what the store holds, for people who look there."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from data import columns, storage
from data.errors import CorruptArtifact, UserError
from data.manifest import Snapshot, load_snapshot
from flows import runs
from flows.comparing import measured_of
from flows.plan import Plan
from flows.pointers import Move
from stages.pictures import png
from stages.prompts import read_prompts
from training.metrics.comparison import Measured
from training.metrics.protocol import differences

PAST_RUNS = 10
"""As many earlier runs a trend shows at most."""
GRID = (3, 8)
"""Rows and columns of the sample grid."""
SIDE = 96
"""Pixels of a picture in it at most: Prefect keeps artifacts in its database."""
BARS = "▁▂▃▄▅▆▇█"


def publish_plan(plan: Plan) -> None:
    """What will run and why, before anything starts."""
    rows = [
        {"stage": s.name, "status": s.status, "why": s.reason, "fingerprint": s.fingerprint}
        for s in plan.stages
    ]
    create_table_artifact(table=rows, key=_key(plan, "plan"), description=plan.run)


def publish_outcome(plan: Plan) -> None:
    """The ledger, the lineage, the scores with their trend, the sample grid and the page, as far as they were made."""
    made = {s.name: found for s in plan.stages if (found := _made(s.folder, s.fingerprint))}
    create_table_artifact(table=ledger(made.values()), key=_key(plan, "ledger"), description=plan.run)
    create_markdown_artifact(lineage(made.values()), key=_key(plan, "lineage"), description=plan.run)
    if "evaluate" in made and plan.run in runs.finished(plan.root):
        create_markdown_artifact(trend(plan.root, plan.run), key=_key(plan, "scores"), description=plan.run)
    if "generate" in made:
        picture = base64.b64encode(png(grid(made["generate"]))).decode()
        prompts = read_prompts(made["generate"].folder)[: GRID[0] * GRID[1]]
        create_image_artifact(
            f"data:image/png;base64,{picture}",
            key=_key(plan, "samples"),
            description="\n".join(f"{i + 1}. {prompt.text}" for i, prompt in enumerate(prompts)),
        )
    if storage.exists(page := storage.join(plan.root, plan.run, "report.html")):
        link = Path(page).as_uri() if storage.is_local(page) else page
        create_link_artifact(link, link_text=page, key=_key(plan, "report"), description=plan.run)


def publish_moves(plan: Plan, moves: Sequence[Move]) -> None:
    """Who served when, the newest first."""
    rows = [move.model_dump() for move in reversed(moves)]
    create_table_artifact(table=rows, key="production", description=plan.root)


def publish_collected(found: Mapping[str, Any]) -> None:
    """What a `gc` removed, or would."""
    rows = [{name: row[name] for name in ("stage", "key", "bytes", "uri")} for row in found["artifacts"]]
    create_table_artifact(table=rows, key="gc", description=f"{found['root']}: {found['bytes']:,} bytes")


def ledger(made: Iterable[Snapshot]) -> list[dict[str, Any]]:
    """A row per stage: what it holds, and where every attempted row went."""
    rows = []
    for snapshot in made:
        total = snapshot.ledger
        rows.append(
            {
                "stage": snapshot.stage,
                "shards": len(snapshot.shards),
                "samples": snapshot.samples,
                "attempted": total.attempted,
                "written": total.written,
                "filtered": _reasons(total.filtered),
                "failed": _reasons(total.failed),
                "seconds": round(snapshot.seconds, 1),
            }
        )
    return rows


def lineage(made: Iterable[Snapshot]) -> str:
    """What was made from what, as a Markdown table."""
    rows = [
        f"| {s.stage} | {s.fingerprint} | {_escaped(s.folder)} | "
        f"{', '.join(f'{p.stage} {p.fingerprint}' for p in s.parents.values()) or '—'} |"
        for s in made
    ]
    return "\n".join(["| stage | fingerprint | artifact | made from |", "|---|---|---|---|", *rows])


def trend(root: str, run: str) -> str:
    """The scores of `run`, each with its values in earlier runs of the same recipe under the same protocol, as Markdown."""
    here = measured_of(root, run)
    past = [measured for name in _earlier(root, run) if (measured := _measured(root, name))]
    rows = []
    for metric, score in here.items():
        values = [m[metric].value for m in past if metric in m and _compares(m[metric], score)]
        change = f"{score.value - values[-1]:+.4g}" if values else "—"
        arrow = "↑" if score.better == "higher" else "↓"
        rows.append(
            f"| {metric} {arrow} | {score.value:.4g} | {score.low:.4g} – {score.high:.4g} | {score.n} | {change} "
            f"| {spark([*values, score.value])} | {len(values)} |"
        )
    head = "| score | value | 95 % interval | n | since the run before | trend | earlier runs that compare |"
    return "\n".join([f"**{run}**", "", head, "|---|---|---|---|---|---|---|", *rows])


def spark(values: Sequence[float]) -> str:
    """One bar per value, the lowest the shortest; empty for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in values)


def grid(generate: Snapshot) -> np.ndarray:
    """The first generated images in rows, (H, W, 3) uint8."""
    rows, across = GRID
    images: list[np.ndarray] = []
    for shard in generate.shards:
        images.extend(columns.open_array(generate.folder, "generated", shard.index)[: rows * across])
    images = [_small(image) for image in images[: rows * across]]
    blank = np.full_like(images[0], 255)
    images += [blank] * (-len(images) % across)
    lines = [np.concatenate(images[i : i + across], axis=1) for i in range(0, len(images), across)]
    return np.concatenate(lines, axis=0)


def _small(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE))
    return np.asarray(picture)


def _made(folder: str, fingerprint: str) -> Snapshot | None:
    try:
        return load_snapshot(folder, fingerprint)
    except CorruptArtifact:
        return None


def _earlier(root: str, run: str) -> list[str]:
    """Runs of the same recipe that ended before, the oldest first."""
    ended = runs.finished(root)
    recipe = ended[run]["recipe"].get("name")
    before = [name for name in ended if name != run and ended[name]["recipe"].get("name") == recipe]
    return sorted(before, key=lambda name: str(ended[name].get("finished")))[-PAST_RUNS:]


def _measured(root: str, name: str) -> dict[str, Measured] | None:
    try:
        return measured_of(root, name)
    except (UserError, CorruptArtifact):
        return None


def _compares(a: Measured, b: Measured) -> bool:
    return not differences(a.protocol, b.protocol)


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())


def _key(plan: Plan, what: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{plan.recipe.name}-{what}".lower())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
