"""`darkroom export`: diffusers alone draws from the folder what `darkroom generate` draws from the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from untrained import finish, plan_of

from flows import cli
from training.randomness import Draws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PIPELINE = """
import sys, numpy, torch
from diffusers import StableUnCLIPPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_unclip
folder, noise, out = sys.argv[1:]
given = {name: torch.from_numpy(array) for name, array in numpy.load(noise).items()}
pipeline_stable_unclip.randn_tensor = lambda *_, **__: given["embedding"]
pipeline = StableUnCLIPPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
images = pipeline(
    ["a large red star"] * 2, num_inference_steps=3, guidance_scale=2.0, noise_level=100,
    prior_num_inference_steps=3, prior_guidance_scale=1.0, prior_latents=given["prior"], latents=given["latents"],
).images
for i, image in enumerate(images):
    image.save(f"{out}/{i}.png")
assert not {"data", "training", "stages", "flows"} & set(sys.modules), "the pipeline needs none of our code"
"""


def test_diffusers_draws_from_the_exported_run_what_generate_draws(tmp_path, capsys):
    root = f"--root={tmp_path / 'root'}"
    finish(plan_of(tmp_path / "root", evaluate__prior_candidates=1, evaluate__prior_steps=3))
    capsys.readouterr()
    drawn = [
        "generate",
        "latest",
        "a large red star",
        "--count=2",
        "--steps=3",
        f"--out={tmp_path}/ours",
        root,
    ]
    assert cli.main(drawn) == 0
    ours = [np.asarray(Image.open(line)).astype(int) for line in capsys.readouterr().out.split()]
    assert cli.main(["export", "latest", str(tmp_path / "exported"), root]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/exported\n"
    draws = Draws(0, torch.arange(2))
    noise = {
        "prior": draws.normal("prior.x_T.0", (16,)),
        "embedding": draws.normal("develop.embedding_noise", (16,)),
        "latents": draws.normal("develop.x_T", (8, 8, 8)),
    }
    np.savez(tmp_path / "noise.npz", **{name: numbers.numpy() for name, numbers in noise.items()})
    script = [sys.executable, "-I", "-c", PIPELINE, "exported", "noise.npz", "."]
    finished = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for i, picture in enumerate(ours):
        theirs = np.asarray(Image.open(tmp_path / f"{i}.png")).astype(int)
        assert np.abs(picture - theirs).max() <= 1
    assert cli.main(["export", "latest", str(tmp_path / "exported"), root]) == 2
    assert "not an empty folder" in capsys.readouterr().err
