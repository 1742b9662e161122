"""Embeddings, T5's states and latents under faults: whatever is killed, every file has the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import manifest, storage
from data.verify import verify
from flows.plan import Plan
from flows.planning import prepare_plan
from flows.runs import spec_of
from stages.embed import EmbedConfig, Embedding
from stages.encode import EncodeConfig, Encoding
from stages.fanout import ShardTask
from stages.text import Reading, TextConfig

sys.path.insert(0, str(Path(__file__).parent))
import networks
from artifacts import held
from command_lines import command
from processes import finish, kill, launch, members, stopped_at_work, wait_for, workers_below
from stuttering import FAULTS, stuttering

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

PICTURES, SHARDS, SIDE = 64, 8, 64
STAGES = ("shard", "embed", "text", "encode")


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and by which settings."""

    source: Path
    settings: dict[str, Any]

    def plan(self, root: Path) -> Plan:
        assignments = [f"{path}={value}" for path, value in self.settings.items()]
        return prepare_plan(str(self.source), assignments=assignments, root=str(root), retry_failed=False)

    def start(self, root: object, workers: int = 2, **variables: str) -> subprocess.Popen[str]:
        """`darkroom prepare`."""
        settings = self.settings | {"fanout.num_workers": workers}
        line = command("prepare", str(self.source), "--json", root=root, settings=settings)  # type: ignore[arg-type]
        return launch(line, **variables)

    def start_stage(self, name: str, root: Path, *options: str) -> subprocess.Popen[str]:
        """One stage by its spec, by two workers."""
        plan = self.plan(root)
        (stage,) = [stage for stage in plan.stages if stage.name == name]
        spec = spec_of(plan, stage)
        fanout = spec.fanout.model_copy(update={"num_workers": 2})
        (root / "spec.json").write_text(spec.model_copy(update={"fanout": fanout}).model_dump_json())
        return launch([sys.executable, "-m", "stages", str(root / "spec.json"), *options])


@pytest.fixture(scope="module")
def preparation(tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    """Pictures of noise, and encoders that work for a good part of a second on a shard of eight."""
    home = tmp_path_factory.mktemp("preparation")
    source = home / "pictures"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number:02d}.png")
        words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, 9)) for _ in range(24)]
        (source / f"{number:02d}.txt").write_text(" ".join(words))
    towers = {"vision_width": 160, "vision_layers": 8, "text_width": 64, "context_length": 77}
    clip = networks.save_clip(home / "clip", image_size=SIDE, **towers)
    vae = networks.save_vae(home / "vae", 48, 48, latent_channels=4)
    t5 = networks.save_t5(home / "t5", d_model=256, d_kv=32, d_ff=1024, num_layers=6, num_heads=8)
    settings = {
        "shard.samples_per_shard": PICTURES // SHARDS,
        "shard.image_size": SIDE,
        "shard.encode_format": "png",
        "fanout.stall_seconds": 90,
        "clip.pretrained": clip,
        "t5.pretrained": t5,
        "vae.pretrained": vae,
    }
    return Preparation(source, settings)


@pytest.fixture(scope="module")
def undisturbed(preparation: Preparation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of what one worker makes when nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed")
    finish(preparation.start(root, workers=1))
    assert all(len(receipts(root, stage)) == SHARDS for stage in STAGES)
    return root


@pytest.fixture
def root(undisturbed: Path, tmp_path: Path) -> Path:
    """A root that has the shards, and no column yet."""
    shutil.copytree(undisturbed / "store" / "shard", tmp_path / "store" / "shard")
    return tmp_path


def receipts(root: Path, stage: str) -> list[Path]:
    return list(root.glob(f"store/{stage}/*/_meta/receipts/0*.json"))


def times(paths: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in paths}


def is_under_way(root: Path, stage: str) -> bool:
    """Whether some shards of `stage` are finished; fails where none is left to be made."""
    found = len(receipts(root, stage))
    assert found < SHARDS, f"{stage} was over before it could be killed"
    return found >= 2


@pytest.mark.parametrize("stage", ["embed", "text", "encode"])
def test_a_worker_killed_in_the_middle_of_a_shard_changes_no_byte(preparation, undisturbed, root, stage):
    run = preparation.start_stage(stage, root)
    wait_for(lambda: is_under_way(root, stage), run)
    os.kill(wait_for(lambda: stopped_at_work(run.pid), run), signal.SIGKILL)
    assert "its worker died" in finish(run)
    assert held(root, stage) == held(undisturbed, stage)
    assert not list(root.rglob(".tmp-*"))


@pytest.mark.parametrize("stage", ["embed", "text", "encode"])
def test_a_node_killed_in_the_middle_of_a_shard_changes_no_byte(preparation, undisturbed, root, nodes, stage):
    (node,) = nodes.worker_nodes
    raylet = node.all_processes["raylet"][0].process
    run = preparation.start_stage(stage, root, f"--address={nodes.address}")
    wait_for(lambda: is_under_way(root, stage), run)
    worker = wait_for(lambda: stopped_at_work(raylet.pid), run)
    os.kill(raylet.pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    assert "its worker died" in finish(run)
    assert held(root, stage) == held(undisturbed, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_driver_killed_alone_leaves_no_worker_and_the_next_makes_what_is_missing(
    preparation, undisturbed, root, stage
):
    """Its pid and not its group: its workers find out by themselves, while the next run is under way."""
    if stage == "shard":
        shutil.rmtree(root / "store")
    run = preparation.start_stage(stage, root)
    wait_for(lambda: is_under_way(root, stage), run)
    workers = workers_below(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    kept = times(receipts(root, stage))
    try:
        finish(preparation.start_stage(stage, root))
        assert not {*workers} & {*members(run.pid)}
    finally:
        kill(run)  # two agents of Ray's take a minute to see that nobody is there
    assert held(root, stage) == held(undisturbed, stage)
    assert times(list(kept)) == kept, "nothing was made twice"
    assert not list(root.rglob(".tmp-*"))


def deaths(preparation: Preparation, root: Path) -> Iterator[str]:
    """Starts `darkroom prepare`, kills its pid alone in the first stage that is not over, and yields that stage's name."""
    for stage in STAGES:
        run = preparation.start(root)
        wait_for(lambda stage=stage: is_under_way(root, stage), run)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        yield stage
        kill(run)


def test_prepare_killed_alone_in_each_of_its_stages_ends_with_the_bytes_of_one_run(
    preparation, undisturbed, tmp_path
):
    kept: dict[Path, int] = {}
    for stage in deaths(preparation, tmp_path):
        assert times(list(kept)) == kept, f"what was finished before {stage} was made twice"
        kept |= times(list(tmp_path.glob("store/*/*/_meta/snapshots/*.json")))
        kept |= times(receipts(tmp_path, stage))
    finish(preparation.start(tmp_path))
    for stage in STAGES:
        assert held(tmp_path, stage) == held(undisturbed, stage), stage
    assert times(list(kept)) == kept
    assert verify(str(tmp_path)).ok


def test_an_object_store_that_fails_every_fifth_request_gets_the_bytes_of_a_disk(
    preparation, undisturbed, tmp_path, bucket, object_store
):
    with stuttering(object_store.address) as (address, faults):
        variables = {"AWS_ENDPOINT_URL": address, "HOME": str(tmp_path)}
        finish(preparation.start(f"{bucket}/root", **variables))
    for stage in STAGES:
        assert held(f"{bucket}/root", stage) == held(undisturbed, stage), stage
    assert {*FAULTS} <= {*faults}, "it met every kind of fault"


# --- disks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def works(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """stage -> its per-shard function, with a small network."""
    home, (data,) = tmp_path_factory.mktemp("networks"), (undisturbed / "store" / "shard").iterdir()
    clip = networks.save_clip(home / "clip", image_size=16, vision_layers=1, text_layers=1)
    vae = networks.save_vae(home / "vae", 8, 8)
    t5 = networks.save_t5(home / "t5", d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)
    return {
        "embed": Embedding(str(clip), str(data), EmbedConfig(min_clip_score=0.0), 0),
        "text": Reading(str(t5), str(data), TextConfig(), 0),
        "encode": Encoding(str(vae), str(data), EncodeConfig()),
    }


@pytest.mark.parametrize("stage", ["embed", "text", "encode"])
def test_whichever_file_of_a_column_finds_the_disk_full_the_next_attempt_writes_the_same_bytes(
    undisturbed, works, disk, tmp_path, stage
):
    (data,) = (undisturbed / "store" / "shard").iterdir()
    shard = manifest.load_receipt(str(data), 0)

    def attempt(folder: Path) -> None:
        record = works[stage](ShardTask(0, shard, {"data": "d"}), str(folder))()
        manifest.publish_receipt(str(folder), record)

    def contents(folder: Path) -> dict[str, bytes]:
        found = storage.list_tree(str(folder)) if folder.exists() else []
        return {entry.name: (folder / entry.name).read_bytes() for entry in found}

    attempt(tmp_path / "roomy")
    whole, finished = contents(tmp_path / "roomy"), set[int]()
    for room in itertools.count(1):
        folder = disk(f"size={4096 * room}") / f"{room}"
        try:
            attempt(folder)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        left = contents(folder)
        assert left.items() <= whole.items() and not [*folder.rglob(".tmp-*")], "whole files and no draft"
        finished.add(len(left))
        disk("size=8m")
        attempt(folder)
        assert contents(folder) == whole
        shutil.rmtree(folder)
    later = set(range(1, len(whole)))
    assert finished >= later, "each file in turn was the one without room; the first may fit a page"
