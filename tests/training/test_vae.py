"""The VAE trainable: its loss, its scaling factor, its published folder."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import ValidationError

from data.errors import UserError
from training.encoders import VaeEncoder
from training.randomness import Draws
from training.systems import vae
from training.systems.vae import VaeConfig, kl_to_standard_normal

TINY = VaeConfig(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=2)


def seeded(trainable):
    torch.manual_seed(0)
    return trainable.build()


def test_the_kl_divergence_is_that_of_two_gaussians():
    mean, logvar = (
        Draws(0, torch.arange(3)).normal("m", (2, 4)),
        Draws(0, torch.arange(3)).normal("v", (2, 4)),
    )
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected.flatten(1).mean(1))


def test_the_loss_is_per_sample_and_a_function_of_its_draws(columns):
    trainable = vae.fit(TINY, columns)
    model = seeded(trainable)
    whole = trainable.loss(model, columns.batch(trainable.columns, range(4)), Draws(0, torch.arange(4)))
    half = trainable.loss(model, columns.batch(trainable.columns, range(2, 4)), Draws(0, torch.arange(2, 4)))
    whole.mean().backward()
    assert whole.shape == (4,) and whole.dtype == torch.float32
    torch.testing.assert_close(whole[2:], half)
    assert all(p.grad is not None for p in model.parameters())


def test_half_of_the_pictures_are_mirrored_where_asked_and_the_position_says_which(columns):
    plain, flipping = (vae.fit(TINY.model_copy(update={"flip": flip}), columns) for flip in (False, True))
    model, batch, draws = seeded(plain), columns.batch(("image",), range(12)), Draws(0, torch.arange(12))
    mirror = {**batch, "image": batch["image"].flip(-1)}
    found, as_is, other = (
        trainable.loss(model, pictures, draws).detach()
        for trainable, pictures in ((flipping, batch), (plain, batch), (plain, mirror))
    )
    which = draws.uniform("vae.flip") < 0.5
    assert 0 < which.sum() < 12
    torch.testing.assert_close(found, torch.where(which, other, as_is))


def test_weights_choose_the_parts_of_the_loss(columns):
    batch, draws = columns.batch(("image",), range(4)), Draws(0, torch.arange(4))
    model = seeded(vae.fit(TINY, columns))
    losses = [
        vae.fit(TINY.model_copy(update={"l1_weight": a, "mse_weight": b, "kl_weight": c}), columns).loss(
            model, batch, draws
        )
        for a, b, c in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 3))
    ]
    torch.testing.assert_close(losses[0] + 2 * losses[1] + 3 * losses[2], losses[3])


def test_published_latents_have_mean_0_and_spread_1_in_every_channel_and_decode_as_before(columns, tmp_path):
    trainable = vae.fit(TINY, columns)
    model = seeded(trainable).eval()
    pixels = columns.batch(("image",), range(len(columns)))["image"]
    with torch.inference_mode():
        before = model.vae.decode(model.vae.encode(pixels / 127.5 - 1).latent_dist.mean).sample
    facts = trainable.publish(model, tmp_path)
    encoder = VaeEncoder.load(str(tmp_path))
    mean, logvar = encoder.encode(pixels).chunk(2, dim=1)
    spread = (mean.square() + logvar.exp()).mean((0, 2, 3)) - mean.mean((0, 2, 3)).square()
    torch.testing.assert_close(spread, torch.ones(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(encoder.vae.decode(mean).sample, before, atol=1e-4, rtol=1e-4)
    assert facts == {"scaling_factor": 1.0, "latent_shape": [2, 4, 4]} and encoder.scaling_factor == 1.0


def test_the_published_folder_holds_the_weights_as_diffusers_loads_them(columns, tmp_path):
    """All but the 1x1 convolutions around the latent, which take up its standardisation."""
    trainable = vae.fit(TINY, columns)
    model = seeded(trainable)
    trainable.publish(model, tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).state_dict()
    for name, weight in model.vae.state_dict().items():
        assert torch.equal(loaded[name], weight) != ("quant_conv" in name), name


def test_publishing_leaves_the_model_as_it_was(columns, tmp_path):
    trainable = vae.fit(TINY, columns)
    model = seeded(trainable).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainable.publish(model, tmp_path)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_stable_diffusions_vae_builds_on_the_meta_device(columns):
    config = VaeConfig(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        mid_block_attention=True,
    )
    with torch.device("meta"):
        model = vae.fit(config, columns).build()
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


def test_pictures_that_cannot_be_halved_often_enough_are_refused(columns):
    with pytest.raises(UserError, match=r"16 x 16.*multiple of 32"):
        vae.fit(VaeConfig(block_out_channels=(8,) * 6), columns)


def test_an_unknown_option_is_refused():
    with pytest.raises(ValidationError, match="lpips"):
        VaeConfig(lpips=1.0)
