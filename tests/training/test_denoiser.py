"""The latent denoiser: its conditioning, its objectives, its published folder, its production size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from pydantic import ValidationError

from training.randomness import Draws
from training.systems import denoiser
from training.systems.denoiser import DenoiserConfig, noised_embedding
from training.systems.embeddings import widened

TINY = DenoiserConfig(block_out_channels=(8, 8), num_attention_heads=2, norm_num_groups=4)


def seeded(trainable):
    torch.manual_seed(0)
    return trainable.build()


class Recorder(torch.nn.Module):
    """Keeps what the denoiser's network is given, and predicts zeros."""

    def forward(self, sample, timestep, **conditioning):
        self.seen = {"x_t": sample, "t": timestep, **conditioning}
        return (torch.zeros_like(sample),)


def recorded(columns, config, count=1000):
    trainable, network = denoiser.fit(config, columns), Recorder()
    batch = columns.batch(trainable.columns, [0] * count)
    batch["position"] = torch.arange(count)
    loss = trainable.loss(network, batch, Draws(0, batch["position"]))
    return trainable, batch, network.seen, loss


def test_the_image_embedding_is_noised_as_in_diffusers_stable_unclip_pipeline(columns, tmp_path):
    from diffusers import DDPMScheduler
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from diffusers.pipelines.stable_diffusion.pipeline_stable_unclip import StableUnCLIPPipeline

    trainable = denoiser.fit(TINY, columns)
    trainable.publish(seeded(trainable), tmp_path)
    pipeline = StableUnCLIPPipeline.__new__(StableUnCLIPPipeline)  # the method needs these two parts alone
    object.__setattr__(
        pipeline,
        "image_normalizer",
        StableUnCLIPImageNormalizer.from_pretrained(tmp_path / "image_normalizer", low_cpu_mem_usage=False),
    )
    object.__setattr__(
        pipeline,
        "image_noising_scheduler",
        DDPMScheduler.from_pretrained(tmp_path / "image_noising_scheduler"),
    )
    embedding = torch.from_numpy(columns.arrays["img_emb"])
    noise = Draws(0, torch.arange(12)).normal("n", (8,))
    for level in (0, 300, 999):
        theirs = pipeline.noise_image_embeddings(widened(embedding), level, noise=noise)
        ours = noised_embedding(embedding, noise, torch.full((12,), level), trainable.mean, trainable.std)
        torch.testing.assert_close(ours, theirs)


def test_drops_are_nested_so_that_the_unconditional_is_trained(columns):
    trainable, batch, seen, _ = recorded(columns, TINY)
    no_image = seen["class_labels"].abs().sum(1) == 0
    no_caption = (seen["encoder_hidden_states"] == trainable.empty_hidden).all(-1).all(-1)
    assert no_image.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert no_caption.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (no_caption | ~no_image).all()
    assert torch.equal(seen["encoder_hidden_states"][~no_caption][0], batch["text_hidden"][0])


def test_noise_levels_stay_below_their_limit(columns):
    _, _, low, _ = recorded(columns, TINY.model_copy(update={"max_noise_level": 1, "image_drop": 0.0}))
    assert low["class_labels"][:, 8:].unique(dim=0).shape[0] == 1
    _, _, high, _ = recorded(columns, TINY)
    assert high["class_labels"][:, 8:].unique(dim=0).shape[0] > 500


def test_latents_are_posterior_samples_times_the_scaling_factor(columns):
    columns.arrays["vae_moments"][0, :2], columns.arrays["vae_moments"][0, 2:] = 3.0, np.log(0.25)
    config = TINY.model_copy(update={"prediction_type": "sample"})
    _, _, _, loss = recorded(columns, config)
    # predicting zeros, the loss is E x_0^2 = 0.5^2 (3^2 + 0.25)
    assert loss.mean().item() == pytest.approx(0.25 * 9.25, rel=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow"])
def test_every_objective_gives_a_per_sample_loss_of_its_own_draws(columns, prediction_type):
    trainable = denoiser.fit(
        TINY.model_copy(update={"prediction_type": prediction_type, "min_snr_gamma": 5.0}), columns
    )
    model = seeded(trainable)
    whole = trainable.loss(model, columns.batch(trainable.columns, range(4)), Draws(0, torch.arange(4)))
    half = trainable.loss(model, columns.batch(trainable.columns, range(2, 4)), Draws(0, torch.arange(2, 4)))
    whole.mean().backward()
    assert whole.shape == (4,) and whole.dtype == torch.float32
    torch.testing.assert_close(whole[2:], half, atol=1e-5, rtol=1e-4)
    assert all(p.grad is not None for p in model.parameters())


def test_its_timesteps_have_the_mean_and_spread_that_the_config_names(columns):
    config = DenoiserConfig(prediction_type="flow", logit_mean=1.2, logit_std=0.5)
    draws = Draws(0, torch.arange(64))
    t = denoiser.fit(config, columns).timesteps(draws)
    normal = torch.logit(t / 1000) * 2 - 2.4
    torch.testing.assert_close(normal, draws.normal("denoiser.timestep"), atol=1e-3, rtol=0)


def test_the_published_folder_is_loaded_by_diffusers(columns, tmp_path):
    trainable = denoiser.fit(TINY, columns)
    model = seeded(trainable).eval()
    facts = trainable.publish(model, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False).eval()
    x, hidden, labels = torch.ones(1, 2, 4, 4), torch.ones(1, 6, 8), torch.ones(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(x, 10, hidden, class_labels=labels).sample,
            model(x, 10, hidden, class_labels=labels).sample,
        )
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "scheduler").config
    assert (scheduler.prediction_type, scheduler.use_flow_sigmas) == ("flow_prediction", True)
    assert facts["scaling_factor"] == 0.5


def test_a_stable_unclip_u_net_builds_on_the_meta_device(columns):
    columns.arrays["img_emb"] = np.ones((12, 768), np.float32)
    columns.arrays["text_hidden"] = np.ones((12, 77, 768), np.float32)
    columns.arrays["vae_moments"] = np.ones((12, 8, 32, 32), np.float32)
    config = DenoiserConfig(
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        num_attention_heads=(5, 10, 20, 20),
        norm_num_groups=32,
    )
    with torch.device("meta"):
        model = denoiser.fit(config, columns).build()
    assert 0.84e9 < sum(p.numel() for p in model.parameters()) < 0.9e9


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"caption_drop": 0.05}, "caption_drop"),
        ({"attention_levels": (True,)}, "attention_levels"),
        ({"prediction_type": "epsilon", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"prediction_type": "score"}, "prediction_type"),
    ],
)
def test_contradictions_are_refused_at_construction(changes, word):
    with pytest.raises(ValidationError, match=word):
        DenoiserConfig(**changes)
