"""Encoding a shard: the VAE's own moments for every row, one shape per shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from data import columns, sources
from data.errors import UserError
from data.images import decode
from data.manifest import ShardRecord
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from data.tars import ShardReader
from stages.encode import EncodeConfig, Encoding
from stages.fanout import ShardTask
from training.encoders import VaeEncoder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    """A random VAE that halves sides once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3).save_pretrained(
        folder
    )
    return str(folder)


def make_shard(folder: Path, sizes: list[tuple[int, int]]) -> tuple[str, ShardRecord]:
    """A shard of noisy pictures of these (width, height), stored as they are."""
    noise = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i:02d}.png")
        (pictures / f"{i:02d}.txt").write_text(f"noise {i}")
    rows = sources.list_rows(SourceConfig(path=str(pictures)))
    out = str(folder / "shards")
    return out, write_shard(rows, 0, out, ShardConfig(resize="no", encode_format="png"))


def encode(vae: str, shard: tuple[str, ShardRecord], out: Path, **config) -> ShardRecord:
    data, record = shard
    work = Encoding(vae, data, EncodeConfig(**{"batch_size": 4, **config}))
    return work(ShardTask(0, record, {"data": "d", "vae": "v"}), str(out))()


def test_moments_are_the_vaes_own_row_by_row(vae, tmp_path):
    shard = make_shard(tmp_path, [(24, 16)] * 7)
    record = encode(vae, shard, tmp_path / "out")
    stored, encoder = columns.open_array(str(tmp_path / "out"), "vae_moments", 0), VaeEncoder.load(vae)
    assert stored.shape == (7, 6, 8, 12) and record.keys == shard[1].keys
    with ShardReader(f"{shard[0]}/00000.tar") as reader:
        for row in range(7):
            pixels = torch.from_numpy(decode(reader.image(row))).permute(2, 0, 1)[None]
            np.testing.assert_allclose(stored[row], encoder.encode(pixels)[0], atol=5e-3)


def test_the_number_of_decoding_threads_changes_no_byte(vae, tmp_path):
    shard = make_shard(tmp_path, [(16, 16)] * 9)
    one = encode(vae, shard, tmp_path / "one", decode_threads=1)
    assert one == encode(vae, shard, tmp_path / "many", decode_threads=5)


@pytest.mark.parametrize("odd", [2, 5])
def test_pictures_of_different_sizes_are_refused_with_what_to_set(vae, tmp_path, odd):
    """Within a batch and between two batches."""
    sizes = [(16, 16)] * 7
    sizes[odd] = (24, 16)
    shard = make_shard(tmp_path, sizes)
    with pytest.raises(
        UserError, match=rf"picture \d*{odd} is 24 x 16 and the first .* 16 x 16; .*center_crop"
    ):
        encode(vae, shard, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sides_that_the_vae_cannot_halve_are_refused_with_the_multiple(vae, tmp_path):
    shard = make_shard(tmp_path, [(15, 16)])
    with pytest.raises(UserError, match=r"15 x 16 .* 2-fold: set shard.image_size to a multiple of 2"):
        encode(vae, shard, tmp_path / "out")


def test_a_vae_without_a_posterior_stores_its_latent_and_no_spread(tmp_path):
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)
    tiny.save_pretrained(tmp_path / "tiny")
    encode(str(tmp_path / "tiny"), make_shard(tmp_path, [(16, 16)] * 3), tmp_path / "out")
    mean, logvar = np.split(columns.open_array(str(tmp_path / "out"), "vae_moments", 0), 2, axis=1)
    assert mean.shape == (3, 4, 8, 8) and (logvar == -30).all()
    sampled = (
        mean.astype(np.float32) + np.exp(0.5 * logvar.astype(np.float32)) * 4
    )  # noise of four deviations
    assert np.abs(sampled - mean).max() < 2e-6
