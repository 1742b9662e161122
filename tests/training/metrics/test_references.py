import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from data.errors import UserError
from training.metrics.extractors import Extractor
from training.metrics.references import read_reference, require_match, write_reference

RNG = np.random.default_rng(0)
MEAN, COVARIANCE = RNG.standard_normal(4), np.diag([1.0, 2.0, 3.0, 4.0])
EXTRACTOR = Extractor("clip", "d" * 64, "bicubic", lambda images: torch.zeros(len(images), 4))


@pytest.mark.parametrize("spatial", [{}, {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}], ids=["fid", "adm"])
def test_a_mean_and_a_covariance_are_read(tmp_path, spatial):
    np.savez(tmp_path / "stats.npz", mu=MEAN, sigma=COVARIANCE, **spatial)
    found = read_reference(tmp_path / "stats.npz", "inception")
    assert np.array_equal(found.gaussian.mean, MEAN) and np.array_equal(found.gaussian.covariance, COVARIANCE)
    assert found.gaussian.n is None and found.features is None


def test_features_for_kid_and_pictures_of_adm_are_read(tmp_path):
    features = RNG.standard_normal((9, 4)).astype(np.float32)
    np.savez(tmp_path / "kid.npz", feats=features)
    found = read_reference(tmp_path / "kid.npz", "inception")
    assert np.array_equal(found.features, features) and found.gaussian.n == 9
    images = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images)
    assert np.array_equal(read_reference(tmp_path / "adm.npz", "inception").images, images)


def test_edm2s_pickle_is_read_and_nothing_else_of_that_kind(tmp_path):
    content = {"fid": {"mu": MEAN, "sigma": COVARIANCE}, "fd_dinov2": {"mu": MEAN[:3], "sigma": np.eye(3)}}
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps(content))
    assert np.array_equal(read_reference(tmp_path / "stats.pkl", "inception").gaussian.mean, MEAN)
    assert len(read_reference(tmp_path / "stats.pkl", "dinov2").gaussian.mean) == 3
    with pytest.raises(UserError, match="has no statistics for clip; it has fid, fd_dinov2"):
        read_reference(tmp_path / "stats.pkl", "clip")


class Burglar:
    def __reduce__(self) -> tuple:
        return eval, ("open('stolen', 'w')",)


@pytest.mark.parametrize("content", [Burglar(), {"fid": {"mu": np.array([Burglar()]), "sigma": 1}}])
def test_a_pickle_that_calls_anything_is_refused_before_it_does(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"names builtins\.eval"):
        read_reference(tmp_path / "evil.pkl", "inception")
    assert not (tmp_path / "stolen").exists()


def test_an_array_of_objects_in_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([Burglar()], object), sigma=COVARIANCE)
    with pytest.raises(UserError, match=r"no \.npz file of plain arrays"):
        read_reference(tmp_path / "evil.npz", "inception")


def test_what_was_written_is_read_again_by_the_same_extractor_only(tmp_path):
    features = RNG.standard_normal((20, 4)).astype(np.float32)
    path = write_reference(tmp_path / "real", EXTRACTOR, features, "r" * 64)
    found = read_reference(path, "clip")
    np.testing.assert_allclose(found.gaussian.covariance, np.cov(features, rowvar=False), rtol=1e-6)
    assert found.gaussian.n == 20 and np.array_equal(found.features, features)
    require_match(found, name="clip", digest="d" * 64, resize="bicubic")
    require_match(found, name="clip", digest="", resize="bicubic")
    with pytest.raises(UserError, match="statistics of digest dddd"):
        require_match(found, name="clip", digest="e" * 64, resize="bicubic")
    with pytest.raises(UserError, match="statistics of resize bicubic"):
        require_match(found, name="clip", digest="", resize="clean")


@pytest.mark.parametrize("sigma", [np.eye(3), np.full((4, 4), np.nan)], ids=["another width", "not finite"])
def test_statistics_that_are_none_are_refused(tmp_path, sigma):
    np.savez(tmp_path / "stats.npz", mu=MEAN, sigma=sigma)
    with pytest.raises(UserError, match="no mean"):
        read_reference(tmp_path / "stats.npz", "inception")


def test_archives_that_lie_are_refused_in_a_sentence(tmp_path):
    """Locked, packed in a way that nobody knows, of an array that no memory holds, of files that are no arrays, or one array."""
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    plain = (tmp_path / "plain.npz").read_bytes()
    locked, packed = bytearray(plain), bytearray(plain)
    for at in range(len(plain) - 4):
        for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            if plain.startswith(mark, at):
                locked[at + flags] |= 1
                packed[at + flags + 2] = 99
    vast = io.BytesIO()
    np.lib.format.write_array_header_1_0(vast, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as file:
        file.writestr("mu.npy", vast.getvalue())
    with zipfile.ZipFile(tmp_path / "words.npz", "w") as file:
        file.writestr("mu", b"words")
    (tmp_path / "locked.npz").write_bytes(locked)
    (tmp_path / "packed.npz").write_bytes(packed)
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name, words in (
        ("locked.npz", "no .npz file"),
        ("packed.npz", "no .npz file"),
        ("words.npz", "no .npz file"),
        ("vast.npz", "do not fit into memory"),
        ("single.npy", "a single array"),
    ):
        with pytest.raises(UserError, match=words):
            read_reference(tmp_path / name, "clip")


def test_pictures_without_pixels_and_a_json_beside_that_is_none_are_refused(tmp_path):
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((4, 0, 8, 3), np.uint8))
    with pytest.raises(UserError, match="not pictures"):
        read_reference(tmp_path / "none.npz", "clip")
    np.savez(tmp_path / "deep.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        read_reference(tmp_path / "deep.npz", "clip")
