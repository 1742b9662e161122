"""What Darkroom writes, read by the real others: the same keys, captions, pictures and vectors come out of each."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.indexes import write_index
from tests.readers.conftest import PER_SHARD, ROWS, DataSet, Reading, members, pixels

pytestmark = [pytest.mark.slow, pytest.mark.peers]

Environment = Callable[..., str]

WEBDATASET = """
import webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
result([[s["__key__"], s["txt"].decode(), text(s["png"]), json.loads(s["json"])["key"]] for s in samples])
"""


@pytest.mark.parametrize("version", ["1.0.2, ours", "0.2.111"])
def test_webdataset(dataset: DataSet, reading: Reading, environment: Environment, version: str) -> None:
    python = sys.executable if "ours" in version else environment("webdataset", f"webdataset=={version}")
    samples = reading(WEBDATASET, *dataset.tars, python=python)
    assert [(key, caption) for key, caption, _, _ in samples] == list(dataset.captions.items())
    assert [base64.b64decode(image) for _, _, image, _ in samples] == list(dataset.images.values())
    assert [key for _, _, _, key in samples] == list(dataset.images)


EMBEDDING_READER = """
from embedding_reader import EmbeddingReader
folder, column, kind = sys.argv[1:]
options = {"metadata_folder": folder + "/metadata", "meta_columns": ["image_path", "caption"]} if kind != "npy" else {}
reader = EmbeddingReader(f"{folder}/{column}", file_format=kind, **options)
values, keys, captions = [], [], []
for embeddings, meta in reader(batch_size=5, show_progress=False):
    values += embeddings.tolist()
    if kind != "npy":
        keys += meta["image_path"].tolist()
        captions += meta["caption"].tolist()
result([int(reader.count), int(reader.dimension), values, keys, captions])
"""


@pytest.mark.parametrize("column", ["img_emb", "text_emb"])
@pytest.mark.parametrize("kind", ["npy", "parquet_npy"])
def test_embedding_reader_in_clip_retrievals_layout(
    dataset: DataSet, reading: Reading, environment: Environment, column: str, kind: str
) -> None:
    python = environment("embedding-reader", "embedding-reader==1.8.1")
    arguments = (str(dataset.embeddings), column, kind)
    count, dimension, values, keys, captions = reading(EMBEDDING_READER, *arguments, python=python)
    expected = getattr(dataset, column)
    assert (count, dimension) == expected.shape
    np.testing.assert_array_equal(np.array(values, np.float16), expected)
    if kind == "parquet_npy":
        assert dict(zip(keys, captions, strict=True)) == dataset.captions and keys == list(dataset.captions)


HUGGING_FACE = """
from datasets import Image, load_dataset
read = load_dataset("webdataset", data_files={"train": sys.argv[1:]}, split="train")
read = read.cast_column("png", Image(decode=False))
result([[s["__key__"], s["txt"], text(s["png"]["bytes"]), s["json"]["caption"]] for s in read])
"""


def test_hugging_face_datasets(dataset: DataSet, reading: Reading, environment: Environment) -> None:
    python = environment("datasets", "datasets==5.2.0", "pillow")
    samples = reading(HUGGING_FACE, *dataset.tars, python=python)
    assert [(key, caption) for key, caption, _, _ in samples] == list(dataset.captions.items())
    assert [base64.b64decode(image) for _, _, image, _ in samples] == list(dataset.images.values())
    assert [caption for _, _, _, caption in samples] == list(dataset.captions.values())


WIDS = """
import wids
read = wids.ShardListDataset(sys.argv[1], cache_dir=sys.argv[2], transformations=[])
order = list(reversed(range(len(read))))
result([[s["__key__"], s[".txt"].read().decode(), text(s[".png"].read())] for s in (read[n] for n in order)])
"""


def test_wids_reads_by_position_through_its_index(
    dataset: DataSet, copy_of: Path, reading: Reading, beside: Environment, tmp_path: Path
) -> None:
    index = write_index(str(copy_of), "wids")
    samples = reading(WIDS, index, str(tmp_path / "cache"), path=beside("wids", "wids==0.1.11"))
    assert [(key, caption) for key, caption, _ in reversed(samples)] == list(dataset.captions.items())
    assert [base64.b64decode(image) for _, _, image in reversed(samples)] == list(dataset.images.values())


ENERGON = """
from megatron.energon import WorkerConfig, get_loader, get_train_dataset
warnings.simplefilter("ignore")
read = get_train_dataset(
    sys.argv[1], batch_size=1, worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), repeat=False,
    shuffle_buffer_size=None, max_samples_per_sequence=None, shuffle_over_epochs_multiplier=None,
    parallel_shard_iters=1,
)
batches = [(b.__key__[0], b.caption[0], b.image[0]) for b in get_loader(read)]
result([[key, caption, (image * 255).round().byte().permute(1, 2, 0).tolist()] for key, caption, image in batches])
"""
ENERGON_NEEDS = (
    "megatron-energon==7.4.1",
    *("multi-storage-client", "rapidyaml", "deprecation", "filetype", "mfusepy"),
    *("xattr", "wcmatch", "bracex", "lark", "prettytable", "psutil", "pyroute2"),
)


def test_energon_reads_through_its_index(
    dataset: DataSet, copy_of: Path, reading: Reading, beside: Environment
) -> None:
    write_index(str(copy_of), "energon")
    samples = reading(ENERGON, str(copy_of), path=beside("energon", *ENERGON_NEEDS))
    assert {key: caption for key, caption, _ in samples} == dataset.captions and len(samples) == len(
        dataset.captions
    )
    for key, _, image in samples:
        np.testing.assert_array_equal(np.array(image, np.uint8), pixels(dataset.images[key]))


OPEN_CLIP = """
from open_clip_train.data import get_dataset_size
result(get_dataset_size(sys.argv[1]))
"""


def test_open_clip_counts_by_the_sizes_beside_the_shards(
    dataset: DataSet, copy_of: Path, reading: Reading
) -> None:
    write_index(str(copy_of), "sizes", out=str(copy_of))
    assert reading(OPEN_CLIP, f"{copy_of}/{{00000..00001}}.tar") == [len(dataset.images), 2]


@pytest.fixture
def served(dataset: DataSet) -> Iterator[str]:
    """The pictures behind a web server on loopback."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(dataset.pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()
    }


@pytest.mark.parametrize("indexes", [(), ("wids", "sizes", "energon")])
def test_img2dataset_takes_our_shards_for_done_and_adds_the_next(
    copy_of: Path, served: str, environment: Environment, tmp_path: Path, indexes: tuple[str, ...]
) -> None:
    for kind in indexes:
        write_index(str(copy_of), kind)
    before = digests(copy_of)
    python = environment("img2dataset", "img2dataset==1.47.0", "setuptools<81")
    urls = [{"url": f"{served}/{n % 13:02d}.png", "caption": f"row {n}"} for n in range(ROWS + PER_SHARD)]
    table = tmp_path / "urls.json"
    table.write_text(json.dumps(urls))
    command = [
        str(Path(python).with_name("img2dataset")),
        f"--url_list={table}",
        f"--output_folder={copy_of}",
    ]
    options = "input_format=json url_col=url caption_col=caption output_format=webdataset image_size=12"
    counts = (
        f"number_sample_per_shard={PER_SHARD} processes_count=1 thread_count=2 incremental_mode=incremental"
    )
    finished = subprocess.run(
        [*command, *(f"--{option}" for option in f"{options} {counts}".split())],
        env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    after = digests(copy_of)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"00002.tar", "00002.parquet", "00002_stats.json"}
    _, captions = members(copy_of)
    theirs = [caption for caption in captions.values() if caption.startswith("row ")]
    assert sorted(theirs) == sorted(f"row {n}" for n in range(ROWS, ROWS + PER_SHARD))
    ours, added = (pq.read_schema(copy_of / f"0000{n}.parquet").names for n in (0, 2))
    assert set(added) <= set(ours), "whoever reads their columns finds them in ours"
