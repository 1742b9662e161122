"""An evaluation on a real Ray cluster that is killed and run again: the same scores, and no block is looked at twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained

from data.manifest import ShardRecord
from flows import runs
from stages import evaluate
from stages.cluster import cluster
from stages.contract import FanoutConfig, Workspace
from stages.fanout import ShardTask
from stages.measuring import Measuring
from training.metrics.moments import accumulate_here

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
DRIVER = "import sys; from test_evaluate_killed import on_cluster; on_cluster(*sys.argv[1:])"
BLOCK = 2
"""Of 20 pictures for the parts: ten blocks, and one of what was generated."""


class Slowly(Measuring):
    """Leaves time to be killed in."""

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        time.sleep(0.3)
        return super().__call__(task, folder)


def evaluated(root: str, out: str) -> bytes:
    """Evaluates the run under `root` into `out`; the bytes of its scores."""
    plan = untrained.plan_of(root)
    spec = next(runs.spec_of(plan, stage) for stage in plan.stages if stage.name == "evaluate")
    workspace = Workspace(out, spec.fingerprint, FanoutConfig(num_workers=2))
    inputs = {role: ref.open() for role, ref in spec.inputs.items()}
    evaluate.run(evaluate.EvaluateConfig.model_validate(spec.config), inputs, workspace)
    return Path(out, evaluate.SCORES).read_bytes()


def on_cluster(root: str, out: str) -> None:
    evaluate.BLOCK, evaluate.Measuring = BLOCK, Slowly
    with cluster("local"):
        evaluated(root, out)


def test_killed_in_the_middle_it_ends_with_the_same_scores_and_extracts_no_finished_block_again(
    untrained_run, tmp_path, monkeypatch
):
    out, here = tmp_path / "killed", Path(__file__).parent
    receipts = out / "_meta" / "receipts"
    environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
    command = [sys.executable, "-c", DRIVER, str(untrained_run[0]), str(out)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as first:
        deadline = time.monotonic() + 300
        while len(list(receipts.glob("0*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
    done = [p for p in out.rglob("*") if p.suffix in (".json", ".npy") and p.name[0] != "."]
    kept = {path: path.stat().st_mtime_ns for path in done if path.parent != receipts.parent}
    assert 3 <= sum(path.parent == receipts for path in kept) < 11 and not (out / evaluate.SCORES).exists()
    finished = [path for path in kept if _is_of_a_finished_block(path, receipts)]
    subprocess.run(command, env=environment, check=True, timeout=500)
    assert all(path.stat().st_mtime_ns == kept[path] for path in finished) and len(finished) > 3
    assert len(list(receipts.glob("0*.json"))) == 11

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    monkeypatch.setattr(evaluate, "BLOCK", BLOCK)
    monkeypatch.setattr(evaluate, "map_shards", untrained.inline)
    monkeypatch.setattr(evaluate, "accumulate_on_cluster", accumulate_here)
    undisturbed = evaluated(str(untrained_run[0]), str(tmp_path / "undisturbed"))
    torch.set_num_threads(threads)
    assert (out / evaluate.SCORES).read_bytes() == undisturbed


def _is_of_a_finished_block(path: Path, receipts: Path) -> bool:
    index = path.stem.rsplit("_", 1)[-1]
    return (receipts / f"{index}.json").exists()
