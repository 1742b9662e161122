"""`darkroom prepare`, `verify --repair` and `index` as people type them, on one prepared folder."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.images import decode
from training.encoders import ClipEncoder

sys.path.insert(0, str(Path(__file__).parent))
import networks
from command_lines import CHECKOUT, command, environment, result
from pictures import add_pictures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Finished = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures, and two CLIPs and two VAEs that differ in size."""
    home = tmp_path_factory.mktemp("home")
    add_pictures(home / "pictures", range(10), side=16)
    towers = {"image_size": 16, "vision_layers": 1, "text_layers": 1, "context_length": 12}
    networks.save_clip(home / "clip", **towers)
    networks.save_clip(home / "another clip", **towers, embed_dim=32)
    networks.save_vae(home / "vae", 8, 8)
    networks.save_vae(home / "another vae", 8, 16)
    return home


@functools.cache
def median_score(home: Path) -> float:
    """The cosine of picture and caption that half of the pairs reach."""
    encoder = ClipEncoder.load(str(home / "clip"))
    paths = sorted((home / "pictures").glob("*.png"))
    pixels = torch.stack([torch.from_numpy(decode(path.read_bytes())).permute(2, 0, 1) for path in paths])
    text, _ = encoder.text([path.with_suffix(".txt").read_text() for path in paths])
    return float((encoder.image(pixels) * text).sum(1).quantile(0.5))


def settings(home: Path, **changes: Any) -> dict[str, Any]:
    shards = {"shard.samples_per_shard": 4, "shard.image_size": 16, "shard.encode_format": "png"}
    encoders = {"clip.pretrained": home / "clip", "vae.pretrained": home / "vae"}
    return (
        {**shards, "embed.min_clip_score": median_score(home), "fanout.num_workers": 1} | encoders | changes
    )


@pytest.fixture(scope="module")
def prepare(prefect_api: str) -> Callable[..., Finished]:
    """(source, root, settings, *options) -> the finished `darkroom prepare`."""

    def run(source: Path, root: Path, settings: dict[str, Any], *options: str) -> Finished:
        line = command("prepare", str(source), *options, root=root, settings=settings)
        variables = environment() | {"PREFECT_API_URL": prefect_api}
        return subprocess.run(line, env=variables, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def prepared(home: Path, prepare: Callable[..., Finished]) -> Path:
    """The root of what is made of them: not to be changed."""
    made = prepare(home / "pictures", home / "root", settings(home), "--json")
    assert [stage["name"] for stage in result(made)["stages"]] == ["shard", "embed", "encode"]
    assert "no encoder" not in made.stderr
    return home / "root"


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A copy with the same times."""
    return Path(shutil.copytree(prepared, tmp_path / "root"))


def darkroom(*arguments: str) -> Finished:
    """A command that starts no flow."""
    line = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(line, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in (root / "store").rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def untouched(root: Path, *stages: str) -> dict[str, tuple[int, int]]:
    """path -> (inode, time) of every file of `stages`: a file that is written again gets another inode."""
    found = (path for stage in stages for path in (root / "store" / stage).rglob("*"))
    files = [path for path in found if path.is_file() and path.name != "lease.lock"]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def statuses(made: Finished) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in result(made)["stages"]}


def the(root: Path, pattern: str) -> Path:
    (path,) = root.glob(f"store/{pattern}")
    return path


def test_without_an_encoder_shards_alone_are_written_and_that_is_said(home, prepare, tmp_path):
    alone = {name: value for name, value in settings(home).items() if name.startswith(("shard", "fanout"))}
    made = prepare(home / "pictures", tmp_path, alone)
    assert made.returncode == 0, made.stderr
    assert "no encoder was given, so shards alone are written; --set clip.pretrained=… adds" in made.stderr
    assert str(tmp_path / "store" / "shard") in made.stdout and "10" in made.stdout
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["shard"]
    assert len(list(tmp_path.glob("store/shard/*/*.tar"))) == 3
    again = prepare(home / "pictures", tmp_path, alone, "--json")
    assert statuses(again) == {"shard": "cached"} and "shards alone" in again.stderr


@pytest.mark.parametrize(("encoder", "stage"), [("clip", "embed"), ("vae", "encode")])
def test_another_encoder_makes_its_own_columns_alone(home, prepare, root, encoder, stage):
    before = untouched(root, "shard", "embed", "encode")
    changed = settings(home, **{f"{encoder}.pretrained": home / f"another {encoder}"})
    made = prepare(home / "pictures", root, changed, "--json")
    expected = {"shard": "cached", "embed": "cached", "encode": "cached"} | {stage: "ran"}
    assert statuses(made) == expected
    after = untouched(root, "shard", "embed", "encode")
    assert {path: after.get(path) for path in before} == before, "the old columns are there, untouched"
    assert {Path(path).relative_to(root).parts[1] for path in after.keys() - before.keys()} == {stage}
    assert len(list((root / "store" / stage).iterdir())) == 2


def test_new_rows_make_their_own_shards_and_columns_alone(home, prepare, root, tmp_path):
    before = untouched(root, "shard", "embed", "encode")
    source = Path(shutil.copytree(home / "pictures", tmp_path / "pictures"))
    add_pictures(source, range(10, 15), side=16)
    made = prepare(source, root, settings(home), "--json")
    assert set(statuses(made).values()) == {"ran"}
    after = untouched(root, "shard", "embed", "encode")
    assert {path: after.get(path) for path in before} == before
    added = {Path(path).name for path in after.keys() - before.keys() if "_meta" not in path}
    numbered = {f"{n:05d}" for n in (3, 4)}
    assert added == {
        *(f"{n}{end}" for n in numbered for end in (".tar", ".parquet", "_stats.json")),
        *(f"{name}_{n}.npy" for n in numbered for name in ("img_emb", "text_emb", "text_hidden", "kept")),
        *(f"{name}_{n}.npy" for n in numbered for name in ("text_hidden_offsets", "vae_moments")),
        *(f"metadata_{n}.parquet" for n in numbered),
    }
    receipts = [path for path in after.keys() - before.keys() if "receipts" in path]
    assert len(receipts) == 3 * len(numbered)
    assert darkroom("verify", str(root)).returncode == 0


def test_verify_says_what_it_checked_of_every_stage(prepared):
    told = darkroom("verify", str(prepared))
    assert told.returncode == 0, told.stdout
    lines = told.stdout.splitlines()
    assert lines[-1] == "sound: 10 rows attempted = 10 written + 0 filtered + 0 failed"
    by_stage = dict(line.split(": ", 1) for line in lines[:-1])
    assert set(by_stage) == {"shard", "embed", "encode"}
    kept = np.concatenate([np.load(path) for path in sorted(prepared.glob("store/embed/*/kept/*.npy"))])
    assert 0 < kept.sum() < len(kept) == 10
    assert by_stage["embed"].endswith(f"3 shards of 10 samples, {10 - kept.sum()} of them marked as left out")
    assert by_stage["encode"].startswith("1 artifact, 3 files, ")
    verdict = result(darkroom("verify", str(prepared), "--json"))
    assert set(verdict) == {"ok", "attempted", "written", "filtered", "failed", "problems"}


def test_verify_names_the_bytes_and_repair_brings_every_one_of_them_back(root):
    before = contents(root)
    tar, lost = the(root, "shard/*/00001.tar"), the(root, "embed/*/text_emb/text_emb_00000.npy")
    payload = bytearray(tar.read_bytes())
    payload[700:900] = bytes(200)
    tar.write_bytes(payload)
    cut = the(root, "embed/*/img_emb/img_emb_00002.npy")
    cut.write_bytes(cut.read_bytes()[:-10])
    lost.unlink()
    flipped = the(root, "encode/*/vae_moments/vae_moments_00001.npy")
    payload = bytearray(flipped.read_bytes())
    payload[300] ^= 4
    flipped.write_bytes(payload)

    told = darkroom("verify", str(root))
    assert told.returncode == 1
    assert f"{tar} " in told.stdout and f"{cut} " in told.stdout and f"{lost} is missing" in told.stdout
    (line,) = [line for line in told.stdout.splitlines() if line.startswith(f"{flipped} ")]
    assert "byte 300" in line
    assert told.stdout.splitlines()[-1].startswith("4 problems: 10 rows attempted")

    mended = darkroom("verify", str(root), "--repair")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    for path in (tar, cut, lost, flipped):
        assert any(line.startswith(f"{path} ") for line in mended.stdout.splitlines()), path
    assert mended.stdout.splitlines()[-1].startswith("sound: ")
    assert contents(root) == before


def test_repair_says_what_it_cannot_bring_back(root, home, tmp_path):
    gone = the(root, "shard/*/00000.tar")
    gone.unlink()
    aside = shutil.move(home / "pictures", tmp_path / "aside")
    try:
        told = darkroom("verify", str(root), "--repair", "--json")
    finally:
        shutil.move(aside, home / "pictures")
    assert told.returncode == 1 and "Traceback" not in told.stderr
    verdict = json.loads(told.stdout)
    assert not verdict["ok"] and verdict["mended"] == []
    (problem,) = verdict["problems"]
    assert problem["uri"] == str(gone) and str(home / "pictures") in problem["problem"]


def test_every_index_is_written_where_its_reader_looks_and_the_store_stays_sound(root):
    data, embedded = the(root, "shard/*"), the(root, "embed/*")
    places = {
        "wids": data / "_index" / "wids.json",
        "sizes": data / "_index" / "sizes.json",
        "energon": data,
        "kept": embedded / "_index" / "kept.txt",
    }
    for kind, place in places.items():
        told = darkroom("index", str(root), f"--kind={kind}")
        assert (told.returncode, told.stdout) == (0, f"{place}\n"), told.stderr
    assert json.loads(places["sizes"].read_bytes()) == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 2}
    assert [entry["nsamples"] for entry in json.loads(places["wids"].read_bytes())["shardlist"]] == [4, 4, 2]
    assert (data / ".nv-meta" / ".info.json").is_file() and (data / "00002.tar.idx").stat().st_size == 8 * 3
    kept = [np.load(path) for path in sorted(embedded.glob("kept/*.npy"))]
    keys = []
    for path, marks in zip(sorted(data.glob("*.tar")), kept, strict=True):
        with tarfile.open(path) as tar:
            names = [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
        keys += [name for name, is_kept in zip(names, marks, strict=True) if is_kept]
    assert places["kept"].read_text().split() == keys
    assert darkroom("verify", str(root)).returncode == 0


def test_an_index_of_what_is_damaged_says_how_to_mend_it(root):
    the(root, "shard/*/00001.tar").unlink()
    told = darkroom("index", str(root), "--kind=wids")
    assert told.returncode == 1 and told.stdout == ""
    assert "00001.tar is missing: run `darkroom verify --repair" in told.stderr
    assert "Traceback" not in told.stderr
