"""The composed system: every picture is a function of the seed, its index and its prompt."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.errors import UserError
from training.randomness import Draws
from training.systems import clip, denoiser, prior, vae
from training.systems.clip import ClipConfig
from training.systems.denoiser import DenoiserConfig
from training.systems.prior import PriorConfig
from training.systems.unclip import Sampling, Unclip, slerp
from training.systems.vae import VaeConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red circle", "a blue star on a white background", "a picture"]
SHORT = Sampling(num_inference_steps=3, prior_steps=3)
PARTS = {
    "clip": (clip, ClipConfig(embed_dim=8, image_size=16, vision_width=16, vision_layers=1, vision_heads=2,
                              vision_patch_size=8, text_width=8, text_layers=1, text_heads=2, context_length=12)),
    "vae": (vae, VaeConfig(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=2)),
    "prior": (prior, PriorConfig(num_layers=1, num_attention_heads=2, attention_head_dim=8)),
    "denoiser": (denoiser, DenoiserConfig(block_out_channels=(8, 8), num_attention_heads=2, norm_num_groups=4)),
}  # fmt: skip


@pytest.fixture
def folders(columns, tmp_path) -> dict[str, Path]:
    """The four published parts, untrained."""
    for name, (system, config) in PARTS.items():
        torch.manual_seed(0)
        trainable = system.fit(config, columns)
        trainable.publish(trainable.build().eval(), tmp_path / name)
    return {name: tmp_path / name for name in PARTS}


@pytest.fixture
def system(folders) -> Unclip:
    return Unclip.load(str(folders["clip"]), str(folders["vae"]), folders["prior"], folders["denoiser"])


def draws(*indices: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.tensor(indices))


def test_pictures_have_the_size_of_the_data_and_depend_on_the_seed(system):
    pictures = system.generate(PROMPTS, draws(0, 1, 2), SHORT)
    assert pictures.shape == (3, 3, 16, 16) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, system.generate(PROMPTS, draws(0, 1, 2), SHORT))
    assert not torch.equal(pictures, system.generate(PROMPTS, draws(0, 1, 2, seed=1), SHORT))


def test_a_picture_does_not_depend_on_the_batch_it_is_drawn_in(system):
    sampling = SHORT.model_copy(update={"prior_guidance_scale": 2.0, "noise_level": 100})
    whole = system.generate(PROMPTS, draws(0, 1, 2), sampling)
    alone = system.generate(PROMPTS[1:2], draws(1), sampling)
    assert (whole[1:2].int() - alone.int()).abs().max() <= 1  # batched matrix products round differently


def test_predicted_embeddings_are_unit_vectors(system):
    embeddings = system.predict_image_embedding(PROMPTS, draws(0, 1, 2), SHORT)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))


def test_more_candidates_never_move_away_from_the_text(system):
    text, _ = system.clip.text(PROMPTS)
    cosines = []
    for candidates in (1, 2, 8):
        sampling = SHORT.model_copy(update={"prior_candidates": candidates})
        cosines.append((system.predict_image_embedding(PROMPTS, draws(0, 1, 2), sampling) * text).sum(-1))
    assert (cosines[1] >= cosines[0] - 1e-5).all() and (cosines[2] >= cosines[1] - 1e-5).all()


def test_variations_need_no_prompt_and_differ_by_index(system):
    embedding = F.normalize(torch.ones(1, 8), dim=-1).expand(2, -1)
    pictures = system.develop(embedding, None, draws(0, 1), SHORT)
    assert pictures.shape == (2, 3, 16, 16)
    assert not torch.equal(pictures[0], pictures[1])


def test_a_prompt_longer_than_any_caption_of_the_data_is_cut(system):
    assert system.generate(["red " * 50], draws(0), SHORT).shape == (1, 3, 16, 16)


def test_slerp_runs_along_the_arc_at_constant_speed():
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    points = slerp(start, end, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(points, torch.tensor([[1, 0], [math.sqrt(0.5)] * 2, [0, 1]]))
    torch.testing.assert_close(slerp(start, start, torch.tensor([0.3])), start[None])


def test_the_network_sees_pipelines_timesteps_of_the_published_schedule(system, folders):
    assert system.objective.prediction_type == "flow"
    assert (folders["denoiser"] / "scheduler" / "scheduler_config.json").is_file()


def test_a_folder_of_another_stage_is_refused(folders):
    with pytest.raises(UserError, match=r"image_normalizer.*training stage published"):
        Unclip.load(str(folders["clip"]), str(folders["vae"]), folders["prior"], folders["prior"] / "prior")
