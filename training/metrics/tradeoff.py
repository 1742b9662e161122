"""What a sweep shows: of settings, which no other beats in both fidelity (a distance) and fit to the prompt (CLIP score); of seeds,
how far scores lie apart that differ in chance alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from data.config import Config

DISTANCES = ("fd_clip", "fid", "fd_dinov2")
FIT = "clip_score"
SEED = "seed"
"""The field whose values are chance: none of them is the best one."""


class Point(Config):
    """One setting of a sweep and its scores: metric -> (value, low, high)."""

    setting: float | int | str
    own: bool = False
    """The run's own setting."""
    scores: dict[str, tuple[float, float, float]]
    uri: str = ""
    """The evaluation that the scores come from."""


class Curve(Config):
    """One distance against CLIP score over a sweep."""

    distance: str
    pareto: tuple[float | int | str, ...]
    """Settings that no other beats in both, by rising CLIP score."""
    best: float | int | str
    """The setting of the least distance; of equal ones, that of the larger CLIP score."""


class Sweep(Config):
    """A sampling setting over its values, or generation's seed, everything else as in the run."""

    field: str
    points: tuple[Point, ...]
    curves: tuple[Curve, ...] = ()
    spread: dict[str, tuple[float, float]] = {}
    """Of seeds: metric -> mean and sample standard deviation over the points."""

    @classmethod
    def of(cls, field: str, points: Sequence[Point]) -> Sweep:
        """The sweep of `field`: with curves, or, of two seeds and more, with what lies between them."""
        points = tuple(points)
        if field != SEED:
            return cls(field=field, points=points, curves=curves(points))
        return cls(field=field, points=points, spread=spread(points) if len(points) > 1 else {})


def curve(points: Sequence[Point], distance: str) -> Curve:
    """The Pareto front of `points` and its best point. All points must have `distance` and `clip_score`."""
    at = {p.setting: (p.scores[distance][0], -p.scores[FIT][0]) for p in points}
    front = [s for s, a in at.items() if not any(_beats(b, a) for b in at.values())]
    return Curve(
        distance=distance,
        pareto=tuple(sorted(front, key=lambda s: -at[s][1])),
        best=min(at, key=lambda s: at[s]),
    )


def curves(points: Sequence[Point]) -> tuple[Curve, ...]:
    """A curve for each distance that every point has."""
    return tuple(curve(points, name) for name in DISTANCES if all(name in p.scores for p in points))


def spread(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """Metric -> mean and sample standard deviation of its values, of every metric that all points have and that differs at all:
    scores of the run's parts know no seed."""
    shared = [name for name in points[0].scores if all(name in p.scores for p in points)]
    values = {name: [p.scores[name][0] for p in points] for name in shared}
    return {name: (mean(each), stdev(each)) for name, each in values.items() if len(set(each)) > 1}


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]
