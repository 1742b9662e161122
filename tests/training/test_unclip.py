"""The composed system: every picture is a function of the seed, its index and its prompt."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from data.errors import UserError
from training.randomness import Draws
from training.systems.unclip import Sampling, Unclip, slerp

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red circle", "a blue star on a white background", "a picture"]
SHORT = Sampling(num_inference_steps=3, prior_steps=3)


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


def test_predicted_embeddings_are_what_the_prior_says_in_the_scale_of_unit_vectors(system):
    system.prior.clip_mean.fill_(math.sqrt(8) * 8**-0.5)  # of eight unit entries: length 1 on the mean
    system.prior.clip_std.zero_()
    embeddings = system.predict_image_embedding(PROMPTS, draws(0, 1, 2), SHORT)
    torch.testing.assert_close(embeddings, torch.full((3, 8), 8**-0.5))


def test_more_candidates_never_move_away_from_the_text(system):
    text, _ = system.clip.text(PROMPTS, system.prior.config.num_embeddings)
    cosines = []
    for candidates in (1, 2, 8):
        sampling = SHORT.model_copy(update={"prior_candidates": candidates})
        predicted = system.predict_image_embedding(PROMPTS, draws(0, 1, 2), sampling)
        cosines.append(F.cosine_similarity(predicted, text, dim=-1))
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
