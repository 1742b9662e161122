"""Our metrics beside torch-fidelity, torchmetrics and clean-fid: the same random weights, the same pictures, the same numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from training.metrics.frechet import frechet_distance
from training.metrics.inception import features, load_inception, resize_clean, resize_tf1
from training.metrics.inception_score import inception_score
from training.metrics.kernel import kid_of_subsets
from training.metrics.moments import moments_of
from training.metrics.neighbours import neighbours
from training.metrics.reconstruction import ssim

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def oracles(beside, monkeypatch):
    wanted = ("torch-fidelity==0.4.0", "torchmetrics==1.9.0", "lightning-utilities", "clean-fid==0.1.35")
    monkeypatch.syspath_prepend(beside("oracles", *wanted))


def pictures(count: int, seed: int, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def rows(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, 64)) + shift).astype(np.float32)


def test_features_are_torch_fidelitys(inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    ours, images = load_inception(inception_weights, None), pictures(16, 0)
    mine = features(ours, images)
    with torch.inference_mode():
        plain, logits = theirs(images)
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    scale = 1e-4 * float(logits.abs().max())
    torch.testing.assert_close(mine @ ours.head.T, logits, rtol=1e-3, atol=scale)
    network = load_inception(inception_weights, None, as_published=True)
    with torch.inference_mode():
        assert torch.equal(network((resize_tf1(images) - 128) / 128), plain), "every bit is the same"


def test_distances_and_scores_are_torch_fidelitys():
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    fake, real = rows(300, 1, 0.2), rows(280, 2)
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (fake, real)]
    fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments_of(real), moments_of(fake)).value == pytest.approx(fid, rel=1e-6)
    both = (torch.from_numpy(fake.astype(np.float64)), torch.from_numpy(real.astype(np.float64)))
    kid = metric_kid.kid_features_to_metric(*both, kid_subsets=20, kid_subset_size=100, verbose=False)
    mine = kid_of_subsets(real, fake, subsets=20, size=100)
    assert mine.mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-6)
    assert mine.std == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-6)
    found = metric_prc.prc_features_to_metric(*both, verbose=False)
    balls = neighbours(real, fake)
    assert (balls.precision.value, balls.recall.value) == pytest.approx((found["precision"], found["recall"]))
    score = metric_isc.isc_features_to_metric(torch.from_numpy(fake), splits=10, shuffle=False)
    mine_score = inception_score(fake, np.eye(64), splits=10).value
    assert mine_score == pytest.approx(score["inception_score_mean"], rel=1e-6)


def test_distances_of_pictures_are_torch_fidelitys(inception_weights):
    """From pixels to the numbers: with the published layers to 1e-6, with folded normalisations nearly so."""
    from torch_fidelity import metric_fid, metric_kid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    real, fake = pictures(48, 7), (0.6 * pictures(48, 8)).to(torch.uint8)
    with torch.inference_mode():
        looked = [
            torch.cat([theirs(each[at : at + 16])[0] for at in range(0, 48, 16)]) for each in (fake, real)
        ]
    statistics = [metric_fid.fid_features_to_statistics(each) for each in looked]
    fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    doubles = [each.double() for each in looked]
    kid = metric_kid.kid_features_to_metric(*doubles, kid_subsets=10, kid_subset_size=30, verbose=False)
    for as_published, digits in ((True, 1e-6), (False, 1e-5)):
        network = load_inception(inception_weights, None, as_published=as_published)
        mine, others = (features(network, each).numpy() for each in (fake, real))
        assert frechet_distance(moments_of(others), moments_of(mine)).value == pytest.approx(fid, rel=digits)
        found = kid_of_subsets(others, mine, subsets=10, size=30)
        assert found.mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=digits)


def test_the_distance_of_pictures_is_torchmetrics_without_antialiasing(inception_weights):
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = FrechetInceptionDistance(
        2048, feature_extractor_weights_path=str(inception_weights), antialias=False
    )
    real, fake = pictures(8, 3), pictures(8, 4) // 2
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = load_inception(inception_weights, None)
    mine = frechet_distance(*(moments_of(features(ours, each).numpy()) for each in (real, fake)))
    assert mine.value == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_ssim_is_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (pictures(3, seed, side=40) for seed in (5, 6))
    y = (0.7 * x + 0.3 * y).to(torch.uint8)
    theirs = structural_similarity_index_measure(x.double(), y.double(), data_range=255.0)
    mine = ssim(*(each.permute(0, 2, 3, 1).numpy() for each in (x, y)))
    assert mine.mean == pytest.approx(float(theirs), rel=1e-5)  # ours is exact: see its own test


@pytest.mark.parametrize("side", [40, 299, 400])
def test_the_clean_resize_is_clean_fids(side):
    from cleanfid.resize import build_resizer

    image = pictures(1, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = build_resizer("clean")(image[0].permute(1, 2, 0).numpy())
    assert np.array_equal(resize_clean(image)[0].permute(1, 2, 0).numpy(), theirs)
