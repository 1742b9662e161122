"""The GPU script of the extractors runs where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_extractors_script_gives_a_figure_for_each_at_a_tiny_size(tmp_path):
    script = CHECKOUT / "infra" / "bench" / "gpu_score.py"
    command = [sys.executable, str(script), "--tiny", f"--json={tmp_path / 'result.json'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = {each["what"].split(",")[0]: each for each in json.loads((tmp_path / "result.json").read_text())}
    assert list(found) == ["tiny: FID Inception", "tiny: DINOv2 ViT-L/14", "tiny: CLIP ViT-L/14"]
    assert all(each["images_per_s"] > 0 and len(each["rounds"]) == 1 for each in found.values())
