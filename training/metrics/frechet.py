"""Fréchet distance between two Gaussians fitted to features: FID on Inception features, FD on any other.

Legend: D feature width, r numerical rank of a covariance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from training.metrics.moments import Accumulate, Moments, accumulate_here, finite_rows, merge, runs

_MOST_LOST = 0.01
"""Rounding, to float32 too, loses a ten-thousandth of this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostics:
    """How far a distance can be trusted, and how it was computed."""

    method: Literal["cholesky", "eigh", "gram"]
    """`cholesky` when both covariances have full numerical rank; `eigh` drops what has none; `gram` takes singular values
    of products of centred rows, where there are fewer rows than dimensions and they are at hand."""
    num_samples: tuple[int | None, int | None]
    width: int
    rank: tuple[int, int]
    """Numerical ranks of the two covariances; at most n - 1."""
    undersampled: bool
    """Some covariance has no more samples than dimensions: the bias, of order 1/n, dominates. Take more samples."""
    clipped: tuple[float, float]
    """Mass of the eigenvalues that were dropped, negative ones included, over the trace of each covariance."""
    mean_term: float
    covariance_term: float
    clamped: bool
    """Rounding gave a negative distance, which was reported as 0."""


@dataclass(frozen=True, slots=True)
class Frechet:
    """A squared Fréchet distance, >= 0, in squared feature units."""

    value: float
    diagnostics: Diagnostics


@dataclass(frozen=True, eq=False)
class Gaussian:
    """What a distance is taken of. Factorisations are made once, so that one reference serves many distances."""

    mean: np.ndarray
    """(D,) float64."""
    covariance: np.ndarray
    """(D, D) float64, ddof = 1."""
    n: int | None
    """Samples behind it; None when a published file does not tell."""
    rows: np.ndarray | None = None
    """(n, D) features, where n <= D: a factor of the covariance that is exact and needs no eigenvectors."""

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        """The Gaussian of `moments`, which need at least two samples."""
        return cls(moments.mean, moments.covariance, moments.n)

    @classmethod
    def fitted(cls, features: np.ndarray, accumulate: Accumulate = accumulate_here) -> Gaussian:
        """The Gaussian of `features` (N, D), which are kept where they are fewer than their dimensions."""
        gaussian = cls.of(merge(accumulate(features, runs(len(features)))))
        return replace(gaussian, rows=features) if len(features) <= features.shape[1] else gaussian

    @cached_property
    def lower(self) -> np.ndarray | None:
        """The Cholesky factor; None where the covariance is not positive definite."""
        try:
            return np.linalg.cholesky(self.covariance)
        except np.linalg.LinAlgError:
            return None

    @cached_property
    def factor(self) -> np.ndarray:
        """(D, r) with factor @ factor.T = covariance up to rounding."""
        if self.rows is not None:
            centred = finite_rows(self.rows) - self.mean
            return centred.T / np.sqrt(len(centred) - 1)
        return _factor(self.covariance, len(self.mean) if self.n is None else self.n - 1)

    @cached_property
    def rank(self) -> int:
        """Numerical rank of the covariance."""
        if self.rows is None:
            return self.factor.shape[1]
        eigenvalues = np.linalg.eigvalsh(self.factor.T @ self.factor)
        return int((eigenvalues > _rank_tolerance(eigenvalues)).sum())


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian, *, exact: bool = True) -> Frechet:
    """|mean_a - mean_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), float64 (Dowson & Landau 1982, eq. 4; Heusel et al. 2017, eq. 6).

    Covariances have ddof = 1. Not `exact`: where there are fewer samples than dimensions, eigenvalues stand for singular
    values, a third of the work for half of the digits; enough for a spread. Raises ValueError for different widths or fewer
    than two samples.
    """
    a, b = (Gaussian.of(side) if isinstance(side, Moments) else side for side in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of width {len(a.mean)} and {len(b.mean)} have no distance: use one extractor"
        )
    width = len(a.mean)
    undersampled = any(side.n is not None and side.n <= width for side in (a, b))
    root_trace = None if undersampled else _full_rank_root_trace(a, b)
    if root_trace is not None:
        method, rank, clipped = "cholesky", (width, width), (0.0, 0.0)
    else:
        method = "eigh" if a.rows is None and b.rows is None else "gram"
        cross = a.factor.T @ b.factor
        root_trace = _nuclear_norm(cross) if exact else _rough_nuclear_norm(cross)
        rank = (a.rank, b.rank) if exact else (a.factor.shape[1], b.factor.shape[1])
        clipped = _clipped_mass(a), _clipped_mass(b)
    mean_term = float(np.sum((a.mean - b.mean) ** 2))
    covariance_term = float(np.trace(a.covariance) + np.trace(b.covariance)) - 2.0 * root_trace
    value = mean_term + covariance_term
    if not np.isfinite(value):
        raise ValueError("means or covariances are too large for a distance in float64: make them again")
    diagnostics = Diagnostics(
        method=method,
        num_samples=(a.n, b.n),
        width=width,
        rank=rank,
        undersampled=undersampled,
        clipped=clipped,
        mean_term=mean_term,
        covariance_term=covariance_term,
        clamped=value < 0.0,
    )
    return Frechet(max(value, 0.0), diagnostics)


def require_covariance(gaussian: Gaussian) -> None:
    """Raises ValueError when `gaussian`, read from a file, has a matrix that is no covariance of its number of samples: more than
    a hundredth of its variance lies in negative eigenvalues, or beyond the rank that so few samples can have."""
    width = len(gaussian.mean)
    is_plain = gaussian.lower is not None and (gaussian.n is None or gaussian.n > width)
    if gaussian.rows is not None or is_plain:
        return
    if (lost := _clipped_mass(gaussian)) > _MOST_LOST:
        samples = "" if gaussian.n is None else f" of {gaussian.n} images"
        raise ValueError(
            f"the real statistics are no covariance{samples}: eigenvalues that one cannot have make up {lost:.0%} of its variance; "
            "make the file again"
        )


def _full_rank_root_trace(a: Gaussian, b: Gaussian) -> float | None:
    """Tr (S_a S_b)^(1/2) from the eigenvalues of L^T S_b L, where S_a = L L^T; None unless all are safely positive."""
    if a.lower is None:
        return None
    product = a.lower.T @ b.covariance @ a.lower
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    # A square root turns an error e of a vanishing eigenvalue into sqrt(e): let the factored form handle those.
    if eigenvalues[0] <= _rank_tolerance(eigenvalues):
        return None
    return float(np.sqrt(eigenvalues).sum())


def _factor(cov: np.ndarray, most: int) -> np.ndarray:
    """(D, r) with factor @ factor.T = cov up to rounding; r <= `most`, the rank that n samples can have."""
    eigenvalues, vectors = np.linalg.eigh(cov)
    keep = eigenvalues > max(_rank_tolerance(eigenvalues), 0.0)
    keep[: max(len(keep) - most, 0)] = False
    return vectors[:, keep] * np.sqrt(eigenvalues[keep])


def _rough_nuclear_norm(cross: np.ndarray) -> float:
    square = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(square), 0.0)).sum()) if cross.size else 0.0


def _nuclear_norm(cross: np.ndarray) -> float:
    """Sum of singular values. With S = F F^T, those of F_a^T F_b are the eigenvalues of (S_a S_b)^(1/2), so no square
    root of a rounding error is ever taken."""
    return float(np.linalg.svd(cross, compute_uv=False).sum()) if cross.size else 0.0


def _rank_tolerance(eigenvalues: np.ndarray) -> float:
    return float(np.abs(eigenvalues).max() * len(eigenvalues) * np.finfo(np.float64).eps)


def _clipped_mass(side: Gaussian) -> float:
    trace = float(np.trace(side.covariance))
    return abs(trace - float(np.sum(side.factor**2))) / trace if trace > 0.0 else 0.0
