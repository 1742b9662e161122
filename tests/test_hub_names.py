"""An encoder by its hub name, from a hub on this machine: one state of it in a root, whatever the hub has later."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import result
from hub_server import HubServer

from training.vae_encoder import VaeEncoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = {"vae.pretrained": "somebody/tiny", "shard.image_size": 16, "fanout.num_workers": 1}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    publish_vae(tmp_path / "repository", seed=0)
    server = HubServer({"somebody/tiny": tmp_path / "repository"})
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    yield server
    server.stop()


def publish_vae(folder: Path, *, seed: int) -> None:
    """A diffusers VAE of random weights that halves sides twice."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, **kinds)
    vae.save_pretrained(folder, safe_serialization=True)


def draw(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")


def test_new_shards_are_encoded_by_the_commit_of_the_old_ones_until_another_is_asked_for(
    hub, darkroom, tmp_path
):
    pictures, root = tmp_path / "pictures", tmp_path / "root"
    draw(pictures, range(6))
    result(darkroom("prepare", str(pictures), "--json", root=root, settings=SETTINGS))
    first = hub.commit("somebody/tiny")
    old = VaeEncoder.load(str(tmp_path / "repository"))

    publish_vae(tmp_path / "repository", seed=1)
    draw(pictures, range(6, 10))
    printed = result(darkroom("prepare", str(pictures), "--json", root=root, settings=SETTINGS))
    folder = Path(next(stage["uri"] for stage in printed["stages"] if stage["name"] == "encode"))
    moments = [np.load(path) for path in sorted((folder / "vae_moments").glob("*.npy"))]
    assert [len(part) for part in moments] == [6, 4]
    shards = Path(next(stage["uri"] for stage in printed["stages"] if stage["name"] == "shard"))
    np.testing.assert_allclose(moments[1], old.encode(pixels_of(shards / "00001.tar")), rtol=1e-2, atol=1e-2)
    made = [json.loads(path.read_text()) for path in (folder / "_meta").rglob("*.json")]
    folders = {
        m["parents"]["vae"]["folder"] for m in made if isinstance(m.get("parents", {}).get("vae"), dict)
    }
    assert folders == {f"somebody/tiny@{first}"}


def pixels_of(archive: Path) -> torch.Tensor:
    """(B, 3, H, W) uint8 of a shard's pictures."""
    with tarfile.open(archive) as tar:
        pictures = [m for m in tar.getmembers() if m.name.endswith((".jpg", ".png"))]
        arrays = [np.array(Image.open(tar.extractfile(member))) for member in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
