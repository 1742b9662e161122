"""Moments of features on the cluster's workers, merged by who asks in the order of their rows.

They are not kept: the second moment of a block of 256 rows is eight to sixteen times as large as its features, which are,
so reading it back would take longer than computing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from training.metrics.moments import Moments, Span, moments_of


def accumulate_on_cluster(features: np.ndarray, spans: Sequence[Span]) -> Iterator[Moments]:
    """The moments of each span of `features` (N, D), in order; bit for bit what `accumulate_here` gives.

    Raises ValueError as `moments_of` does. A worker that dies is replaced by Ray.
    """
    import ray
    from ray.exceptions import RayTaskError

    if len(spans) == 1:  # sooner done here than a worker is found for it
        yield _moments(features, spans[0])
        return
    task, shared = ray.remote(num_cpus=1)(_moments), ray.put(features)
    for reference in [task.remote(shared, span) for span in spans]:
        try:
            yield ray.get(reference)
        except RayTaskError as error:
            raise error.cause from None


def _moments(features: np.ndarray, span: Span) -> Moments:
    start, stop = span
    return moments_of(features[start:stop], first_row=start)
