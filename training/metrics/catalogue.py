"""Every metric of generated pictures against real ones, by name: from which extractor's features, and how.

Legend: N real and M generated pictures, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from training.metrics import kernel, retrieval
from training.metrics.clip_score import clip_score
from training.metrics.extrapolation import frechet_at_infinity
from training.metrics.frechet import Gaussian, require_covariance
from training.metrics.inception_score import inception_score
from training.metrics.intervals import Deletions, Estimate, frechet_estimate, share_interval, wilson_interval
from training.metrics.moments import Accumulate, accumulate_here
from training.metrics.neighbours import DENSITY_K, PRECISION_K, Neighbours, neighbours

FRECHET_BLOCKS = 16
"""Deletions of a Fréchet distance's jackknife."""


class Value(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    interval: tuple[float, float]
    note: str = ""
    """What belongs to this very value."""
    facts: Mapping[str, float | str] = MappingProxyType({})
    """How far it can be believed: ranks and clipped mass of a Fréchet distance, the residual of an extrapolation."""
    deletions: Deletions | None = None
    """For a paired comparison."""

    @classmethod
    def of(cls, found: Estimate, *, at_least: float = -math.inf) -> Value:
        """`found`, its interval cut off below what the metric can be."""
        low, high = found.interval
        return cls(found.value, (max(low, at_least), max(high, at_least)), deletions=found.deletions)


@dataclass(frozen=True, eq=False)
class Sample:
    """Features of one extractor; computed once what several metrics share."""

    fake: np.ndarray
    """(M, D)"""
    reference: Gaussian | None = None
    real: np.ndarray | None = None
    """(N, D); None where a file has moments alone."""
    text: np.ndarray | None = None
    """(M, D) embeddings of the captions of `fake`."""
    head: np.ndarray | None = None
    """(C, D) weights of a classifier on the features."""
    accumulate: Accumulate = accumulate_here
    """Where moments of `fake` are taken."""
    group: int = 1
    """Consecutive rows of `fake` that belong to one prompt: no block of the jackknife parts them."""

    @property
    def prompts(self) -> int:
        """Groups of pictures that may be all alike."""
        return max(len(self.fake) // self.group, 1)

    @cached_property
    def neighbours(self) -> Neighbours:
        """The four measures."""
        return neighbours(_given(self.real), self.fake, group=self.group)

    @cached_property
    def retrieval(self) -> retrieval.Retrieval:
        """Ranks of captions and pictures."""
        return retrieval.retrieval(self.fake, _given(self.text))

    @cached_property
    def cmmd(self) -> kernel.Cmmd:
        """Both estimators."""
        return kernel.cmmd(_given(self.real), self.fake, group=self.group)


@dataclass(frozen=True)
class Metric:
    """How a value is had."""

    extractor: str
    compute: Callable[[Sample], Value]
    better: Literal["higher", "lower"]
    meaning: str
    needs: Literal["reference", "real", "text", "nothing"] = "reference"
    """What of a sample besides the generated features."""
    by_default: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


def few(sample: Sample, extractor: str) -> str:
    """The sentence that says so where there are no more pictures than dimensions; empty where there are enough."""
    width = sample.fake.shape[1]
    counts = [len(sample.fake), *([sample.reference.n] if sample.reference and sample.reference.n else [])]
    if min(counts) > width:
        return ""
    return (
        f"{min(counts)} images for the {width} dimensions of {extractor}: its Fréchet distances are mostly bias; compare "
        "them only at equal numbers of images, and take more"
    )


def _frechet(sample: Sample) -> Value:
    reference, accumulate = _given(sample.reference), sample.accumulate
    require_covariance(reference)
    found = frechet_estimate(
        reference, sample.fake, max_blocks=FRECHET_BLOCKS, group=sample.group, accumulate=accumulate
    )
    told = found.diagnostics
    assert told is not None
    facts = {
        "method": told.method,
        "rank_real": told.rank[0],
        "rank_generated": told.rank[1],
        "clipped_mass": max(told.clipped),
        "mean_term": told.mean_term,
        "covariance_term": told.covariance_term,
    }
    return Value.of(found, at_least=0.0)._replace(facts=facts)


def _infinity(sample: Sample) -> Value:
    require_covariance(_given(sample.reference))
    found = frechet_at_infinity(_given(sample.reference), sample.fake, group=sample.group)
    return Value(
        found.value,
        found.interval,
        f"residual {found.residual:.3g} over N = {found.sizes[0]} to {found.sizes[-1]}",
        {"residual": found.residual, "smallest_n": found.sizes[0], "largest_n": found.sizes[-1]},
        found.deletions,
    )


def _share(name: str) -> Callable[[Sample], Value]:
    """Of a measure that lies in [0, 1]; also of one over real pictures, as many trials as there are prompts to vary it."""

    def compute(sample: Sample) -> Value:
        found: Estimate = getattr(sample.neighbours, name)
        return _within_one(found, wilson_interval(found.value * sample.prompts, sample.prompts))

    return compute


def _density(sample: Sample) -> Value:
    return Value.of(sample.neighbours.density, at_least=0.0)


def _within_one(found: Estimate, wilson: tuple[float, float]) -> Value:
    """`found` with its interval or Wilson's, whichever reaches further: the jackknife has no width at 0 and 1."""
    (low, high), (least, most) = found.interval, wilson
    return Value(
        found.value, (max(min(low, least), 0.0), min(max(high, most), 1.0)), deletions=found.deletions
    )


def _kid(sample: Sample) -> Value:
    return Value.of(kernel.kid(_given(sample.real), sample.fake, group=sample.group))


def _kid_of_subsets(sample: Sample) -> Value:
    found = kernel.kid_of_subsets(_given(sample.real), sample.fake, group=sample.group)
    return Value(found.mean, found.interval, deletions=found.deletions)


def _inception_score(sample: Sample) -> Value:
    return Value.of(inception_score(sample.fake, _given(sample.head), group=sample.group), at_least=1.0)


def _clip_score(sample: Sample) -> Value:
    return Value.of(_mean(sample, _cosines(sample)))


def _clip_score_x100(sample: Sample) -> Value:
    """100 max(mean cosine, 0), as torchmetrics' `CLIPScore` prints it; no caption prefix."""
    found = _mean(sample, 100.0 * _cosines(sample))
    sizes, values = found.deletions.sizes, found.deletions.values
    kept = Deletions(sizes=sizes, values=tuple(max(value, 0.0) for value in values))
    return Value.of(Estimate(max(found.value, 0.0), kept), at_least=0.0)


def _clip_score_x2_5(sample: Sample) -> Value:
    """Mean of 2.5 max(cosine, 0) (Hessel et al. 2021, eq. 1), here without their prefix "A photo depicts"."""
    return Value.of(_mean(sample, 2.5 * np.maximum(_cosines(sample), 0.0)))


def _cosines(sample: Sample) -> np.ndarray:
    return clip_score(sample.fake, _given(sample.text)).per_sample


def _mean(sample: Sample, values: np.ndarray) -> Estimate:
    return Estimate.of_mean(values, group=sample.group)


def _recall(side: str, at: int) -> Callable[[Sample], Value]:
    def compute(sample: Sample) -> Value:
        right = retrieval.recalled(getattr(sample.retrieval, f"{side}_rank"), at)
        return _within_one(_mean(sample, right), share_interval(right, group=sample.group))

    return compute


def _given(value: Any) -> Any:
    assert value is not None, "the caller asks only for metrics whose input is there"
    return value


METRICS: dict[str, Metric] = {
    "fid": Metric("inception", _frechet, "lower", "Fréchet Inception distance, tf1 resize"),
    "fid_clean": Metric(
        "inception_clean", _frechet, "lower", "Fréchet Inception distance, clean resize", by_default=False
    ),
    "fid_infinity": Metric(
        "inception", _infinity, "lower", "FID extrapolated to infinitely many images", by_default=False
    ),
    "kid": Metric("inception", _kid, "lower", "kernel Inception distance, all pairs", needs="real"),
    "kid_subsets": Metric(
        "inception",
        _kid_of_subsets,
        "lower",
        "kernel Inception distance, mean of 100 subsets of 1000",
        needs="real",
        by_default=False,
        settings={"subsets": 100, "size": 1000, "seed": 2020},
    ),
    **{
        name: Metric(
            "inception",
            _density if name == "density" else _share(name),
            "higher",
            meaning,
            needs="real",
            settings={"k": k},
        )
        for name, k, meaning in (
            ("precision", PRECISION_K, f"generated images among real ones, k = {PRECISION_K}, closed balls"),
            ("recall", PRECISION_K, f"real images among generated ones, k = {PRECISION_K}, closed balls"),
            ("density", DENSITY_K, f"real balls about a generated image, over k = {DENSITY_K}, open balls"),
            ("coverage", DENSITY_K, f"real images with a generated one near, k = {DENSITY_K}, open balls"),
        )
    },
    "inception_score": Metric(
        "inception",
        _inception_score,
        "higher",
        "Inception Score, one split",
        needs="nothing",
        settings={"splits": 1},
    ),
    "fd_clip": Metric("clip", _frechet, "lower", "Fréchet distance on CLIP features"),
    "cmmd": Metric(
        "clip",
        lambda sample: Value(sample.cmmd.unbiased, sample.cmmd.interval, deletions=sample.cmmd.deletions),
        "lower",
        "CLIP maximum mean discrepancy, unbiased, x1000",
        needs="real",
    ),
    "cmmd_biased": Metric(
        "clip",
        lambda sample: Value(
            sample.cmmd.biased, sample.cmmd.biased_interval, deletions=sample.cmmd.biased_deletions
        ),
        "lower",
        "CLIP maximum mean discrepancy as published, biased, x1000",
        needs="real",
        by_default=False,
    ),
    "clip_score": Metric("clip", _clip_score, "higher", "cosine of image and caption", needs="text"),
    "clip_score_x100": Metric(
        "clip", _clip_score_x100, "higher", "100 max(mean cosine, 0)", needs="text", by_default=False
    ),
    "clip_score_x2.5": Metric(
        "clip",
        _clip_score_x2_5,
        "higher",
        "mean of 2.5 max(cosine, 0)",
        needs="text",
        by_default=False,
    ),
    **{
        f"{side}_recall_{at}": Metric(
            "clip",
            _recall(side, at),
            "higher",
            f"own {side} among the {at} nearest" if at > 1 else f"own {side} nearest",
            needs="text",
            by_default=False,
        )
        for side in ("caption", "picture")
        for at in retrieval.RANKS
    },
    "fd_dinov2": Metric("dinov2", _frechet, "lower", "Fréchet distance on DINOv2 features"),
}
