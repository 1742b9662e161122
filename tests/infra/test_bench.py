"""The benches run at tiny sizes, those for a GPU without one: a machine that is lent is not kept by a script that does not start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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


def test_the_quality_of_reduced_decoding_is_given_for_each_size(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(4):
        coarse = np.random.default_rng(seed).integers(0, 256, (18, 24, 3), np.uint8)
        drawn = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        drawn.save(photos / f"{seed}.jpg", quality=92)
    script = SCRIPTS / "quality.py"
    command = [sys.executable, str(script), str(photos), f"--json={tmp_path / 'result.json'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "result.json").read_text())
    assert [what.rpartition(" to ")[2] for what in found] == ["64 px", "40 px", "256 px", "256 px"]
    for each in (one for figures in found.values() for one in figures):
        assert each["reduced"] > 38 and each["reduced against full"] > 40


ORPHANS = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from watched import watched
busy = "import time; end = time.process_time() + 1\\nwhile time.process_time() < end: pass"
parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {busy!r}]); time.sleep(0.5)"
print(sum(each.cpu_s for each in watched([sys.executable, "-c", parent], os.environ)[1]))
"""


def test_the_cpu_time_of_a_command_has_that_of_what_outlives_it():
    command = [sys.executable, "-c", ORPHANS, str(SCRIPTS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    assert 0.8 <= float(done.stdout) < 10, "the orphan's second, but for the last tenth"
