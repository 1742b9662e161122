"""A small data set as Darkroom writes it, and other people's readers, each in an environment of its own under `.readers/`."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import columns, manifest
from data.config import fingerprint
from data.manifest import Snapshot
from data.shards import ShardConfig, write_shard
from data.sources import Row

CACHE = Path(__file__).parents[2] / ".readers"
"""Git-ignored; remove it to install the readers anew."""
ROWS, PER_SHARD = 14, 7
CAPTIONS = [
    "plain",
    "Blüte, 花, 🙂",
    "two\nlines",
    '"quoted", and a comma',
    "tab\there",
    "ends with a dot.",
    "7",
]


@dataclass(frozen=True)
class DataSet:
    """Two shards whose last row failed, with image and text embeddings."""

    folder: Path
    embeddings: Path
    pictures: Path
    images: dict[str, bytes]
    """key -> the picture's member, read with the standard library."""
    captions: dict[str, str]
    img_emb: np.ndarray
    text_emb: np.ndarray

    @property
    def tars(self) -> list[str]:
        return [str(path) for path in sorted(self.folder.glob("*.tar"))]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Made once, and never changed by a test: see `copy_of`."""
    home = tmp_path_factory.mktemp("dataset")
    folder, embeddings, pictures = (home / name for name in ("shard", "embed", "pictures"))
    pictures.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(ROWS):
        path = pictures / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (12, 10 + number, 3), np.uint8)).save(path)
        rows.append(Row(number, str(path), CAPTIONS[number % len(CAPTIONS)], path.name))
    (pictures / f"{ROWS - 1:02d}.png").write_bytes(b"broken")
    config = ShardConfig(image_size=12, encode_format="png", samples_per_shard=PER_SHARD)
    shards = [
        write_shard(rows[at : at + PER_SHARD], n, str(folder), config) for n, at in enumerate((0, PER_SHARD))
    ]
    made = {
        "stage": "shard",
        "version": 1,
        "config": {},
        "columns": ("caption", "image"),
        "shards": tuple(shards),
    }
    name = fingerprint("shard", 1, {}, {})
    manifest.publish_snapshot(str(folder), Snapshot(fingerprint=name, **made))
    images, captions = members(folder)
    embedded = {column: _embedded(rng, len(images)) for column in ("img_emb", "text_emb")}
    starts = np.cumsum([0, *(shard.samples for shard in shards)])
    for shard, start, stop in zip(shards, starts[:-1], starts[1:], strict=True):
        for column, values in embedded.items():
            columns.write_array(str(embeddings), column, shard.index, values[start:stop])
        keys = list(images)[start:stop]
        columns.write_metadata(str(embeddings), shard.index, keys, [captions[key] for key in keys])
    return DataSet(folder, embeddings, pictures, images, captions, embedded["img_emb"], embedded["text_emb"])


def members(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """(key -> picture, key -> caption) of all tars in `folder`, in order."""
    images, captions = {}, {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                if extension in ("png", "jpg"):
                    images[key] = file.read()
                elif extension == "txt":
                    captions[key] = file.read().decode()
    return images, captions


def pixels(payload: bytes) -> np.ndarray:
    """(H, W, 3) of an encoded picture."""
    return np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))


@pytest.fixture
def copy_of(dataset: DataSet, tmp_path: Path) -> Path:
    """The shards' folder, free to be changed."""
    return Path(shutil.copytree(dataset.folder, tmp_path / "copy"))


Reading = Callable[..., Any]


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    """(script, *arguments, python=…, path=…) -> what the script stored with `result(…)`, as JSON."""

    def read(script: str, *arguments: str, python: str = sys.executable, path: str = "") -> Any:
        out = tmp_path / "result.json"
        program = tmp_path / "reading.py"
        program.write_text(_PRELUDE.format(out=str(out)) + script)
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "NO_ALBUMENTATIONS_UPDATE": "1"}
        finished = subprocess.run(
            [python, str(program), *arguments],
            env=os.environ | offline | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return json.loads(out.read_text())

    return read


@pytest.fixture(scope="session")
def environment() -> Callable[..., str]:
    """(name, *requirements) -> the interpreter of a virtual environment that has them and nothing of ours."""
    return lambda name, *requirements: str(_installed(name, requirements, _into_venv) / "bin" / "python")


@pytest.fixture(scope="session")
def beside() -> Callable[..., str]:
    """(name, *requirements) -> a folder for PYTHONPATH with just these, for a reader that shares our torch."""
    return lambda name, *requirements: str(_installed(name, requirements, _into_folder))


def _installed(name: str, requirements: tuple[str, ...], install: Callable[..., list[str]]) -> Path:
    """The environment, built once; a half-built one is built anew. Skips the test where there is no package index."""
    folder, done = CACHE / name, CACHE / name / ".installed"
    wanted = "\n".join([install.__name__, *requirements])
    if done.is_file() and done.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [*install(folder), "--quiet", "--disable-pip-version-check", "--retries=1", "--timeout=15"]
    finished = subprocess.run([*command, *requirements], capture_output=True, text=True, timeout=500)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["no reason given"]
        pytest.skip(f"{name} cannot be installed here: {lines[-1]}")
    done.write_text(wanted)
    return folder


def _into_venv(folder: Path) -> list[str]:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return [str(folder / "bin" / "python"), "-m", "pip", "install"]


def _into_folder(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "install", "--no-deps", f"--target={folder}"]


def _embedded(rng: np.random.Generator, count: int) -> np.ndarray:
    values = rng.normal(size=(count, 8))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


_PRELUDE = """
import base64, json, sys, warnings
def text(payload): return base64.b64encode(payload).decode()
def result(value):
    with open({out!r}, "w") as file:
        json.dump(value, file)
"""
