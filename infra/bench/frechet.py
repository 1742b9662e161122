"""The Fréchet distance at FID's width beside `scipy.linalg.sqrtm`: time and difference, in turns, on one machine.

OMP_NUM_THREADS=2 python infra/bench/frechet.py [--width 2048] [--samples 4000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from scipy import linalg

from training.metrics.frechet import frechet_distance
from training.metrics.moments import Moments, moments_of


def by_sqrtm(a: Moments, b: Moments) -> float:
    """The formula as most published code has it."""
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root))


def main() -> None:
    """Runs both in turns and prints medians, their ratio and the relative difference of the values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("width", 2048), ("samples", 4000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    spread = np.linspace(2.0, 0.2, options.width)
    a, b = (
        moments_of(rng.standard_normal((options.samples, options.width)) * spread + at) for at in (0.0, 0.1)
    )
    timed = [
        (_timed(lambda: frechet_distance(a, b).value), _timed(lambda: by_sqrtm(a, b)))
        for _ in range(options.rounds)
    ]
    ours, theirs = (float(np.median([pair[side][0] for pair in timed])) for side in (0, 1))
    mine, root = timed[0][0][1], timed[0][1][1]
    Console().print(
        f"width {options.width}: {ours:.2f} s, sqrtm {theirs:.2f} s, ratio {ours / theirs:.3f}, "
        f"relative difference {abs(mine - root) / root:.1e}"
    )


def _timed(work: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    value = work()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    main()
