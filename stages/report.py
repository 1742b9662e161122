"""Snapshots of a run -> one self-contained HTML page that shows all of it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from data import storage
from data.config import Config, operational
from data.errors import GateFailed
from data.loader import ColumnSet
from data.manifest import START, Ledger, Parent, Snapshot, file_record
from stages import spending
from stages.contract import Inputs, Stage, Workspace, commit
from stages.pictures import png
from stages.report_data import (
    Artifact,
    AttributeAccuracy,
    Curve,
    Dataset,
    Diagnostic,
    LedgerEntry,
    Picture,
    ReportData,
    Score,
    Share,
    StageRun,
)
from stages.report_page import render
from stages.report_pictures import drawn_in_training, generated, interpolations, reconstructions, variations
from stages.spending import PricesConfig
from training.metrics.comparison import Measured
from training.metrics.gates import Verdict, judge, parsed
from training.metrics.protocol import Protocol
from training.metrics.tradeoff import Sweep

PAGE = "report.html"
SAMPLES = 18
LABELS = {
    "prompt_accuracy": "Prompt accuracy",
    "prompt_accuracy_heldout": "… on held-out combinations",
    "fd_clip": "FD on CLIP features",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "vae_psnr": "VAE reconstruction",
    "vae_ssim": "VAE reconstruction, SSIM",
    "vae_rfid": "VAE reconstruction, FID",
    "prior_cosine": "Prior cosine",
    "fid": "FID",
    "fd_dinov2": "FD on DINOv2 features",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "inception_score": "Inception Score",
}
UNITS = {"prompt_accuracy": "%", "prompt_accuracy_heldout": "%", "vae_psnr": "dB"}
HEADLINES = {"prompt_accuracy", "prompt_accuracy_heldout", "fd_clip", "clip_score", "fid"}
PATHS = {"source": ("path",), "evaluate": ("prompts", "inception", "dinov2", "clip", "reference")}
"""Section -> fields of the recipe that name a place."""
PACKAGES = ("torch", "diffusers", "open_clip_torch", "ray", "prefect")


BASELINE = "baseline:"
"""Roles of inputs that are other runs' evaluations start so; the run's name follows."""


class ReportConfig(Config):
    """What the page says besides what the snapshots hold, and the gates that decide whether the run stands."""

    gates: tuple[str, ...] = Field((), description="as `training.metrics.gates.parsed` reads them")

    run: str = operational("")
    recipe: str = operational("")
    plan: tuple[dict[str, Any], ...] = operational(())
    config: dict[str, Any] = operational({})
    sweeps: tuple[Sweep, ...] = operational((), description="trade-off curves to draw")
    prices: PricesConfig = operational(PricesConfig(), description="what devices cost")


def run(config: ReportConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Writes `report.html` and commits. Raises GateFailed, after the page is written, when a gate does not hold."""
    started = time.monotonic()
    shown = collect(config, inputs)
    storage.write_bytes(storage.join(workspace.folder, PAGE), render(shown).encode())
    if failed := [gate for gate in shown.gates if not gate.held]:
        raise GateFailed("; ".join(f"gate `{gate.gate}` failed: {gate.reason}" for gate in failed))
    files = (file_record(workspace.folder, PAGE),)
    return commit(STAGE, config, inputs, workspace, started=started, files=files)


def page(config: Mapping[str, Any], inputs: Inputs) -> str:
    """The page that `run` writes for the JSON form of a config, as HTML; nothing is judged and nothing committed."""
    return render(collect(ReportConfig.model_validate(config), inputs))


def collect(config: ReportConfig, inputs: Inputs) -> ReportData:
    """All that the page shows, read from the snapshots."""
    verdicts = _gates(config, inputs)
    inputs = {role: snapshot for role, snapshot in inputs.items() if not role.startswith(BASELINE)}
    measured = _measured(inputs["evaluate"])
    data = ColumnSet([inputs["data"]])
    plan = tuple(_stage_run(row, inputs, config.prices) for row in config.plan)
    return ReportData(
        title=f"{config.recipe} · {config.run}",
        run=config.run,
        recipe=config.recipe,
        created=datetime.now(UTC),
        seconds=sum(row.seconds for row in plan),
        spent=_spent(inputs, config.prices),
        summary=_summary(measured, inputs),
        plan=plan,
        dataset=_dataset(inputs["data"], data),
        ledger=tuple(_ledger(role, s) for role, s in inputs.items() if s.shards and s.ledger.attempted),
        scores=tuple(_score(row) for row in measured["scores"]),
        warnings=tuple(measured["warnings"]),
        gates=verdicts,
        sweeps=config.sweeps,
        accuracy=_accuracy(measured),
        diagnostics=tuple(_diagnostic(row) for row in measured["prior"]),
        reconstructions=reconstructions(inputs, data),
        curves=tuple(_curve(s) for s in inputs.values() if any(f.path == "curve.parquet" for f in s.files)),
        generated=generated(inputs["generate"], measured["correct"]),
        variations=variations(inputs["generate"]),
        interpolations=interpolations(inputs["generate"]),
        lineage=_lineage(inputs),
        environment=_environment(),
        config=_without_folders(config.config),
    )


def _measured(evaluate: Snapshot) -> dict[str, Any]:
    return json.loads(storage.read_bytes(storage.join(evaluate.folder, "scores.json")))


def _gates(config: ReportConfig, inputs: Inputs) -> tuple[Verdict, ...]:
    def scores(snapshot: Snapshot) -> dict[str, Measured]:
        return {row["name"]: Measured.model_validate(row) for row in _measured(snapshot)["scores"]}

    if not config.gates:
        return ()
    baselines = {
        role.removeprefix(BASELINE): scores(s) for role, s in inputs.items() if role.startswith(BASELINE)
    }
    own = scores(inputs["evaluate"])
    return tuple(judge(parsed(gate), own, baselines) for gate in config.gates)


def _spent(inputs: Inputs, prices: PricesConfig) -> str:
    """`0.35 CPU-hours, 0.02 USD`: what the stages spent together; empty where none knows."""
    whole = spending.total(snapshot.device_seconds for snapshot in inputs.values())
    return ", ".join(filter(None, (spending.hours(whole), prices.told(whole))))


def _stage_run(row: dict[str, Any], inputs: Inputs, prices: PricesConfig) -> StageRun:
    snapshot = inputs.get("data" if row["name"] == "shard" else row["name"])
    shards = len(snapshot.shards) if snapshot else 0
    return StageRun(
        name=row["name"],
        status=row["status"],
        reason=row["reason"],
        seconds=snapshot.seconds if snapshot else row.get("seconds", 0.0),
        fingerprint=row["fingerprint"],
        samples=snapshot.samples if snapshot and shards else None,
        shards=shards or None,
        bytes=snapshot.bytes if snapshot else None,
        devices=spending.hours(snapshot.device_seconds) if snapshot else "",
        cost=prices.told(snapshot.device_seconds) if snapshot else "",
    )


def _summary(measured: dict[str, Any], inputs: Inputs) -> str:
    values = {score["name"]: score["value"] for score in measured["scores"]}
    pairs = f"{inputs['data'].samples:,} image-text pairs"
    if "prompt_accuracy" not in values:
        return f"From {pairs}, a text-to-image system with a CLIP score of {values['clip_score']:.3f}."
    heldout = values.get("prompt_accuracy_heldout")
    unseen = f", and {heldout:.0%} of those for combinations that it never saw" if heldout is not None else ""
    return f"From {pairs}, a system that gets {values['prompt_accuracy']:.0%} of prompts right in every attribute{unseen}."


def _dataset(snapshot: Snapshot, data: ColumnSet) -> Dataset:
    lengths: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    for shard in snapshot.shards:
        path = storage.join(snapshot.folder, f"{shard.index:05d}.parquet")
        with storage.open_read(path) as stream:
            rows = pq.read_table(
                stream, columns=["status", "caption", "original_width", "original_height"]
            ).to_pylist()
        kept = [row for row in rows if row["status"] == "success"]
        lengths.update(len(row["caption"]) for row in kept)
        sizes.update((row["original_width"], row["original_height"]) for row in kept)
    chosen = np.linspace(0, len(data) - 1, min(SAMPLES, len(data))).round().astype(int)
    pictures = zip(data.rows("image", chosen), data.captions(chosen), strict=True)
    return Dataset(
        pairs=snapshot.samples,
        shards=len(snapshot.shards),
        bytes=snapshot.bytes,
        caption_lengths=dict(lengths),
        image_sizes=dict(sizes),
        samples=tuple(Picture(png=png(image), caption=caption) for image, caption in pictures),
    )


def _ledger(role: str, snapshot: Snapshot) -> LedgerEntry:
    ledger: Ledger = snapshot.ledger
    stage = "shard" if role == "data" else role
    attempted = sum(_rows(snapshot.folder, shard.index) for shard in snapshot.shards)
    return LedgerEntry(
        stage=stage,
        attempted=attempted,
        written=ledger.written,
        filtered=ledger.filtered,
        failed=ledger.failed,
    )


def _rows(folder: str, index: int) -> int:
    """Rows of a shard's parquet: the attempts, counted apart from the ledger that they are held against."""
    with storage.open_read(storage.join(folder, f"{index:05d}.parquet")) as stream:
        return pq.ParquetFile(stream).metadata.num_rows


def _score(row: dict[str, Any]) -> Score:
    return Score(
        name=row["name"],
        label=LABELS.get(row["name"], row["name"]),
        value=row["value"],
        better=row["better"],
        low=row["low"],
        high=row["high"],
        unit=UNITS.get(row["name"], ""),
        n=row["n"],
        meaning=row["meaning"],
        protocol=Protocol.model_validate(row["protocol"]).sentence,
        headline=row["name"] in HEADLINES,
    )


def _accuracy(measured: dict[str, Any]) -> tuple[AttributeAccuracy, ...]:
    found = []
    for attribute, shares in measured["attributes"].items():
        seen, heldout = (
            Share(**shares[label]) if label in shares else None for label in ("seen", "held out")
        )
        found.append(AttributeAccuracy(attribute=attribute, seen=seen, heldout=heldout))
    return tuple(found)


def _diagnostic(row: dict[str, Any]) -> Diagnostic:
    label = row["name"].replace("_", " ")
    return Diagnostic(
        label=label, value=row["value"], low=row["low"], high=row["high"], meaning=row["meaning"]
    )


def _curve(snapshot: Snapshot) -> Curve:
    with storage.open_read(storage.join(snapshot.folder, "curve.parquet")) as stream:
        rows = pq.read_table(stream).to_pylist()
    return Curve(
        stage=snapshot.stage,
        train=tuple((row["step"], row["loss"]) for row in rows),
        validation=tuple(
            (row["step"], loss) for row in rows if (loss := row.get("validation_loss")) is not None
        ),
        samples=tuple(drawn_in_training(snapshot.folder)),
    )


def _lineage(inputs: Inputs) -> tuple[Artifact, ...]:
    """The artifacts of the run, after those that they were made from and that no stage of the run made."""
    own = {snapshot.fingerprint for snapshot in inputs.values()}
    links = [(s, role, parent) for s in inputs.values() for role, parent in s.parents.items()]
    before = {_called(role, p): p.fingerprint for _, role, p in links if p.fingerprint not in own}
    parents = {
        s.stage: tuple(dict.fromkeys(_called(r, p) for c, r, p in links if c is s)) for s in inputs.values()
    }
    return (
        *(Artifact(stage=name, fingerprint=fingerprint) for name, fingerprint in before.items()),
        *(
            Artifact(stage=s.stage, fingerprint=s.fingerprint, parents=parents[s.stage])
            for s in inputs.values()
        ),
    )


def _called(role: str, parent: Parent) -> str:
    return f"earlier {parent.stage}" if role == START else parent.stage


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """The config with local paths cut to their last part: a page is passed around, its author's folders are not."""
    cut = dict(config)
    for section, fields in PATHS.items():
        given = {name: path for name in fields if (path := config.get(section, {}).get(name))}
        local = {name: Path(path).name for name, path in given.items() if storage.is_local(path)}
        if local:
            cut[section] = {**config[section], **local}
    return cut


def _environment() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


STAGE = Stage(
    name="report",
    version=2,
    reads=lambda _: frozenset({"image", "caption", "generated"}),
    writes=lambda _: frozenset(),
    config=ReportConfig,
    run=run,
)
