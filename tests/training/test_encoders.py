"""Frozen encoders on tiny models written to disk in their libraries' own forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file

from data.errors import UserError
from training.encoders import ClipEncoder, T5Encoder, VaeEncoder, weights_digest
from training.metrics.dinov2 import load_dinov2
from training.pixels import preprocessed, to_uint8, to_unit_range
from training.pretrained import DTYPES
from training.t5_encoder import by_length

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


@pytest.fixture(scope="module")
def transformers_clip_folder(tmp_path_factory) -> Path:
    """A random CLIP as transformers keeps it, with a tokenizer of single letters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("transformers_clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    end = vocab["<|endoftext|>"]
    text = {
        "vocab_size": len(vocab),
        "max_position_embeddings": 16,
        "hidden_size": 24,
        "intermediate_size": 48,
    }
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = transformers.CLIPConfig(
        text_config=text | depth | ids, vision_config=vision | depth, projection_dim=20
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
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


def test_pictures_of_several_sizes_are_embedded_as_each_alone(clip_folder):
    clip = ClipEncoder.load(str(clip_folder))
    pictures = [PIXELS[0], PIXELS[1, :, :20], PIXELS[2], PIXELS[3, :, :, 3:]]
    together = clip.image(pictures)
    for i, picture in enumerate(pictures):
        torch.testing.assert_close(together[i], clip.image(picture[None])[0], atol=1e-6, rtol=1e-5)


def test_a_clip_of_transformers_gives_its_own_embeddings_and_states(transformers_clip_folder):
    folder = transformers_clip_folder
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    prepared = transformers.CLIPImageProcessor.from_pretrained(folder)(images=PIXELS, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, **prepared)
    clip = ClipEncoder.load(str(folder))
    assert (clip.embed_dim, clip.text_width, clip.context_length, clip.image_size) == (20, 24, 16, 32)
    embeddings, states = clip.text(CAPTIONS)
    torch.testing.assert_close(embeddings, output.text_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.image(PIXELS), output.image_embeds, atol=1e-5, rtol=1e-4)
    lengths = tokens["attention_mask"].sum(1).tolist()
    assert [len(s) for s in states] == lengths == [12, 16, 2]
    for row, length in enumerate(lengths):
        expected = output.text_model_output.last_hidden_state[row, :length]
        torch.testing.assert_close(states[row], expected, atol=1e-5, rtol=1e-4)


def test_transformers_preprocessing_is_repeated(transformers_clip_folder):
    folder = transformers_clip_folder
    y, x = torch.meshgrid(torch.linspace(0, 255, 90), torch.linspace(0, 255, 50), indexing="ij")
    picture = torch.stack([y, x, 255 - y]).to(torch.uint8)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    ours = preprocessed(picture[None], ClipEncoder.load(str(folder)).preprocess)[0]
    torch.testing.assert_close(ours, expected, atol=2.1 / 255 / 0.26, rtol=0)  # two grey levels


def test_a_preprocessing_kept_with_the_tokenizers_is_found(transformers_clip_folder, tmp_path):
    folder = shutil.copytree(transformers_clip_folder, tmp_path / "copy")
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": pictures | {"image_mean": [0, 0, 0]}})
    )
    assert ClipEncoder.load(str(folder)).preprocess["mean"] == [0, 0, 0]


def test_a_preprocessing_that_cannot_be_repeated_is_refused(transformers_clip_folder, tmp_path):
    folder = shutil.copytree(transformers_clip_folder, tmp_path / "copy")
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    with pytest.raises(UserError, match=r"preprocessor_config.json asks for another preprocessing"):
        ClipEncoder.load(str(folder))


def test_t5_states_are_its_own_unpadded_and_in_order(t5_folder):
    model = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5_folder)
    encoder = T5Encoder.load(str(t5_folder))
    captions = [*CAPTIONS, "a", "a blue square on the left"]
    states = encoder.text(captions, batch_size=2)
    assert encoder.text_width == 24 and len(states) == len(captions)
    for caption, ours in zip(captions, states, strict=True):
        tokens = tokenizer(caption, return_tensors="pt")["input_ids"]
        assert tokens[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            expected = model(input_ids=tokens).last_hidden_state[0]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert encoder.text([]) == []


def test_an_overlong_t5_caption_is_cut_and_still_ends_with_the_end_token(t5_folder):
    encoder = T5Encoder.load(str(t5_folder), max_length=5)
    values, lengths = encoder.ragged_text(["a b c d e f g", "a"])
    assert lengths == [5, 3] and values.shape == (8, 24)
    assert encoder.tokenizer(["a b c d e f g"], truncation=True, max_length=5)["input_ids"][0][-1] == 1


def test_captions_of_like_length_share_a_batch_the_longest_first():
    assert by_length([3, 9, 3, 1, 9], 2) == [[1, 4], [0, 2], [3]]


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


def other_vaes() -> dict[str, torch.nn.Module]:
    """One random VAE of each kind that has no posterior."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    residual = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "latent_channels": 4}
    once = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    per_block = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    return {
        "tiny": AutoencoderTiny(**channels, **once, latent_channels=3),
        "dc": AutoencoderDC(**channels, **residual, **per_block),
        "vq": VQModel(**blocks, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16),
    }


@pytest.mark.parametrize("name", ["tiny", "dc", "vq"])
def test_a_vae_without_a_posterior_gives_its_latent_and_no_spread(name, tmp_path):
    torch.manual_seed(0)
    vae = other_vaes()[name].eval()
    vae.save_pretrained(tmp_path)
    encoder = VaeEncoder.load(str(tmp_path))
    with torch.no_grad():
        latent = vae.encode(PIXELS.float() / 127.5 - 1, return_dict=False)[0]
        decoded = vae.decode(latent, return_dict=False)[0]
    mean, logvar = encoder.encode(PIXELS).chunk(2, dim=1)
    assert encoder.reduction == 2 and mean.shape[2:] == (16, 16) and (logvar == -30).all()
    torch.testing.assert_close(mean, latent, atol=1e-6, rtol=1e-5)
    expected = ((decoded + 1) / 2 * 255).clamp(0, 255)
    assert (encoder.decode(mean).float() - expected).abs().max() < 0.51


def test_the_log_variance_lies_where_diffusers_samples_it(vae_folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        vae.quant_conv.bias[3:] = torch.tensor([-100.0, 100.0, 0.0])
    vae.save_pretrained(tmp_path)
    logvar = VaeEncoder.load(str(tmp_path)).encode(PIXELS)[:, 3:]
    assert (logvar[:, 0] == -30).all() and (logvar[:, 1] == 20).all() and logvar[:, 2].abs().max() < 20


def test_another_diffusers_model_is_no_vae(tmp_path):
    UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match=r"holds a UNet2DModel: give a AutoencoderKL, .* or VQModel"):
        VaeEncoder.load(str(tmp_path))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_of_the_weights_and_results_are_float32(
    vae_folder, clip_folder, precision, tmp_path
):
    """On a CPU as on a GPU."""
    narrow = shutil.copytree(vae_folder, tmp_path / "vae")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    vae, clip = (
        kind.load(str(f), precision=precision)
        for kind, f in ((VaeEncoder, narrow), (ClipEncoder, clip_folder))
    )
    assert vae.vae.dtype == DTYPES[precision]
    outputs = (vae.encode(PIXELS), clip.image(PIXELS), *clip.text(CAPTIONS)[1])
    assert {output.dtype for output in outputs} == {torch.float32}
    torch.testing.assert_close(
        vae.encode(PIXELS), VaeEncoder.load(str(vae_folder)).encode(PIXELS), atol=0.05, rtol=0.05
    )
    similarity = (clip.image(PIXELS) * ClipEncoder.load(str(clip_folder)).image(PIXELS)).sum(1)
    assert similarity.min() > 0.999


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_t5_of_half_precision_stays_close(t5_folder, precision):
    full, half = (T5Encoder.load(str(t5_folder), precision=p) for p in ("fp32", precision))
    for there, here in zip(full.text(CAPTIONS), half.text(CAPTIONS), strict=True):
        assert here.dtype == torch.float32
        torch.testing.assert_close(here, there, atol=0.06, rtol=0.06)


def test_a_vae_that_overflows_fp16_says_so(vae_folder):
    """diffusers' own default, and SDXL's."""
    with pytest.raises(UserError, match=r"precision=fp16.*force_upcast.*use bf16 or fp32"):
        VaeEncoder.load(str(vae_folder), precision="fp16")


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


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("clip", "preprocessor_config.json"),
        ("clip", "tokenizer.json"),
        ("clip", "config.json"),
        ("clip", "model.safetensors"),
        ("t5", "tokenizer.json"),
        ("t5", "tokenizer_config.json"),
        ("t5", "model.safetensors"),
    ],
)
def test_preprocessing_and_tokenizer_are_part_of_the_digest(
    kind, name, transformers_clip_folder, t5_folder, tmp_path
):
    source = transformers_clip_folder if kind == "clip" else t5_folder
    folder = shutil.copytree(source, tmp_path / "copy")
    assert weights_digest(kind, str(folder)) == weights_digest(kind, str(source))
    content = bytearray((folder / name).read_bytes())
    content[-3:-3] = b" "
    (folder / name).write_bytes(content)
    assert weights_digest(kind, str(folder)) != weights_digest(kind, str(source))


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


@pytest.mark.parametrize("missing", ["tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_an_incomplete_transformers_clip_is_refused_by_what_it_lacks(
    missing, transformers_clip_folder, tmp_path
):
    folder = shutil.copytree(transformers_clip_folder, tmp_path / "folder")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing.split(".")[-1]):
        ClipEncoder.load(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_t5_is_refused_by_what_it_lacks(missing, t5_folder, tmp_path):
    folder = shutil.copytree(t5_folder, tmp_path / "folder")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing.split(".")[-1]):
        T5Encoder.load(str(folder))


@pytest.mark.parametrize(
    ("load", "folder", "weights"),
    [
        (ClipEncoder.load, "clip_folder", "open_clip_model.safetensors"),
        (ClipEncoder.load, "transformers_clip_folder", "model.safetensors"),
        (T5Encoder.load, "t5_folder", "model.safetensors"),
        (VaeEncoder.load, "vae_folder", "diffusion_pytorch_model.safetensors"),
        (load_dinov2, "dinov2_folder", "model.safetensors"),
    ],
)
def test_weights_that_are_torn_or_not_all_there_are_refused_and_none_is_drawn_at_random(
    load, folder, weights, request, tmp_path
):
    copy = shutil.copytree(request.getfixturevalue(folder), tmp_path / "copy")
    held = load_file(copy / weights)
    lost = sorted(name for name in held if "bias" in name)[0]
    save_file({name: held[name] for name in held if name != lost}, copy / weights, {"format": "pt"})
    with pytest.raises(UserError, match=lost.split(".")[-2]):
        load(str(copy))
    content = (copy / weights).read_bytes()
    for torn in (content[: len(content) // 2], b"", b"<html>"):
        (copy / weights).write_bytes(torn)
        with pytest.raises(UserError, match="can be loaded") as refused:
            load(str(copy))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config", ["{}", '{"model_cfg": []}', "[" * 100_000, '{"model_cfg": {"text_cfg": 5}}']
)
def test_a_clip_whose_config_is_none_is_refused(config, clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    (copy / "open_clip_config.json").write_text(config)
    with pytest.raises(UserError, match="copy"):
        ClipEncoder.load(str(copy))


def test_a_pickle_with_code_is_not_run_and_nobody_is_told_to(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    (copy / "open_clip_model.safetensors").unlink()
    torch.save({"a": Path("code")}, copy / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        ClipEncoder.load(str(copy))


def test_a_network_of_another_width_than_its_weights_is_refused(dinov2_folder, tmp_path):
    copy = shutil.copytree(dinov2_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for wrong, words in ((32, "have another shape"), ("x", "can be loaded")):
        (copy / "config.json").write_text(json.dumps(config | {"hidden_size": wrong}))
        with pytest.raises(UserError, match=words) as refused:
            load_dinov2(copy)
        assert "\n" not in str(refused.value)


def test_a_clip_is_no_t5(transformers_clip_folder):
    with pytest.raises(
        UserError, match="holds a model of type clip: give a folder of transformers with a T5"
    ):
        T5Encoder.load(str(transformers_clip_folder))


@pytest.mark.parametrize("source", ["ViT-L-14/nobody", "no/such/folder", "vit"])
def test_an_unknown_clip_is_refused_with_what_is_allowed(source):
    with pytest.raises(UserError, match=r"neither a folder nor a MODEL/TAG.*ViT-L-14/openai"):
        ClipEncoder.load(source)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("load", "source", "words"),
    [
        (ClipEncoder.load, "ViT-B-32/laion2b_s34b_b79k", "open_clip_model.safetensors"),
        (ClipEncoder.load, "darkroom-nobody/no-such-clip", "preprocessor_config.json.*model.safetensors"),
        (T5Encoder.load, "darkroom-nobody/no-such-t5", "tokenizer.json"),
        (VaeEncoder.load, "darkroom-nobody/no-such-vae", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_without_a_network_a_hub_name_says_what_to_download(load, source, words, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=words):
        load(source)
