"""Networks with random weights, saved as their own libraries save them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL

from training.systems.clip import Clip, ClipConfig


def save_clip(folder: Path, **sizes: int) -> Path:
    """A CLIP as the CLIP stage publishes it; returns `folder`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    trainable = Clip(ClipConfig(**sizes))
    trainable.publish(trainable.build(), folder)
    return folder


def save_vae(folder: Path, *widths: int, **config: int) -> Path:
    """An AutoencoderKL with a level of each of `widths`; returns `folder`."""
    torch.manual_seed(0)
    levels = len(widths)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    AutoencoderKL(**blocks, block_out_channels=widths, norm_num_groups=4, **config).save_pretrained(folder)
    return folder


def save_t5(folder: Path, **sizes: int) -> Path:
    """A T5 encoder with a tokenizer of single letters; returns `folder`."""
    torch.manual_seed(0)
    letters = [(chr(c), -2.0) for c in range(ord("a"), ord("z") + 1)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *letters]
    config = transformers.T5Config(vocab_size=len(vocab), feed_forward_proj="gated-gelu", **sizes)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    transformers.T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder)
    return folder
