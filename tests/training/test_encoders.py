"""Frozen encoders on tiny models written to disk in their libraries' own forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from data.errors import UserError
from training.encoders import ClipEncoder, VaeEncoder, weights_digest
from training.pixels import preprocessed, to_uint8, to_unit_range

CAPTIONS = ["a red circle", "on a white background, a large green star at the top", ""]
PIXELS = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(
        **blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, scaling_factor=0.5
    ).save_pretrained(folder)
    return folder


def write_clip(folder: Path, **preprocess) -> Path:
    """A random CLIP in open_clip's local-dir form."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}
    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], **preprocess},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.model.CLIP(**model_cfg).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_the_sizes_are_those_of_the_model(clip_folder):
    clip = ClipEncoder.load(str(clip_folder))
    assert (clip.embed_dim, clip.text_width, clip.context_length, clip.image_size) == (20, 24, 16, 32)


def test_image_embeddings_are_open_clips_own(clip_folder):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    from PIL import Image

    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in PIXELS]
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
    embeddings = ClipEncoder.load(str(clip_folder)).image(PIXELS)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=1e-5)


def test_text_embeddings_are_open_clips_own_and_states_are_unpadded(clip_folder):
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(CAPTIONS)
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
    embeddings, states = ClipEncoder.load(str(clip_folder)).text(CAPTIONS)
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=1e-5)
    assert [tuple(s.shape) for s in states] == [(5, 24), (14, 24), (2, 24)]
    projected = torch.stack([s[-1] for s in states]) @ model.text_projection
    torch.testing.assert_close(
        torch.nn.functional.normalize(projected, dim=-1), expected, atol=1e-6, rtol=1e-5
    )


def test_an_overlong_caption_is_cut_and_still_ends_with_the_end_token(clip_folder):
    _, states = ClipEncoder.load(str(clip_folder)).text(["red " * 100])
    assert states[0].shape == (16, 24)


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(clip_folder):
    clip = ClipEncoder.load(str(clip_folder))
    torch.testing.assert_close(clip.image(PIXELS)[2:], clip.image(PIXELS[2:]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(clip.text(CAPTIONS)[0][1:], clip.text(CAPTIONS[1:])[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("shape", [(90, 50), (20, 40), (32, 64)])
def test_other_sizes_are_resized_as_open_clip_does(tmp_path, mode, shape):
    from PIL import Image

    folder = write_clip(tmp_path, resize_mode=mode)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    y, x = torch.meshgrid(torch.linspace(0, 255, shape[0]), torch.linspace(0, 255, shape[1]), indexing="ij")
    picture = torch.stack([y, x, 255 - y]).to(torch.uint8)
    expected = transform(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    ours = preprocessed(picture[None], ClipEncoder.load(str(folder)).preprocess)[0]
    torch.testing.assert_close(ours, expected, atol=2.1 / 255 / 0.2, rtol=0)  # two grey levels


def test_float_pixels_are_refused(clip_folder):
    with pytest.raises(ValueError, match=r"float32.*uint8"):
        ClipEncoder.load(str(clip_folder)).image(PIXELS.float())


def test_moments_and_pictures_are_the_vaes_own(vae_folder):
    encoder, vae = (
        VaeEncoder.load(str(vae_folder)),
        AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False),
    )
    with torch.no_grad():
        posterior = vae.encode(PIXELS.float() / 127.5 - 1).latent_dist
        decoded = vae.decode(posterior.mean).sample
    moments = encoder.encode(PIXELS)
    assert encoder.scaling_factor == 0.5
    assert moments.shape == (4, 6, 16, 16) and moments.dtype == torch.float32
    torch.testing.assert_close(moments[:, :3], posterior.mean, atol=1e-6, rtol=1e-5)
    expected = ((decoded + 1) / 2 * 255).clamp(0, 255)
    assert (encoder.decode(moments[:, :3]).float() - expected).abs().max() < 0.51


def test_a_pipelines_folder_is_a_vae_folder_too(vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "vae")
    assert VaeEncoder.load(str(tmp_path)).scaling_factor == 0.5
    assert weights_digest("vae", str(tmp_path)) == weights_digest("vae", str(vae_folder))


def test_every_grey_level_survives_the_network_range():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_the_digest_is_of_contents_not_of_places(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    before = weights_digest("clip", str(copy))
    assert before == weights_digest("clip", str(clip_folder))
    (copy / "notes.txt").write_text("no part of the encoder")
    assert weights_digest("clip", str(copy)) == before
    (copy / "open_clip_config.json").write_text("{}")
    assert weights_digest("clip", str(copy)) != before


def test_a_hub_name_has_a_digest_without_a_network():
    assert weights_digest("clip", "ViT-L-14/openai") != weights_digest("clip", "ViT-B-32/openai")


@pytest.mark.parametrize(
    ("load", "missing"),
    [
        (ClipEncoder.load, "open_clip_config.json"),
        (ClipEncoder.load, "open_clip_model.safetensors"),
        (VaeEncoder.load, "config.json"),
        (VaeEncoder.load, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused_by_what_it_lacks(load, missing, clip_folder, vae_folder, tmp_path):
    source = clip_folder if load == ClipEncoder.load else vae_folder
    folder = shutil.copytree(source, tmp_path / "folder")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing.split(".")[-1]):
        load(str(folder))


@pytest.mark.parametrize("source", ["ViT-L-14/nobody", "no/such/folder", "vit"])
def test_an_unknown_clip_is_refused_with_what_is_allowed(source):
    with pytest.raises(UserError, match=r"neither a folder nor a MODEL/TAG.*ViT-L-14/openai"):
        ClipEncoder.load(source)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("load", "source", "words"),
    [
        (ClipEncoder.load, "ViT-B-32/laion2b_s34b_b79k", "open_clip_model.safetensors"),
        (VaeEncoder.load, "darkroom-nobody/no-such-vae", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_without_a_network_a_hub_name_says_what_to_download(load, source, words, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=words):
        load(source)
