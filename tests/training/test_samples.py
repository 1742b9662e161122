"""Grids of pictures from the averaged weights, on the schedule of the held-out loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training import loop, samples
from training.pixels import to_uint8, to_unit_range
from training.systems import denoiser, prior, vae

SIZES = {"block_out_channels": (8, 8), "norm_num_groups": 4}


def _written(trainable, columns, folder: Path) -> np.ndarray | None:
    state = loop.build_state(trainable, trainable.config)
    before = [p.detach().clone() for p in state.model.parameters()]
    batch = columns.batch(trainable.columns, range(4))
    samples.write_samples(trainable, state, trainable.config, lambda: [batch], str(folder))
    assert state.model.training
    assert all(torch.equal(p, q) for p, q in zip(state.model.parameters(), before, strict=True))
    path = folder / "step_00000000.png"
    return np.array(Image.open(path)) if path.exists() else None


def test_a_vae_shows_pictures_and_what_becomes_of_them(columns, tmp_path: Path) -> None:
    trainable = vae.fit(vae.VaeConfig(**SIZES), columns)
    grid = _written(trainable, columns, tmp_path)
    assert grid is not None and grid.shape == (64 + 4, 8 * 66 + 2, 3), "eight of 16 px, four times as large"
    for i in range(4):
        shown = grid[2:66, 2 + 66 * i : 66 + 66 * i]
        np.testing.assert_array_equal(shown[::4, ::4], columns.arrays["image"][i])
    torch.manual_seed(trainable.config.seed)
    pixels = torch.from_numpy(columns.arrays["image"][:4]).permute(0, 3, 1, 2)
    with torch.no_grad():
        decoded = to_uint8(trainable.build()(to_unit_range(pixels), torch.zeros(4, 4, 8, 8))[0])
    for i in range(4):
        shown = grid[2:66, 2 + 66 * (4 + i) : 66 + 66 * (4 + i)]
        np.testing.assert_allclose(shown[::4, ::4], decoded[i].permute(1, 2, 0), atol=1)


def test_a_denoiser_shows_latents_that_depend_on_nothing_but_weights_and_conditions(
    columns, tmp_path: Path
) -> None:
    trainable = denoiser.fit(denoiser.DenoiserConfig(num_attention_heads=2, **SIZES), columns)
    grid, again = (_written(trainable, columns, tmp_path / name) for name in ("one", "two"))
    assert grid is not None and grid.shape == (64 + 4, 4 * 66 + 2, 3)
    np.testing.assert_array_equal(grid, again)


def test_a_denoiser_shows_pictures_where_its_vae_is_at_hand_and_says_where_not(
    columns, folders, tmp_path: Path, caplog
) -> None:
    config = denoiser.DenoiserConfig(num_attention_heads=2, **SIZES)
    grids = {}
    for name in (str(folders["vae"]), str(tmp_path / "gone")):
        columns.makers["vae_moments"] = name
        grids[name] = _written(denoiser.fit(config, columns), columns, tmp_path / Path(name).name)
    (decoded, latents) = grids.values()
    assert decoded is not None and decoded.shape == (64 + 4, 4 * 66 + 2, 3)
    pictures = decoded[2:66, 2:66]
    np.testing.assert_array_equal(pictures[::4, ::4].repeat(4, 0).repeat(4, 1), pictures)
    assert (latents[2:66, 2:66] == latents[2:66:16, 2:66:16].repeat(16, 0).repeat(16, 1)).all()
    assert (decoded != latents).any()
    assert "pictures are shown as latents, without their VAE" in caplog.text


def test_what_has_no_pictures_writes_none(columns, tmp_path: Path) -> None:
    assert _written(prior.fit(prior.PriorConfig(num_layers=1), columns), columns, tmp_path) is None
