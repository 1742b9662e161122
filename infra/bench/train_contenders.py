"""What `train_peers.py` times, one contender per process: prints one line of JSON with the time of every optimizer step.

    python train_contenders.py RACE ours FOLDER WARM_UP STEPS [--tiny]
    python train_contenders.py RACE peer FOLDER WARM_UP STEPS --checkout DIR [--tiny]
    python train_contenders.py RACE flops FOLDER 0 0 [--tiny]

FOLDER is what `train_inputs.py` made. torch itself tells when an optimizer has made its step, of the peer's script and of
ours alike; behind the last wanted step the process ends. The script of a peer runs as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import runpy
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parents[2]))

from train_races import RACES, TINY, Divisors, Race

from data.ahead import prefetch
from data.loader import ColumnSet, batches
from data.manifest import load_snapshot
from training import loop
from training.systems.system import Batch


class Clock:
    """Notes when an optimizer has made a step, and ends the process behind the last one that is wanted."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.stamps: list[tuple[float, float]] = []
        self.stdout = os.dup(1)
        os.dup2(2, 1)  # what scripts print is no figure

    def __call__(self, *_: Any) -> None:
        self.stamps.append((time.perf_counter(), time.process_time()))
        if len(self.stamps) == self.warm_up + self.steps:
            os.write(self.stdout, (json.dumps(self.figures()) + "\n").encode())
            os._exit(0)  # what the scripts do behind their last step is not timed, and needs more models

    def figures(self) -> dict[str, Any]:
        """Median seconds and CPU seconds of a step behind the warm-up, and the seconds of each."""
        timed = self.stamps[self.warm_up - 1 :]
        wall, cpu = ([b[i] - a[i] for a, b in pairwise(timed)] for i in range(2))
        return {"step_s": median(wall), "step_cpu_s": median(cpu), "steps_s": wall}


def ours(race: Race, folder: Path) -> None:
    """Our loop on stored columns, as a training worker runs it."""
    stages = [stage for stage in ("embed", "encode") if (folder / stage).is_dir()]
    columns = ColumnSet([snapshot for s in stages if (snapshot := load_snapshot(str(folder / s), s))])
    config, trainable = race.config(), race.trainable(columns)

    def stream(step: int) -> Iterator[Batch]:
        made = batches(
            columns,
            trainable.columns,
            seed=config.seed,
            batch_size=config.batch_size,
            first_step=step,
        )
        return prefetch(made)

    loop.train(trainable, stream, config, folder / "ours" / "checkpoints", identity=race.title)


def peer(race: Race, folder: Path, checkout: Path) -> None:
    """The peer's script, as `python SCRIPT …` would run it."""
    script = checkout / race.script
    sys.path.insert(0, str(script.parent))
    os.chdir(folder)
    sys.argv = [str(script), *race.arguments(folder)]
    runpy.run_path(str(script), run_name="__main__")


def flops(race: Race) -> dict[str, float]:
    """Operations of encoding over those of training the network, for one sample: here, and at the published sizes."""
    published = dataclasses.replace(race, by=Divisors())
    return {
        "encoding_gflops": race.encoder_gflops(),
        "training_gflops": race.network_gflops(),
        "share_here": race.encoder_gflops() / race.network_gflops(),
        "share_published": published.encoder_gflops() / published.network_gflops(),
    }


def main() -> None:
    """Runs one contender."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("race", choices=list(RACES))
    parser.add_argument("who", choices=["ours", "peer", "flops"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("warm_up", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    race = (TINY if options.tiny else RACES)[options.race]
    if options.who == "flops":
        sys.stdout.write(json.dumps(flops(race)) + "\n")
        return
    register_optimizer_step_post_hook(Clock(options.warm_up, options.steps))
    if options.who == "ours":
        ours(race, options.folder)
    else:
        peer(race, options.folder, options.checkout)


if __name__ == "__main__":
    main()
