"""The GPU scripts run where there is no GPU, at tiny sizes: a machine that has one is not kept by a script that does not start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SCRIPTS = Path(__file__).parents[2] / "infra" / "bench"


def figures(script: str, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """What a script writes of a tiny round."""
    command = [
        sys.executable,
        str(SCRIPTS / script),
        "--tiny",
        f"--json={tmp_path / 'result.json'}",
        *options,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return json.loads((tmp_path / "result.json").read_text())


def test_the_extractors_have_a_figure_each(tmp_path):
    found = {each["what"].split(",")[0]: each for each in figures("gpu_score.py", tmp_path)}
    assert list(found) == ["tiny: FID Inception", "tiny: DINOv2 ViT-L/14", "tiny: CLIP ViT-L/14"]
    assert all(each["images_per_s"] > 0 and len(each["rounds"]) == 1 for each in found.values())


def test_the_networks_have_a_figure_each(tmp_path):
    found = figures("gpu_train.py", tmp_path, "--eager", "--steps=5")
    assert [each["what"].split(",")[0] for each in found] == [
        "tiny: SD2-class U-Net",
        "tiny: DiT-XL/2",
        "tiny: prior",
    ]
    assert all(each["samples_per_s"] > 0 and each["tflops_per_s"] > 0 for each in found)


@pytest.mark.parametrize("script", ["gpu_embed.py", "gpu_encode.py"])
def test_a_stage_stands_beside_its_bare_loop(tmp_path, script):
    found = figures(script, tmp_path)
    assert len(found) == 1
    assert all(each["ours_per_s"] > 0 and each["bare_per_s"] > 0 for each in found)
