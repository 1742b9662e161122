"""From what a person names to a plan: a demo of few pairs has batches that they fill."""

from pathlib import Path

import pytest
from PIL import Image

from flows.planning import recipe_plan


@pytest.fixture
def pairs(tmp_path) -> Path:
    """A folder of 100 captioned pictures."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(100):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"red {i}")
    return folder


def batches(pairs: Path, root: Path, name: str, *assignments: str) -> dict[str, int]:
    plan = recipe_plan(name, data=str(pairs), assignments=assignments, root=str(root), retry_failed=False)
    return {stage.name: c.batch_size for stage in plan.stages if hasattr(c := stage.node.config, "max_steps")}


def test_the_demo_of_few_pairs_has_smaller_batches_and_says_so(pairs, tmp_path, caplog):
    found = batches(pairs, tmp_path / "root", "demo")
    assert found == {"clip": 32, "vae": 16, "prior": 32, "denoiser": 32}
    assert "clip.batch_size is 32 here: 100 rows fill no batch of 128" in caplog.text


def test_a_batch_that_was_set_stays(pairs, tmp_path):
    assert batches(pairs, tmp_path / "root", "demo", "prior.batch_size=80")["prior"] == 80


def test_a_production_recipe_is_what_it_says(pairs, tmp_path):
    assert batches(pairs, tmp_path / "root", "unclip") == {"prior": 4096, "denoiser": 2048}
