"""Exported folders: diffusers' own pipelines load them and draw the pictures that we draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline

from data.errors import UserError
from tests.training.conftest import PARTS
from training import clip_conversion
from training.clip_encoder import ClipEncoder
from training.export import export
from training.open_clip_towers import OpenClipTowers
from training.systems.unclip import Sampling, Unclip
from training.zeroed_padding import with_padding_token

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = ["a red star", "a big blue circle!", "picture", "red " * 30]
D, LATENT = 8, (2, 4, 4)


class Given:
    """`Draws` whose numbers are known: what a pipeline is given as latents, and what its generator draws."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.prior, self.latents = (
            torch.randn(count, *shape, generator=generator) for shape in ((D,), LATENT)
        )
        self.embedding = torch.randn(count, D, generator=self.generator())

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(2)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = {"prior.x_T.0": self.prior, "develop.embedding_noise": self.embedding}
        return numbers.get(purpose, self.latents).view(-1, *shape)


@pytest.fixture
def pictures(columns) -> torch.Tensor:
    return torch.from_numpy(columns.arrays["image"]).permute(0, 3, 1, 2)


def perturbed(system: Unclip) -> Unclip:
    """The system with weights that leave no part of it without effect."""
    torch.manual_seed(3)
    for module in (system.clip.towers.model, system.prior, system.unet):
        for name, parameter in module.named_parameters():
            if not name.startswith("clip_"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return system


@pytest.fixture
def noisy(system: Unclip) -> Unclip:
    return perturbed(system)


@pytest.fixture
def exported(noisy: Unclip, pictures, tmp_path) -> Path:
    export(noisy, pictures, tmp_path / "exported")
    return tmp_path / "exported"


def loaded(kind, folder: Path):
    pipeline = kind.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def levels_apart(ours: torch.Tensor, theirs: np.ndarray) -> torch.Tensor:
    """Differences of pixels, 0 to 255, of uint8 (B, 3, H, W) and a pipeline's (B, H, W, 3) in [0, 1]."""
    return (ours.float() - torch.from_numpy((theirs * 255).round()).permute(0, 3, 1, 2)).abs()


def test_the_pipeline_draws_our_pictures_from_the_same_noise(noisy, exported):
    pipeline, given = loaded(StableUnCLIPPipeline, exported), Given(len(PROMPTS))
    for guidance, prior_guidance, noise_level in ((1, 1, 0), (3, 1, 0), (2, 2, 300)):
        sampling = Sampling(
            num_inference_steps=5, prior_steps=4, prior_candidates=1,
            guidance_scale=guidance, prior_guidance_scale=prior_guidance, noise_level=noise_level,
        )  # fmt: skip
        ours = noisy.generate(PROMPTS, given, sampling)
        theirs = pipeline(
            PROMPTS, num_inference_steps=5, prior_num_inference_steps=4, guidance_scale=guidance,
            prior_guidance_scale=prior_guidance, noise_level=noise_level, prior_latents=given.prior,
            latents=given.latents, generator=given.generator(), output_type="np",
        ).images  # fmt: skip
        apart = levels_apart(ours, theirs)
        assert ours.float().std() > 20, "grey pictures would prove nothing"
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "epsilon", "noise_schedule": "scaled_linear"},
        {"prediction_type": "epsilon", "noise_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample", "noise_schedule": "linear"},
        {"prediction_type": "sample", "noise_schedule": "scaled_linear", "zero_terminal_snr": True},
        {"prediction_type": "v_prediction", "noise_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "noise_schedule": "scaled_linear", "zero_terminal_snr": True},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_the_pipeline_draws_our_pictures_whatever_the_network_predicts(
    columns, folders, pictures, changes, tmp_path
):
    module, config = PARTS["denoiser"]
    trainable = module.fit(config.model_copy(update=changes), columns)
    torch.manual_seed(0)
    trainable.publish(trainable.build().eval(), tmp_path / "denoiser")
    parts = str(folders["clip"]), str(folders["vae"]), folders["prior"], tmp_path / "denoiser"
    system, given = perturbed(Unclip.load(*parts)), Given(len(PROMPTS))
    assert system.objective == trainable.config.objective()
    export(system, pictures, tmp_path / "exported")
    pipeline = loaded(StableUnCLIPPipeline, tmp_path / "exported")
    sampling = Sampling(num_inference_steps=5, prior_steps=4, prior_candidates=1, guidance_scale=2)
    ours = system.generate(PROMPTS, given, sampling)
    theirs = pipeline(
        PROMPTS, num_inference_steps=5, prior_num_inference_steps=4, guidance_scale=2, prior_guidance_scale=1,
        noise_level=0, prior_latents=given.prior, latents=given.latents, generator=given.generator(), output_type="np",
    ).images  # fmt: skip
    apart = levels_apart(ours, theirs)
    assert ours.float().std() > 20, "grey pictures would prove nothing"
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


def test_the_picture_pipeline_varies_an_embedding_as_we_do(noisy, exported):
    pipeline, given = loaded(StableUnCLIPImg2ImgPipeline, exported), Given(2)
    embedding = F.normalize(given.prior, dim=-1)
    ours = noisy.develop(embedding, ["a red star"] * 2, given, Sampling(num_inference_steps=5))
    theirs = pipeline(
        prompt=["a red star"] * 2, image_embeds=embedding * D**0.5, num_inference_steps=5, guidance_scale=2.0,
        latents=given.latents, generator=given.generator(), output_type="np",
    ).images  # fmt: skip
    assert levels_apart(ours, theirs).max() <= 1


def test_a_pictures_embedding_has_our_direction_and_on_average_our_length(noisy, exported, pictures):
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(exported / "image_encoder")
    processor = transformers.CLIPImageProcessor.from_pretrained(exported / "feature_extractor")
    prepared = processor(list(pictures), return_tensors="pt").pixel_values
    with torch.no_grad():
        embeddings = encoder(prepared).image_embeds
    torch.testing.assert_close(F.normalize(embeddings, dim=-1), noisy.clip.image(pictures), atol=1e-5, rtol=0)
    assert embeddings.norm(dim=-1).mean().item() == pytest.approx(D**0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_reaches_the_u_net_as_zeros_in_every_precision(noisy, dtype):
    tokenizer = clip_conversion.tokenizer(noisy.clip, 6)
    encoder = with_padding_token(clip_conversion.text_model(noisy.clip).text_model, tokenizer)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = encoder.to(dtype)(tokens).last_hidden_state.float()
    bias = encoder.final_layer_norm.bias[:D].float()
    projected = states[..., :D] - states[..., D : D + 1] * bias
    is_padding = tokens == tokenizer.pad_token_id
    assert is_padding.sum() == 4
    assert projected[is_padding].abs().max() < (2e-4 if dtype == torch.float32 else 0.02)
    assert projected.isfinite().all()
    if dtype == torch.float32:
        ours = noisy._hidden(PROMPTS)
        torch.testing.assert_close(projected[~is_padding], ours[~is_padding], atol=1e-4, rtol=0)


def test_the_tokenizer_cuts_up_text_as_open_clip_does(noisy):
    captions = [
        "", "A  Photo,of 12 dogs' & cats!!", "it's they'll I'd", "naïve café — 東京 🙂", "a_b-c/d.e\tf\nG",
        "supercalifragilisticexpialidocious", "!", "99.5% (o_O) \"quoted\" #tag @me", "word " * 40,
    ]  # fmt: skip
    theirs, lengths = noisy.clip.towers.tokens(captions)
    batch = clip_conversion.tokenizer(noisy.clip, 12)(captions, truncation=True)
    assert batch.input_ids == [row[:n].tolist() for row, n in zip(theirs, lengths, strict=True)]


def test_a_clip_that_transformers_keeps_is_saved_as_it_is(noisy, pictures, tmp_path):
    text, vision = clip_conversion.text_model(noisy.clip), clip_conversion.vision_model(noisy.clip)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), projection_dim=D
        )
    )
    model.load_state_dict(text.state_dict() | vision.state_dict(), strict=False)
    for part in (
        model, clip_conversion.tokenizer(noisy.clip, 12), clip_conversion.picture_processor(noisy.clip)
    ):  # fmt: skip
        part.save_pretrained(tmp_path / "kept")
    kept = ClipEncoder.load(str(tmp_path / "kept"))
    torch.testing.assert_close(clip_conversion.text_model(kept).state_dict(), text.state_dict())
    torch.testing.assert_close(clip_conversion.vision_model(kept).state_dict(), vision.state_dict())
    assert clip_conversion.tokenizer(kept, 6)(PROMPTS, truncation=True).input_ids[3][-1] == 49407
    torch.testing.assert_close(kept.image(pictures), noisy.clip.image(pictures), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"ls_init_value": 0.1}, "ls_1"), ({"pool_type": "avg"}, "differently"), ({"no_ln_pre": True}, "pre_layrnorm")],
)  # fmt: skip
def test_a_tower_that_transformers_cannot_express_is_refused(noisy, changes, word):
    sizes = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 12, "width": 8, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(D, {**sizes, **changes}, text).eval()
    model.visual.preprocess_cfg = noisy.clip.preprocess
    with pytest.raises(UserError, match=f"vision.*cannot be exported.*{word}"):
        clip_conversion.vision_model(ClipEncoder(OpenClipTowers(model, noisy.clip.towers.tokenizer)))


def test_a_folder_that_holds_something_is_refused_and_untouched(noisy, pictures, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        export(noisy, pictures, tmp_path)
    with pytest.raises(UserError, match="not an empty folder"):
        export(noisy, pictures, tmp_path / "mine.txt")


def test_the_index_names_the_libraries_classes_alone(exported):
    index = json.loads((exported / "model_index.json").read_text())
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    assert {library for library, _ in parts.values()} <= {"diffusers", "transformers", "stable_diffusion"}
    assert all((exported / name).is_dir() for name in parts)
    assert not list(exported.rglob("*.bin")) and not list(exported.rglob("*.py"))
