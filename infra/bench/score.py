"""How fast FID of two folders is, beside torch-fidelity and clean-fid: wall time, in turns, on one machine.

    python infra/bench/score.py [--images 300] [--side 256] [--rounds 3] [--threads 2] [--json result.json]

Everyone reads the same two folders of JPEGs and runs FID's Inception with the same random weights, in a process of its own,
from the start of the process to its end. clean-fid's own network cannot be had without a download, so it gets
torch-fidelity's, behind clean-fid's reading, resizing and batching: once with its defaults, whose 12 processes decode and
resize, and once without any. The peers are installed once, from the package index, into infra/bench/.peers/score.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
PEERS = HERE / ".peers" / "score"
WANTED = ("torch-fidelity==0.4.0", "clean-fid==0.1.35")

OURS = """
import sys
from flows.cli import main
real, fake, weights = sys.argv[1:]
extractor = f"--extractor=inception:custom={weights}"
sys.exit(main(["score", f"--real={real}", f"--fake={fake}", extractor, "--metrics=fid", "--json"]))
"""
TORCH_FIDELITY = """
import json, sys
from torch_fidelity import calculate_metrics
real, fake, weights = sys.argv[1:]
found = calculate_metrics(input1=fake, input2=real, cuda=False, fid=True, cache=False, verbose=False,
                          feature_extractor_weights_path=weights)
print(json.dumps(found))
"""
CLEAN_FID = """
import json, sys
import torch
from cleanfid import fid
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
real, fake, weights = sys.argv[1:]
network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights).eval()

def features(pixels):
    with torch.inference_mode():
        return network(pixels.clamp(0, 255).round().byte())[0]

score = fid.compare_folders(real, fake, features, mode="clean", device=torch.device("cpu"), verbose=False, WORKERS)
print(json.dumps({"fid": score}))
"""
CONTENDERS = {
    "darkroom score": OURS,
    "torch-fidelity": TORCH_FIDELITY,
    "clean-fid": CLEAN_FID.replace(", WORKERS", ""),
    "clean-fid, no workers": CLEAN_FID.replace("WORKERS", "num_workers=0"),
}


def main() -> None:
    """Makes the folders and the weights, runs everyone in turns, and prints medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("images", 300), ("side", 256), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    install()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = make_inputs(Path(scratch), options.images, options.side)
        rounds = [
            {name: timed(script, inputs, options.threads) for name, script in CONTENDERS.items()}
            for _ in range(options.rounds)
        ]
    ours = "darkroom score"
    for name in CONTENDERS:
        seconds = [each[name]["seconds"] for each in rounds]
        ratio = median(each[name]["seconds"] / each[ours]["seconds"] for each in rounds)
        first = rounds[0][name]
        sys.stdout.write(
            f"{name:<21} {median(seconds):7.1f} s   {ratio:.2f} of ours   FID {first['fid']:.6f}   {first['gib']:.2f} GiB\n"
        )
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1) + "\n")


def install() -> None:
    """The peers without what they depend on: our environment has that."""
    if not PEERS.is_dir():
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
        subprocess.run([*line, *WANTED], check=True)


def make_inputs(scratch: Path, images: int, side: int) -> list[str]:
    """Two folders of JPEGs of smooth noise, and random weights: paths."""
    import numpy as np
    import torch
    from PIL import Image

    from training.metrics.inception_network import build_inception

    rng = np.random.default_rng(0)
    for name, warmth in (("real", 0), ("fake", 20)):
        (scratch / name).mkdir()
        for number in range(images):
            small = Image.fromarray(rng.integers(0, 236, (16, 16, 3), dtype=np.uint8) + np.uint8(warmth))
            small.resize((side, side), Image.Resampling.BICUBIC).save(
                scratch / name / f"{number:05d}.jpg", quality=95
            )
    torch.manual_seed(0)
    model = build_inception()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(model.state_dict(), scratch / "weights.pth")
    return [str(scratch / name) for name in ("real", "fake", "weights.pth")]


def timed(script: str, inputs: list[str], threads: int) -> dict[str, float]:
    """Wall seconds of one process, the most memory that it held in GiB, and the FID that it found."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(PEERS)]),
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as complained:
        line = [sys.executable, "-c", script, *inputs]
        started = time.perf_counter()
        process = subprocess.Popen(line, env=environment, stdout=printed, stderr=complained)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        complained.seek(0)
        if process.returncode:
            raise SystemExit(complained.read()[-3000:])
        found = json.loads(printed.read().strip().splitlines()[-1])
    fid = found["scores"][0]["value"] if "scores" in found else next(
        value for name, value in found.items() if name in ("fid", "frechet_inception_distance")
    )  # fmt: skip
    return {"seconds": seconds, "fid": float(fid), "gib": usage.ru_maxrss / 2**20}


if __name__ == "__main__":
    main()
