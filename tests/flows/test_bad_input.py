"""Bad input gets one clear sentence on stderr and exit code 2, a bad sample a counted row; nothing is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flows import cli

CHECKOUT = Path(__file__).parents[2]
SHARD = ("run", "demo", "--until=shard", "--json")
Complaint = Callable[..., str]


@pytest.fixture
def complaint(capsys, tmp_path) -> Complaint:
    """(*arguments, root=…) -> the one sentence that the command ends with, its exit code 2 having been checked."""

    def complain(*arguments: str, root: object = tmp_path / "root") -> str:
        assert cli.main([*arguments, f"--root={root}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("darkroom: ") and said.count("\n") == 1
        return said

    return complain


def image(path: Path, seed: int = 0, side: int = 48) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def huge_png(path: Path) -> None:
    """400 megapixels by its header, a few bytes on disk."""

    def chunk(kind: bytes, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))


@pytest.mark.parametrize("command", [["run", "demo", "--data"], ["prepare"], ["plan", "demo", "--data"]])
def test_a_source_that_is_not_there_or_holds_nothing(command, complaint, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "does not exist: give an existing folder" in complaint(*command, str(tmp_path / "nowhere"))
    assert "has no rows: give a folder with images" in complaint(*command, str(tmp_path / "empty"))
    assert not (tmp_path / "root").exists(), "nothing was started"


def test_a_file_that_is_no_table(complaint, tmp_path):
    for name, content in (
        ("notes.md", "# notes"),
        ("table.parquet", "no parquet"),
        ("rows.jsonl", "not json\n"),
    ):
        (tmp_path / name).write_text(content)
    assert "is of no known format: give a folder or a table" in complaint(
        "prepare", str(tmp_path / "notes.md")
    )
    assert "cannot be read as Parquet" in complaint("prepare", str(tmp_path / "table.parquet"))
    assert "not one row of" in complaint("prepare", str(tmp_path / "rows.jsonl"))


def test_a_table_without_the_columns_names_those_it_has(complaint, tmp_path):
    (tmp_path / "rows.csv").write_text("picture,words\na.png,a\n")
    said = complaint("prepare", str(tmp_path / "rows.csv"))
    assert "it has picture, words" in said and "source.image_column" in said


def test_no_source_at_all(complaint):
    assert "no source was given: name a folder or a table with --data" in complaint("plan", "unclip")
    assert "the source is empty" in complaint("run", "demo", "--data=")


def test_unknown_names_say_the_nearest(complaint):
    assert "no recipe 'dmo'; did you mean demo?" in complaint("run", "dmo")
    assert "did you mean denoiser.max_steps" in complaint("run", "demo", "--set=denoiser.max_step=5")
    assert "less than or equal to 1" in complaint("run", "demo", "--set=denoiser.learning_rate=7")
    assert "the plan has no such stage; it has shard, clip" in complaint("run", "demo", "--until=sharding")
    assert "exclude each other" in complaint("run", "demo", "--until=shard", "--only=shard")
    assert "it needs embed, encode, shard, not made yet" in complaint("run", "demo", "--only=denoiser")


def test_a_training_that_no_cluster_can_run_is_refused_by_the_plan(complaint, tmp_path):
    assert (
        "vae.batch_size=16 is not a multiple of vae.num_workers=3: change either, for example vae.num_workers=2"
        in complaint("plan", "demo", "--set=vae.num_workers=3")
    )
    assert "prior.fsdp shards weights over workers and needs prior.num_workers of 2 or more" in complaint(
        "run", "demo", "--set=prior.fsdp=true", "--set=prior.num_workers=1"
    )
    assert "CLIP's loss needs the whole batch at once; use more workers" in complaint(
        "plan", "demo", "--set=clip.accumulate=2"
    )
    assert "vae.accumulate=7 does not divide a worker's 16 samples of vae.batch_size=16" in complaint(
        "plan", "demo", "--set=vae.accumulate=7"
    )
    assert "wandb, mlflow, or both" in complaint("plan", "demo", "--set=clip.log_to=tensorflow")
    if importlib.util.find_spec("wandb") is None:
        said = complaint("run", "demo", "--set=vae.log_to=wandb")
        assert "vae.log_to=wandb, but the Python library wandb is not installed: `pip install wandb`" in said
    assert not (tmp_path / "root").exists(), "nothing was started"


def test_data_that_fills_no_batch_is_refused_before_the_first_stage(complaint, tmp_path):
    given = ("clip.batch_size=37", "prior.batch_size=8", "denoiser.batch_size=8", "vae.batch_size=8")
    few = ("--set=source.count=40", "--set=clip.validate_every=4", *(f"--set={each}" for each in given))
    assert "clip.batch_size=37, but there are only 36 samples to train on: use at most 36" in complaint(
        "run", "demo", *few
    )
    assert not list((tmp_path / "root").glob("store/*")), "nothing was made"


@pytest.mark.slow
def test_more_devices_than_there_are_is_refused_before_the_first_stage(complaint, prefect_api, tmp_path):
    many = ("--set=denoiser.num_workers=512", "--set=denoiser.batch_size=512")
    assert "denoiser.num_workers=512, but the cluster has 0 GPUs and" in complaint("run", "demo", *many)
    if not torch.cuda.is_available():
        line = ("run", "demo", "--set=fanout.num_gpus=1")
        code, _, err = end(start(*line, root=tmp_path / "root", PREFECT_API_URL=prefect_api))
        assert code == 2
        assert "fanout.num_gpus=1, but the cluster has 0 GPUs" in err.splitlines()[-1]
    assert not list((tmp_path / "root").glob("store/*")), "nothing was made"


def test_a_root_that_cannot_be_one(complaint, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file: give a folder" in complaint("plan", "demo", root=file)
    assert f"lies under {file}, which is a file" in complaint("run", "demo", root=file / "below" / "it")
    assert "cannot be made" in complaint("run", "demo", root="/proc/1/darkroom")
    assert "is empty: give a folder" in complaint("plan", "demo", root="")
    assert "Protocol not known: nowhere" in complaint("plan", "demo", root="nowhere://bucket/x")
    assert "own memory, which no worker sees" in complaint("run", "demo", root="memory://runs")


def test_a_root_that_is_read_only(complaint, disk):
    assert "cannot be written: give a folder that you may write to" in complaint(
        "run", "demo", root=disk("ro")
    )


def test_a_disk_without_room_for_a_first_run_is_exit_code_1_at_once(disk, capsys):
    started = time.monotonic()
    assert cli.main(["run", "demo", f"--root={disk('size=1m')}"]) == 1
    assert "no space left on device; mend that and run the same command again" in capsys.readouterr().err
    assert time.monotonic() - started < 20


def test_a_run_that_is_not_there_names_those_that_are(complaint, tmp_path):
    root = tmp_path / "root"
    assert "it holds no finished run: `darkroom run demo` makes one" in complaint("report", "latest")
    (root / "demo-1").mkdir(parents=True)
    (root / "demo-1" / "run.json").write_text(
        json.dumps({"run": "demo-1", "report": None, "folders": {}, "external": {}})
    )
    assert "there are demo-1" in complaint("report", "demo-2")
    assert "there is no run '../x'" in complaint("report", "../x")
    assert "ended before its report" in complaint("report", "demo-1")
    assert "has no prior" in complaint("generate", "demo-1", "a star")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", "3", '{"run": 3}', '{"run": "demo-1", "stages": [{}]}', '{"run": "demo-1", "folders": {"vae": 1}}'],
)  # fmt: skip
@pytest.mark.parametrize("command", ["report", "promote", "export", "lineage"])
def test_a_damaged_record_of_a_run_is_exit_code_1(tmp_path, command, text, capsys):
    (tmp_path / "demo-1").mkdir()
    (tmp_path / "demo-1" / "run.json").write_text(text)
    line = [
        command,
        "demo-1",
        *([str(tmp_path / "out")] if command == "export" else []),
        f"--root={tmp_path}",
    ]
    assert cli.main(line) == 1
    said = capsys.readouterr().err
    assert "is no record of a run" in said and said.count("\n") == 1


def test_sampling_out_of_range_names_the_option(complaint, tmp_path):
    run = tmp_path / "root" / "demo-1"
    for part in ("prior", "denoiser"):
        (run / part / "_meta").mkdir(parents=True)
    folders = {part: str(run / part) for part in ("clip", "vae", "prior", "denoiser")}
    evaluate = cli_recipe()["evaluate"]
    record = {"run": "demo-1", "folders": folders, "external": {}, "recipe": {"evaluate": evaluate}}
    (run / "run.json").write_text(json.dumps(record))
    assert "--steps 5000: input should be less than" in complaint(
        "generate", "demo-1", "a star", "--steps=5000"
    )
    assert "--guidance-scale -1.0: input should be" in complaint(
        "generate", "demo-1", "a star", "--guidance-scale=-1"
    )


def cli_recipe() -> dict:
    from flows.recipes import demo

    return demo().model_dump(mode="json")


def test_verify_of_what_darkroom_did_not_make(capsys, tmp_path):
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "holds nothing that Darkroom made" in capsys.readouterr().err
    for place, problem in {
        str(tmp_path / "nowhere"): "does not exist",
        "foo://x": "cannot be looked at",
        "a" * 300: "cannot be looked at",
        "": "does not exist",
    }.items():
        assert cli.main(["verify", place]) == 2
        assert problem in capsys.readouterr().err


def test_places_that_lead_nowhere_are_one_sentence(capsys, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments in (["--data", str(loop)], ["--data", "~nobody-of-that-name/x"], ["--root", str(loop)]):
        assert cli.main(["plan", "demo", *arguments]) == 2
        assert "leads nowhere" in capsys.readouterr().err


# --- real runs ------------------------------------------------------------------------------------------------------


def start(*arguments: str, root: Path, **environment: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "flows.cli", *arguments, f"--root={root}"]
    return subprocess.Popen(
        line,
        cwd=CHECKOUT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a process that hangs is killed."""
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    assert "Traceback" not in err, err
    return process.returncode, out, err


def unfinished(root: Path) -> list[Path]:
    return list(root.glob("store/**/.tmp-*"))


def servers(root: Path) -> list[Path]:
    return list(root.glob(".prefect/servers/*"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Eight sound pairs and one of each kind of bad row."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        image(folder / f"good{i}.png", i)
    for name in ("latin.png", "blank.png"):
        image(folder / name)
    (folder / "cut.png").write_bytes((folder / "good0.png").read_bytes()[:3000])
    huge_png(folder / "huge.png")
    (folder / "page.jpg").write_bytes(b"<!doctype html><p>404")
    pairs = [(f"good{i}.png", f"picture {i}") for i in range(8)]
    pairs += [("cut.png", "cut"), ("huge.png", "huge"), ("page.jpg", "page"), ("absent.png", "absent")]
    pairs += [("blank.png", "  "), ("good0.png", "again")]
    lines = [json.dumps({"file_name": name, "text": text}).encode() for name, text in pairs]
    lines += [b'{"file_name": "latin.png", "text": "caf\xe9"}', b"no json"]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


BAD = {
    "truncated": 1,
    "too_many_pixels": 1,
    "html": 1,
    "missing_image": 1,
    "empty_caption": 1,
    "duplicate_key": 1,
    "invalid_utf8": 1,
    "malformed_row": 1,
}


@pytest.mark.slow
def test_too_many_bad_samples_fail_the_stage_and_say_which(pictures, prefect_api, tmp_path):
    root = tmp_path / "root"
    code, out, err = end(start(*SHARD, f"--data={pictures}", root=root, PREFECT_API_URL=prefect_api))
    sentence = err.splitlines()[-1]
    assert code == 1 and out == ""
    assert "8 of 16 rows failed (1 duplicate_key, 1 empty_caption, 1 html" in sentence
    assert "row cut.png: " in sentence and "row huge.png: the header announces 20000x20000" in sentence
    assert (
        "more than shard.max_failed_fraction=0.05" in sentence
        and "--set shard.max_failed_fraction" in sentence
    )
    assert not list(root.glob("store/shard/*/_meta/snapshots/*"))


@pytest.mark.slow
def test_two_runs_at_once_on_one_root_make_one_result_with_every_bad_row_counted(pictures, tmp_path):
    root = tmp_path / "root"
    line = [
        *SHARD,
        f"--data={pictures}",
        "--set=shard.max_failed_fraction=1",
        "--set=shard.samples_per_shard=4",
    ]
    both = [start(*line, root=root), start(*line, root=root)]
    ended = [end(process) for process in both]
    assert [code for code, _, _ in ended] == [0, 0], ended
    printed = [json.loads(out) for _, out, _ in ended]
    assert printed[0]["stages"][0]["uri"] == printed[1]["stages"][0]["uri"]
    assert len(list(root.glob("store/shard/*"))) == 1 and unfinished(root) == [] and servers(root) == []
    rows = [
        row
        for i in range(4)
        for row in pq.read_table(Path(printed[0]["stages"][0]["uri"], f"{i:05d}.parquet")).to_pylist()
    ]
    assert len(rows) == 16 and sum(row["status"] == "success" for row in rows) == 8
    bad = [row["error_class"] for row in rows if row["status"] != "success"]
    assert {reason: bad.count(reason) for reason in bad} == BAD


@pytest.mark.slow
def test_a_disk_that_fills_loses_nothing_and_with_room_the_same_command_finishes(disk, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i in range(60):
        image(pairs / f"{i:02d}.png", i, side=256)
        (pairs / f"{i:02d}.txt").write_text(f"noise {i}")
    root = disk("size=11m")  # of some 12 MB; Prefect's journal takes up to 5
    line = [*SHARD, f"--data={pairs}", "--set=shard.image_size=256", "--set=shard.samples_per_shard=4"]
    code, out, err = end(start(*line, root=root))
    assert code == 1 and out == ""
    assert "no space left on device; mend that and run the same command again" in err.splitlines()[-1]
    assert unfinished(root) == [] and not list(root.glob("store/shard/*/_meta/snapshots/*"))
    kept = {tar: tar.stat().st_mtime_ns for tar in root.glob("store/shard/*/*.tar")}
    receipts = {path.stem for path in root.glob("store/shard/*/_meta/receipts/*.json")}
    assert 0 < len(receipts) < 15
    disk("size=60m")
    code, out, err = end(start(*line, root=root))
    assert code == 0, err
    assert len(list(root.glob("store/shard/*/*.tar"))) == 15
    assert all(tar.stat().st_mtime_ns == made for tar, made in kept.items() if tar.stem in receipts), (
        "nothing twice"
    )


@pytest.mark.slow
def test_ctrl_c_ends_a_run_within_seconds_and_leaves_no_process(tmp_path):
    root = tmp_path / "root"
    process = start(*SHARD, "--set=source.count=20000", root=root)
    deadline = time.monotonic() + 120
    while not list(root.glob("store/shard/*/_meta/lease.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the run, its Prefect server and Ray
    pressed = time.monotonic()
    code, out, err = end(process)
    assert (code, out) == (130, "") and err.splitlines()[-1] == "darkroom: stopped; the same command resumes"
    assert time.monotonic() - pressed < 45
    assert servers(root) == [] and not list(root.glob("store/shard/*/_meta/lease.json"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_hub_weights_without_a_network_are_one_sentence_before_anything_starts(tmp_path):
    (tmp_path / "pairs").mkdir()
    image(tmp_path / "pairs" / "a.png")
    (tmp_path / "pairs" / "a.txt").write_text("a")
    unreachable = {
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HOME": str(tmp_path / "hub"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    line = ["run", "unclip", "--json", f"--data={tmp_path / 'pairs'}"]
    code, out, err = end(start(*line, root=tmp_path / "root", **unreachable))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    for part in (
        "ViT-L-14/openai",
        "open_clip_config.json",
        "stabilityai/sd-vae-ft-mse",
        "diffusion_pytorch_model.safetensors",
    ):
        assert part in err
    assert "copy it here and give its path" in err
    assert not (tmp_path / "root" / "store").exists() and not (tmp_path / "root" / ".prefect").exists()
