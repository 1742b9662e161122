import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models.inception import InceptionE

from training.metrics.inception import (
    MICRO_BATCH,
    features,
    load_inception,
    resize_clean,
    resize_tf1,
)
from training.metrics.inception_network import (
    FidInceptionA,
    FidInceptionE,
    FidInceptionELast,
    build_inception,
)


@pytest.fixture(scope="module")
def model(inception_weights) -> nn.Module:
    return load_inception(inception_weights, expect_sha256=None)


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.slow
def test_features_depend_on_their_own_picture_alone(model):
    images = pictures(3, 32, 32)
    together = features(model, images)
    assert together.shape == (3, 2048)
    assert together.dtype == torch.float32
    assert torch.equal(features(model, images), together)
    assert torch.equal(features(model, images[1:2])[0], together[1])
    assert together.std(dim=0).mean() > 0.01 * together.abs().mean()


@pytest.mark.slow
def test_folding_the_normalisations_changes_a_feature_in_its_seventh_digit(inception_weights, model):
    """The published layers in torch's own layout are the reference, to which those of torch-fidelity are equal bit by bit."""
    published = load_inception(inception_weights, expect_sha256=None, as_published=True)
    assert any(isinstance(module, nn.BatchNorm2d) for module in published.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    expected, found = (features(network, pictures(3, 40, 32)) for network in (published, model))
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    assert torch.equal(published.head, model.head)


@pytest.mark.slow
def test_more_pictures_than_a_micro_batch_keep_their_order(model):
    images = pictures(MICRO_BATCH + 1, 8, 8)
    assert torch.equal(features(model, images)[-1:], features(model, images[-1:]))


def test_a_safetensors_file_without_batch_counters_loads_the_same_weights(inception_weights, model, tmp_path):
    state = {
        k: v for k, v in torch.load(inception_weights, weights_only=True).items() if "num_batches" not in k
    }
    save_file(state, tmp_path / "random.safetensors")
    loaded = load_inception(tmp_path / "random.safetensors", expect_sha256=None)
    pairs = zip(loaded.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert not loaded.training


def test_the_digest_of_the_file_is_checked(inception_weights):
    load_inception(
        inception_weights, expect_sha256=hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    )
    with pytest.raises(ValueError, match="expected 6726825d"):
        load_inception(inception_weights)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit the FID Inception"):
        load_inception(tmp_path / "other.pth", expect_sha256=None)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        load_inception(tmp_path / "list.pth", expect_sha256=None)
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("<html>not found</html>")
        with pytest.raises(ValueError, match="no file of tensors"):
            load_inception(tmp_path / name, expect_sha256=None)
    with pytest.raises(FileNotFoundError, match="download pt_inception"):
        load_inception(tmp_path / "absent.pth")


def test_pickled_objects_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match="read safely"):
        load_inception(tmp_path / "module.pth", expect_sha256=None)


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(1, 3, 8, 8),
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["float", "channels last", "none"],
)
def test_only_uint8_pictures_are_taken(images):
    with pytest.raises(ValueError, match="non-empty uint8 tensor"):
        features(nn.Identity(), images)


def test_average_pools_leave_padding_out_and_the_last_pool_is_a_maximum():
    # A constant input tells: with padding counted its border would shrink; a border of negatives tells max from mean.
    x = torch.full((1, 8, 5, 5), -2.0)
    x[..., 0, 0] = -1.0
    inner = FidInceptionE(8)._pool(x)
    torch.testing.assert_close(inner[..., 3:, 3:], torch.full((1, 8, 2, 2), -2.0))
    torch.testing.assert_close(inner[0, 0, 0, 0], torch.tensor(-1.75))
    assert torch.equal(FidInceptionELast(8)._pool(x)[0, 0, :2, :2], torch.full((2, 2), -1.0))


def test_blocks_differ_from_torchvisions_in_the_border_of_the_pooled_branch_only():
    torch.manual_seed(1)
    theirs, ours = InceptionE(16).eval(), FidInceptionE(16).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 16, 6, 6)
    with torch.no_grad():
        a, b = theirs(x), ours(x)
    assert torch.equal(a[:, :-192], b[:, :-192])
    torch.testing.assert_close(a[..., 1:-1, 1:-1], b[..., 1:-1, 1:-1])
    assert not torch.allclose(a[:, -192:], b[:, -192:])


def test_block_a_has_torchvisions_width():
    assert FidInceptionA(16, pool_features=32).eval()(torch.rand(1, 16, 6, 6)).shape == (1, 256, 6, 6)


def test_the_network_has_the_fid_pools_where_they_belong():
    with torch.device("meta"):
        model = build_inception()
    names = {
        name: type(getattr(model, name)).__name__ for name, _ in model.named_children() if "Mixed" in name
    }
    assert names == {
        **dict.fromkeys(["Mixed_5b", "Mixed_5c", "Mixed_5d"], "FidInceptionA"),
        "Mixed_6a": "InceptionB",
        **dict.fromkeys(["Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"], "FidInceptionC"),
        "Mixed_7a": "InceptionD",
        "Mixed_7b": "FidInceptionE",
        "Mixed_7c": "FidInceptionELast",
    }
    assert model.fc.weight.shape == (1008, 2048)


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 13), (13, 4, 6), (6, 6, 6), (1, 9, 5)])
def test_the_tf1_resize_reads_the_legacy_grid(height, width, side):
    image = pictures(1, height, width)
    expected = torch.empty(1, 3, side, side)
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[0, :, y0, x0] * (1 - (x - x0)) + image[0, :, y0, x1] * (x - x0)
            bottom = image[0, :, y1, x0] * (1 - (x - x0)) + image[0, :, y1, x1] * (x - x0)
            expected[0, :, i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    torch.testing.assert_close(resize_tf1(image, side), expected, rtol=0, atol=2e-4)


def test_the_tf1_resize_keeps_pictures_of_the_networks_size_and_is_not_the_half_pixel_grid():
    image = pictures(2, 299, 299)
    assert torch.equal(resize_tf1(image), image.float())
    small = pictures(2, 32, 32)
    modern = F.interpolate(small.float(), size=(299, 299), mode="bilinear", align_corners=False)
    assert (resize_tf1(small) - modern).abs().max() > 10


@pytest.mark.slow
def test_pictures_of_mixed_sizes_are_resized_alone_and_the_two_conventions_differ(model):
    images = [pictures(1, side, side)[0] for side in (8, 20)]
    mixed = features(model, images)
    assert torch.equal(mixed[1], features(model, images[1][None])[0])
    assert not torch.allclose(mixed, features(model, images, "clean"))
    assert model.head.shape == (1008, 2048)


def test_the_clean_resize_is_pillows_bicubic_of_floats():
    image = pictures(1, 13, 17)
    found = resize_clean(image, 9)
    for channel in range(3):
        layer = Image.fromarray(image[0, channel].numpy().astype(np.float32))
        expected = np.asarray(layer.resize((9, 9), Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.array_equal(found[0, channel].numpy(), expected)
    assert not torch.equal(found, found.round())
    assert torch.equal(resize_clean(pictures(1, 299, 299)), pictures(1, 299, 299).float())


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_pictures_in_unit_ranges_are_an_error_and_never_wrapped(low):
    images = pictures(2, 8, 8).float() / 255 * (1 - low) + low
    for given in (images, list(images)):
        with pytest.raises(ValueError, match=r"got torch\.float32"):
            features(nn.Identity(), given)


@pytest.mark.parametrize("content", [b".", b")R.", b"\x80\x02h\x05.", b"", b"<html>", b"I5\n."])
def test_a_file_that_is_no_pickle_of_tensors_is_refused_whatever_it_makes_torch_raise(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth"):
        load_inception(tmp_path / "weights.pth", None)
