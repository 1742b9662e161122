"""Grids of pictures from the averaged weights, on the schedule of the held-out loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from training import execution, loop, samples, window
from training.pixels import to_uint8, to_unit_range
from training.systems import denoiser, prior, vae
from training.systems.system import Batch

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


def _denoiser(columns, **changes) -> denoiser.Denoiser:
    config = denoiser.DenoiserConfig(
        num_attention_heads=2,
        batch_size=4,
        max_steps=5,
        learning_rate=0.01,
        ema_decay=0.9,
        **SIZES,
        **changes,
    )
    return denoiser.fit(config, columns)


def test_pictures_are_those_of_the_averaged_weights(columns, tmp_path: Path) -> None:
    trainable = _denoiser(columns)
    batch = columns.batch(trainable.columns, range(4))
    grids = {}
    for name in ("average zeroed", "all zeroed", "fresh"):
        state = loop.build_state(trainable, trainable.config)
        with torch.no_grad():
            zeroed = {
                "average zeroed": state.ema.shadow,
                "all zeroed": [*state.ema.shadow, *state.model.parameters()],
            }
            for tensor in zeroed.get(name, []):
                tensor.zero_()
        samples.write_samples(trainable, state, trainable.config, lambda: [batch], str(tmp_path / name))
        grids[name] = np.array(Image.open(tmp_path / name / "step_00000000.png"))
    np.testing.assert_array_equal(grids["average zeroed"], grids["all zeroed"])
    assert (grids["average zeroed"] != grids["fresh"]).any()


def _trained(columns, folder: Path, **changes) -> tuple[list[float | None], dict[str, np.ndarray]]:
    """The held-out losses of a training's rows, and its pictures by name."""
    trainable = _denoiser(columns, validate_every=2, **changes)

    def batches(first: int) -> Iterator[Batch]:
        for step in range(first, 10**9):
            yield columns.batch(trainable.columns, range(4)) | {"position": step * 4 + torch.arange(4)}

    state = loop.train(
        trainable,
        batches,
        trainable.config,
        folder / "checkpoints",
        identity="one",
        held_out=lambda: [columns.batch(trainable.columns, range(4, 7))],
    )
    losses = [row["validation_loss"] for row in state.curve or []]
    paths = sorted((folder / "_meta" / "samples").iterdir())
    return losses, {path.name: np.array(Image.open(path)).astype(int) for path in paths}


def test_a_training_leaves_pictures_of_the_steps_at_which_it_validates(
    columns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 1)
    losses, pictures = _trained(columns, tmp_path, compile=False)
    assert [loss is not None for loss in losses] == [False, True, False, True, True]
    assert list(pictures) == ["step_00000002.png", "step_00000004.png", "step_00000005.png"]
    first, last = pictures["step_00000002.png"], pictures["step_00000005.png"]
    assert first.shape == (64 + 4, 3 * 66 + 2, 3) and (first != last).any(), "it learns"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_training_validates_and_shows_the_same_and_compiles_nothing_for_it(
    columns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 1)
    plain, pictures = _trained(columns, tmp_path / "plain", compile=False)
    monkeypatch.setattr(execution, "prepared", functools.partial(execution.prepared, backend="aot_eager"))
    compiled: list[nn.Module] = []
    true_compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: (compiled.append(self), true_compile(self, **options))
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # held-out batches are of another size
        losses, same = _trained(columns, tmp_path / "compiled", compile=True)
    assert len(compiled) == 1
    assert [loss for loss in losses if loss] == pytest.approx([loss for loss in plain if loss], rel=1e-3)
    assert same.keys() == pictures.keys()
    for name, picture in pictures.items():
        assert np.abs(same[name] - picture).max() <= 2
