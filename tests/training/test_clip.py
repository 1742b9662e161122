"""The CLIP trainable: its loss, its published folder, its production size."""

from __future__ import annotations

import datetime

import open_clip
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from training.encoders import ClipEncoder
from training.randomness import Draws
from training.systems import clip
from training.systems.clip import ClipConfig, contrastive_loss, shifted, tokenized

TINY = ClipConfig(
    embed_dim=8, image_size=16, vision_width=16, vision_layers=1, vision_heads=2, vision_patch_size=8,
    text_width=8, text_layers=1, text_heads=2, context_length=10,
)  # fmt: skip
FEATURES = [F.normalize(Draws(0, torch.arange(8)).normal(p, (5,)), dim=-1) for p in ("image", "text")]


def seeded(trainable):
    torch.manual_seed(0)
    return trainable.build()


def test_the_loss_is_the_symmetric_cross_entropy_of_open_clip():
    image, text = FEATURES
    expected = open_clip.ClipLoss()(image, text, torch.tensor(7.0))
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(7.0)).mean(), expected)


def test_perfectly_aligned_orthogonal_pairs_have_no_loss():
    loss = contrastive_loss(torch.eye(6), torch.eye(6), torch.tensor(100.0))
    assert loss.shape == (6,) and loss.max() < 1e-6


def test_every_sample_has_a_loss_and_every_weight_a_gradient(columns):
    trainable = clip.fit(TINY, columns)
    model = seeded(trainable)
    loss = trainable.loss(model, columns.batch(trainable.columns, range(6)), Draws(0, torch.arange(6)))
    loss.mean().backward()
    assert loss.shape == (6,) and loss.dtype == torch.float32
    assert all(p.grad is not None for p in model.parameters())


def test_a_moved_picture_repeats_its_edges():
    picture = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    moved = shifted(picture, torch.tensor([[0, 0], [1, -2]]), 2)
    assert torch.equal(moved[0], picture[0])
    assert moved[1, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7], [10, 11, 11, 11]]
    assert shifted(picture, torch.zeros(2, 2), 0) is picture


def test_half_of_the_pictures_are_mirrored_where_asked_and_the_position_says_which(columns):
    still = TINY.model_copy(update={"max_shift": 0})
    plain, flipping = (clip.fit(still.model_copy(update={"flip": flip}), columns) for flip in (False, True))
    model, draws = seeded(plain), Draws(0, torch.arange(6))
    batch = columns.batch(plain.columns, range(6))
    which = draws.uniform("clip.flip") < 0.5
    assert 0 < which.sum() < 6
    by_hand = torch.where(which.view(-1, 1, 1, 1), batch["image"].flip(-1), batch["image"])
    expected = plain.loss(model, {**batch, "image": by_hand}, draws)
    torch.testing.assert_close(flipping.loss(model, batch, draws), expected)


def test_tokens_are_those_of_open_clips_tokenizer():
    captions = ("a red circle", "a Large GREEN star, at the top of everything there is to see")
    expected = open_clip.tokenizer.SimpleTokenizer()(list(captions), context_length=10)
    assert torch.equal(tokenized(captions, 10), expected)


def test_the_published_folder_is_loaded_by_the_encoder_and_by_open_clip(columns, tmp_path):
    trainable = clip.fit(TINY, columns)
    model = seeded(trainable).eval()
    facts = trainable.publish(model, tmp_path)
    batch = columns.batch(("image", "caption"), range(4))
    encoder = ClipEncoder.load(str(tmp_path))
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    pixels = batch["image"].float() / 127.5 - 1
    with torch.no_grad():
        image, text, _ = model(pixels, tokenized(tuple(batch["caption"]), 10))
        torch.testing.assert_close(theirs.encode_image(pixels, normalize=True), image)
    torch.testing.assert_close(encoder.image(batch["image"]), image, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encoder.text(batch["caption"])[0], text, atol=1e-6, rtol=1e-5)
    assert facts == {"embed_dim": 8, "text_width": 8, "context_length": 10, "image_size": 16}


def test_pictures_of_another_size_are_resized_in_training_as_in_encoding(columns):
    trainable = clip.fit(TINY.model_copy(update={"image_size": 8}), columns)
    batch = columns.batch(trainable.columns, range(4))
    assert trainable.loss(seeded(trainable), batch, Draws(0, torch.arange(4))).isfinite().all()


def test_the_same_seed_builds_the_same_weights(columns):
    first, second = (seeded(clip.fit(TINY, columns)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_vit_l_14_builds_on_the_meta_device(columns):
    config = ClipConfig(
        embed_dim=768, image_size=224, vision_width=1024, vision_layers=24, vision_heads=16,
        vision_patch_size=14, text_width=768, text_layers=12, text_heads=12, context_length=77,
    )  # fmt: skip
    with torch.device("meta"):
        model = clip.fit(config, columns).build()
    assert 420e6 < sum(p.numel() for p in model.parameters()) < 435e6


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"vision_patch_size": 5}, "image_size 32 is not a multiple of vision_patch_size 5"),
        ({"vision_heads": 5}, "vision_width 96 is not a multiple of vision_heads 5"),
        ({"text_heads": 3}, "text_width 64 is not a multiple of text_heads 3"),
        (
            {"accumulate": 2},
            "accumulate 2 would show each caption fewer pictures than batch_size.*use more workers",
        ),
        ({"context_length": 78}, "context_length\n.*less than or equal to 77"),
        ({"batchsize": 8}, "batchsize\n.*not permitted"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ClipConfig(**setting)


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path):
    """Negatives come from all ranks, so the halves' mean is the whole batch's loss."""
    image, text = FEATURES
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), image, text), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    image = image.clone().requires_grad_()
    loss = contrastive_loss(image, text, torch.tensor(7.0))
    (2 * loss.mean()).backward()  # DDP halves the sum of the ranks' gradients
    torch.testing.assert_close(torch.cat([h["loss"] for h in halves]), loss.detach())
    torch.testing.assert_close(torch.cat([h["grad"] for h in halves]), image.grad)


def _rank(rank: int, folder: str, image: torch.Tensor, text: torch.Tensor) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    mine = slice(4 * rank, 4 * rank + 4)
    local = image[mine].clone().requires_grad_()
    loss = contrastive_loss(local, text[mine], torch.tensor(7.0))
    loss.mean().backward()
    torch.save({"loss": loss.detach(), "grad": local.grad}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
