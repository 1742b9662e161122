"""Fréchet distance between two Gaussians fitted to features: FID on Inception features, FD on any other.

Legend: D feature width, r numerical rank of a covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training.metrics.moments import Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostics:
    """How far a distance can be trusted, and how it was computed."""

    method: Literal["cholesky", "eigh"]
    """`cholesky` when both covariances have full numerical rank; `eigh` drops what has none."""
    num_samples: tuple[int, int]
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


def frechet_distance(a: Moments, b: Moments) -> Frechet:
    """|mean_a - mean_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), float64 (Dowson & Landau 1982, eq. 4; Heusel et al. 2017, eq. 6).

    Covariances have ddof = 1. Raises ValueError for different widths or fewer than two samples.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of width {len(a.mean)} and {len(b.mean)} have no distance: use one extractor"
        )
    cov_a, cov_b = a.covariance, b.covariance
    width = len(a.mean)
    traces = float(np.trace(cov_a)), float(np.trace(cov_b))
    root_trace = _full_rank_root_trace(cov_a, cov_b) if min(a.n, b.n) > width else None
    if root_trace is not None:
        method, rank, clipped = "cholesky", (width, width), (0.0, 0.0)
    else:
        method = "eigh"
        factor_a, factor_b = _factor(cov_a, a.n - 1), _factor(cov_b, b.n - 1)
        root_trace = _nuclear_norm(factor_a.T @ factor_b)
        rank = factor_a.shape[1], factor_b.shape[1]
        clipped = _clipped_mass(cov_a, factor_a), _clipped_mass(cov_b, factor_b)
    mean_term = float(np.sum((a.mean - b.mean) ** 2))
    covariance_term = traces[0] + traces[1] - 2.0 * root_trace
    value = mean_term + covariance_term
    diagnostics = Diagnostics(
        method=method,
        num_samples=(a.n, b.n),
        width=width,
        rank=rank,
        undersampled=min(a.n, b.n) <= width,
        clipped=clipped,
        mean_term=mean_term,
        covariance_term=covariance_term,
        clamped=value < 0.0,
    )
    return Frechet(max(value, 0.0), diagnostics)


def _full_rank_root_trace(cov_a: np.ndarray, cov_b: np.ndarray) -> float | None:
    """Tr (S_a S_b)^(1/2) from the eigenvalues of L^T S_b L, where S_a = L L^T; None unless all are safely positive."""
    try:
        lower = np.linalg.cholesky(cov_a)
    except np.linalg.LinAlgError:
        return None
    product = lower.T @ cov_b @ lower
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


def _nuclear_norm(cross: np.ndarray) -> float:
    """Sum of singular values. With S = F F^T, those of F_a^T F_b are the eigenvalues of (S_a S_b)^(1/2), so no square
    root of a rounding error is ever taken."""
    return float(np.linalg.svd(cross, compute_uv=False).sum()) if cross.size else 0.0


def _rank_tolerance(eigenvalues: np.ndarray) -> float:
    return float(np.abs(eigenvalues).max() * len(eigenvalues) * np.finfo(np.float64).eps)


def _clipped_mass(cov: np.ndarray, factor: np.ndarray) -> float:
    trace = float(np.trace(cov))
    return abs(trace - float(np.sum(factor**2))) / trace if trace > 0.0 else 0.0
