"""How long a checkpoint stops training: written while training goes on, against written before it does.

`python infra/bench/checkpoint.py [--million 20] [--rounds 7]`, interleaved, medians; the state is weights, EMA and two moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from training import optim
from training.checkpoint import Saver, TrainState
from training.ema import Ema
from training.systems.system import TrainConfig


def state_of(million: float) -> TrainState:
    """A state of a model with `million` million parameters after one step."""
    side = int((million * 1e6 / 8) ** 0.5)
    model = nn.Sequential(*(nn.Linear(side, side) for _ in range(8)))
    optimizer = optim.build_optimizer(model, TrainConfig())
    model(torch.ones(1, side)).sum().backward()
    optimizer.step()
    return TrainState(model, optimizer, Ema(model, 0.99), clock=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", type=float, default=20.0, help="parameters, in millions")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    state = state_of(arguments.million)
    pauses: dict[str, list[float]] = {"asynchronous": [], "synchronous": []}
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), "bench") as saver:
        for kind in ["asynchronous", "synchronous"] * (arguments.rounds + 1):
            state.clock += 1
            started = time.perf_counter()
            saver.save(state)
            if kind == "synchronous":
                saver.wait()
            pauses[kind].append(time.perf_counter() - started)
            saver.wait()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2
    medians = {kind: statistics.median(seconds[1:]) for kind, seconds in pauses.items()}
    result = {"megabytes": round(size / 1e6), **{k: round(v, 4) for k, v in medians.items()}}
    sys.stdout.write(
        json.dumps({**result, "ratio": round(medians["synchronous"] / medians["asynchronous"], 1)}) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
