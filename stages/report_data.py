"""What a run's report shows, as plain data: `ReportData` and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from stages.charts import Point
from training.metrics.gates import Verdict
from training.metrics.tradeoff import Sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRun:
    """One stage of the plan as it ran."""

    name: str
    status: Literal["ran", "cached"]
    reason: str
    seconds: float
    """Wall time; of a cached stage, what it took when it ran."""
    fingerprint: str
    samples: int | None = None
    shards: int | None = None
    bytes: int | None = None
    devices: str = ""
    """Hours that workers held devices, in every attempt."""
    cost: str = ""
    """What that cost, with its currency; empty without prices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A PNG and the text that belongs to it."""

    png: bytes
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What went in."""

    pairs: int
    shards: int
    bytes: int
    caption_lengths: Mapping[int, int] = field(default_factory=dict)
    """Characters -> number of captions."""
    image_sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(width, height) of the source images in pixels -> number of images."""
    samples: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """Where the attempted rows of one stage went, counted on both sides so that a loss shows."""

    stage: str
    attempted: int
    written: int
    filtered: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Attempted rows that are in no count; 0 when the ledger balances, negative when rows were counted twice."""
        return self.attempted - self.written - sum(self.filtered.values()) - sum(self.failed.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One number with its 95 % interval and its protocol. Unit "%" means that value, low and high are fractions."""

    name: str
    label: str
    value: float
    better: Literal["higher", "lower"]
    low: float | None = None
    high: float | None = None
    unit: str = ""
    n: int | None = None
    meaning: str = ""
    protocol: str = ""
    headline: bool = False
    """Shown large at the top of the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A fraction in [0, 1] of `n` images, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeAccuracy:
    """The fraction of generated images in which one attribute is as the prompt says; None where nothing was asked."""

    attribute: str
    seen: Share | None
    heldout: Share | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostic:
    """One row of the prior's diagnostics: a cosine in [-1, 1] and what it compares."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    meaning: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """A PNG, the same after encoding and decoding, and their PSNR in dB."""

    original: bytes
    decoded: bytes
    caption: str = ""
    psnr: float
    """Of the two, in dB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The losses of one training stage as (step, value)."""

    stage: str
    train: tuple[Point, ...]
    validation: tuple[Point, ...] = ()
    note: str = ""
    samples: tuple[Picture, ...] = ()
    """Rows of pictures that the averaged weights drew for the same held-out samples, from the first to the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """A generated PNG and its prompt; `correct` is None where no recogniser knows the truth."""

    png: bytes
    prompt: str
    correct: bool | None = None
    heldout: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """A PNG of the dataset and images generated from its embedding."""

    original: bytes
    variations: tuple[bytes, ...]
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpolation:
    """PNGs generated on the way from one image embedding to another, both ends included."""

    frames: tuple[bytes, ...]
    start: str = ""
    end: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One snapshot of the lineage; `parents` are stages that come before it in `ReportData.lineage`."""

    stage: str
    fingerprint: str
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """All that the page shows. What is empty is left out, section by section."""

    title: str
    run: str
    recipe: str
    created: datetime
    """Aware; shown in UTC."""
    seconds: float
    spent: str = ""
    """What devices and money the stages took together."""
    summary: str
    """One sentence with the main score."""
    plan: tuple[StageRun, ...] = ()
    dataset: Dataset | None = None
    ledger: tuple[LedgerEntry, ...] = ()
    scores: tuple[Score, ...] = ()
    warnings: tuple[str, ...] = ()
    """Sentences on how far the scores can be believed."""
    gates: tuple[Verdict, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    accuracy: tuple[AttributeAccuracy, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    curves: tuple[Curve, ...] = ()
    generated: tuple[Generated, ...] = ()
    variations: tuple[Variation, ...] = ()
    interpolations: tuple[Interpolation, ...] = ()
    lineage: tuple[Artifact, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
