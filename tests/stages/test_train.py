"""What a training stage refuses before it starts, and that it survives the death of its worker."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from data import sources
from data.errors import UserError
from data.manifest import Snapshot, publish_snapshot
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from stages import model_card
from stages.cluster import cluster, num_cpus
from stages.contract import Workspace
from stages.train import STAGES, run
from training import checkpoint_facts
from training.sinks import rows_at
from training.systems.denoiser import DenoiserConfig
from training.systems.vae import VaeConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    with cluster("local"):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Snapshot:
    """One shard of 24 noisy pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"noise {i}")
    rows = sources.list_rows(SourceConfig(path=str(folder)))
    out = str(tmp_path_factory.mktemp("shards"))
    record = write_shard(rows, 0, out, ShardConfig(image_size=16, encode_format="png"))
    snapshot = Snapshot(
        stage="shard",
        version=1,
        fingerprint="d" * 12,
        config={},
        columns=("caption", "image"),
        shards=(record,),
    )
    return publish_snapshot(out, snapshot)


def tiny(**changes) -> VaeConfig:
    return VaeConfig(
        block_out_channels=(8, 8), norm_num_groups=4, **({"max_steps": 4, "batch_size": 6} | changes)
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_workers": 4}, "vae.batch_size=6 is not a multiple of vae.num_workers=4"),
        (
            {"fsdp": True, "num_workers": 1},
            "vae.fsdp shards weights over workers and needs vae.num_workers of 2 or more",
        ),
        ({"num_workers": 6}, "vae.num_workers=6, but the cluster has 0 GPUs"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_starts(data, tmp_path, changes, sentence):
    if num_cpus() >= 6 and changes.get("num_workers") == 6:
        changes, sentence = (
            {"num_workers": 600, "batch_size": 600},
            "vae.num_workers=600, but the cluster has 0 GPUs",
        )
    with pytest.raises(UserError, match=sentence):
        run("vae", tiny(**changes), {"data": data}, Workspace(str(tmp_path / "vae"), "f" * 12))
    assert not (tmp_path / "vae").exists()


def test_a_column_that_no_input_has_is_named_before_anything_starts(data, tmp_path):
    config = DenoiserConfig(max_steps=4, batch_size=6)
    with pytest.raises(
        UserError, match="denoiser reads img_emb, text_hidden, vae_moments, which none of its inputs has"
    ):
        run("denoiser", config, {"data": data}, Workspace(str(tmp_path / "denoiser"), "f" * 12))
    assert not (tmp_path / "denoiser").exists()


def test_a_batch_that_the_data_cannot_fill_is_refused_before_anything_starts(data, tmp_path):
    with pytest.raises(
        UserError, match=r"vae.batch_size=30, but there are only 24 samples to train on: use at most 24"
    ):
        run("vae", tiny(batch_size=30), {"data": data}, Workspace(str(tmp_path / "vae"), "f" * 12))


def test_a_checkpoint_of_another_training_is_refused_and_stays(data, tmp_path):
    step = tmp_path / "vae" / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    facts = {"identity": "another", "clock": 2}
    (step / "state.json").write_text(json.dumps({**facts, "digest": checkpoint_facts.digest(facts)}))
    with pytest.raises(UserError, match=r"step_00000002 belongs to another, not to .*: remove it or train"):
        run("vae", tiny(), {"data": data}, Workspace(str(tmp_path / "vae"), "f" * 12))
    assert (step / "state.json").is_file()


def test_an_extended_training_has_all_metrics_and_a_card_that_says_what_both_parts_took(data, tmp_path):
    constant = {"schedule": "constant", "warmup_steps": 5, "checkpoint_every": 30, "seed": 11}
    short, long = tmp_path / "short", tmp_path / "long"
    run("vae", tiny(max_steps=40, num_workers=2, **constant), {"data": data}, Workspace(str(short), "a" * 12))
    run("vae", tiny(max_steps=60, num_workers=1, **constant), {"data": data}, Workspace(str(long), "b" * 12))
    before, rows = (rows_at(str(folder / "_meta" / "metrics.parquet")) for folder in (short, long))
    assert [(row["step"], row["devices"]) for row in rows] == [(20, 2), (40, 1), (60, 1)]
    assert rows[0] == before[0] and [row["step"] for row in before] == [20, 40]
    assert len(list((long / "_meta" / "tensorboard").iterdir())) == 2
    card = (long / "README.md").read_text()
    spent = model_card.cost(rows)
    assert spent["wall_seconds"] < spent["device_seconds"] < 2 * spent["wall_seconds"]
    for line in (
        "# vae " + "b" * 12,
        "| steps | 60 |",
        "| samples per step | 6 |",
        "| seed | 11 |",
        f"| hardware | 2 × {rows[0]['device']}, then 1 × {rows[1]['device']} |",
        f"| wall time | {spent['wall_seconds']:.0f} s in steps |",
        f"| device-hours | {spent['device_seconds'] / 3600:.4f} |",
        f"| data | shard {data.fingerprint}, 24 samples, digest {data.digest[:12]} |",
        '"schedule": "constant"',
    ):
        assert line in card


def _workers_started() -> int:
    actors = ray._private.state.actors().values()
    return sum(actor["ActorClassName"] == "RayTrainWorker" for actor in actors)


def test_a_training_that_diverges_is_not_tried_again_and_names_step_and_sample(data, tmp_path):
    before = _workers_started()
    config = tiny(max_steps=400, num_workers=2, on_spike="fail", spike_factor=1.0001)
    with pytest.raises(
        FloatingPointError,
        match=r"^the loss is .* at step \d+: the largest loss is [\d.]+, of sample \d{9}; lower the learning rate",
    ):
        run("vae", config, {"data": data}, Workspace(str(tmp_path / "vae"), "f" * 12))
    assert _workers_started() - before == 2


def test_a_training_worker_that_is_killed_is_replaced_and_resumes_at_its_checkpoint(data, tmp_path):
    folder = tmp_path / "vae"
    config = tiny(max_steps=400, checkpoint_every=20, validate_every=200)
    killer = threading.Thread(target=_kill_worker_at_first_checkpoint, args=(folder,))
    killer.start()
    snapshot = STAGES["vae"].run(config, {"data": data}, Workspace(str(folder), "f" * 12))
    killer.join()
    assert (tmp_path / "killed").exists() and snapshot.facts["max_steps"] == 400
    curve = pq.read_table(folder / "curve.parquet").to_pylist()
    assert [row["step"] for row in curve if row["validation_loss"] is not None] == [200, 400]
    assert {"config.json", "curve.parquet", "diffusion_pytorch_model.safetensors"} == {
        f.path for f in snapshot.files
    }
    started = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert "RayTrainWorker" in started
    assert not started & {"DatasetManager", "PlacementGroupCleaner"}, (
        "each imports for seconds and does nothing"
    )


def _kill_worker_at_first_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in Path("/proc").iterdir():
        if (
            process.name.isdigit()
            and b"RayTrainWorker" in _title(process)
            and _is_descendant(int(process.name), os.getpid())
        ):
            os.kill(int(process.name), signal.SIGKILL)
            (folder.parent / "killed").touch()


def _title(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def _is_descendant(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False
