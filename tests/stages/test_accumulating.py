"""Moments on a real Ray cluster: the bits of one process, and a sentence for features that mean nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from stages import accumulating
from stages.accumulating import accumulate_on_cluster
from stages.cluster import cluster
from training.metrics.frechet import Gaussian
from training.metrics.intervals import frechet_estimate
from training.metrics.moments import RUN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster("local"):
        yield


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2 * RUN + 300, 24)).astype(np.float32)


@pytest.mark.usefixtures("ray_cluster")
def test_a_distance_and_its_deletions_have_the_bits_of_one_process(features):
    reference = Gaussian.fitted(features[:700] + 0.1)
    spread = Gaussian.fitted(features[:700] + 0.1, accumulate_on_cluster)
    assert spread.covariance.tobytes() == reference.covariance.tobytes()
    assert frechet_estimate(spread, features, accumulate=accumulate_on_cluster) == frechet_estimate(
        reference, features
    )


@pytest.mark.usefixtures("ray_cluster")
def test_the_first_row_that_is_not_finite_is_named_by_its_index_in_the_whole(features):
    features[RUN + 3, 5] = np.nan
    with pytest.raises(ValueError, match=f"^features of sample {RUN + 3} hold NaN"):
        Gaussian.fitted(features, accumulate_on_cluster)


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_is_replaced(features, tmp_path, monkeypatch):
    moments = accumulating._moments

    def dying_once(shared, span, mark=Path(tmp_path, "died")):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return moments(shared, span)

    monkeypatch.setattr(accumulating, "_moments", dying_once)
    spread = Gaussian.fitted(features, accumulate_on_cluster)
    assert (tmp_path / "died").exists()
    assert spread.covariance.tobytes() == Gaussian.fitted(features).covariance.tobytes()
