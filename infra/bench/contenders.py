"""What `shard.py` times, one contender per process: each prints one line of JSON with its CPU seconds and its peak memory.

    python contenders.py NAME FOLDER COUNT

FOLDER holds the inputs that `shard.py` made. CPU time is that of the whole process with all its threads, from after the
imports and a warm-up of a few samples to the end; so neither the network nor a busy neighbour counts.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGE_SIZE, QUALITY, WARM_UP = 256, 95, 8
BATCH = 64


def files_of(folder: Path, count: int) -> list[Path]:
    """`count` pictures: those of the folder in order, over and over."""
    found = sorted(folder.glob("*.jpg"))
    return [found[i % len(found)] for i in range(count)]


def darkroom(folder: Path, count: int, scratch: Path) -> None:
    """`data.shards.write_shard` with its defaults: center_crop to 256, jpg of quality 95, sha256, EXIF, parquet, stats."""
    from data.rows import Row
    from data.shards import ShardConfig, write_shard

    config = ShardConfig(image_size=IMAGE_SIZE, encode_quality=QUALITY)
    paths, size = files_of(folder, count), config.samples_per_shard
    for index, first in enumerate(range(0, count, size)):
        rows = [
            Row(index=i, image=str(paths[i]), caption=f"picture {i}", source_id=str(i))
            for i in range(first, min(first + size, count))
        ]
        record = write_shard(rows, index, str(scratch), config)
        assert record.samples == len(rows), record.ledger


def img2dataset(folder: Path, count: int, scratch: Path) -> None:
    """img2dataset's own Downloader, Resizer and WebDatasetSampleWriter on file:// addresses, one thread, its defaults."""
    import pyarrow as pa
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    urls = [path.as_uri() for path in files_of(folder, count)]
    table = pa.table({"url": urls, "caption": [f"picture {i}" for i in range(count)]})
    listing = scratch / "shard.feather"
    with pa.OSFile(str(listing), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    resizer = Resizer(IMAGE_SIZE, "center_crop", False, encode_quality=QUALITY, encode_format="jpg")
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=1,
        save_caption=True,
        extract_exif=True,
        output_folder=str(scratch),
        column_list=["url", "caption"],
        timeout=10,
        number_sample_per_shard=10_000,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    assert downloader((0, str(listing)))[0]
    assert json.loads((scratch / "00000_stats.json").read_text())["successes"] == count


def bare(folder: Path, count: int, _: Path) -> None:
    """The same reading, decoding, cropping, resizing and encoding as `darkroom`, and nothing else."""
    from data import jpegs
    from data.resampling import resample

    for path in files_of(folder, count):
        payload = path.read_bytes()
        reduction = 4 if len(payload) > 1_500_000 else 1
        pixels = jpegs.pixels(payload, reduction)
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = resample(
            pixels[top : top + side, left : left + side], (side, side), (IMAGE_SIZE, IMAGE_SIZE)
        )
        jpegs.encode(square, QUALITY)


def prepare(folder: Path, count: int, _: Path) -> None:
    """Reading and `data.images.prepare`: what a shard does with a picture, without the shard."""
    from data.images import ImageRules, prepare

    rules = ImageRules(image_size=IMAGE_SIZE, encode_quality=QUALITY)
    for path in files_of(folder, count):
        payload = path.read_bytes()  # held to the next turn, as in `bare`: to give it back costs page faults
        assert prepare(payload, rules).reencoded


def passthrough(folder: Path, count: int, _: Path) -> None:
    """`data.images.prepare` of pictures that already are what is to be stored."""
    from data.images import ImageRules, prepare

    payloads = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    rules = ImageRules(resize="no")
    for i in range(count):
        assert not prepare(payloads[i % len(payloads)], rules).reencoded


def tar_darkroom(_: Path, count: int, scratch: Path) -> None:
    """`data.tars.TarWriter`: three members a sample, its digests included."""
    from data.tars import TarWriter

    picture, fields, caption = members()
    with (scratch / "out.tar").open("wb") as stream:
        tar = TarWriter(stream)
        for i in range(count):
            tar.add(f"{i:09d}.jpg", picture)
            tar.add(f"{i:09d}.json", fields)
            tar.add(f"{i:09d}.txt", caption)
        tar.finish()


def tar_digests(_: Path, count: int, __: Path) -> None:
    """The digests alone that `tar_darkroom` takes of its bytes, which `tar_webdataset` does without."""
    from data.checksums import Checksum

    digests, sample = Checksum(), b"".join(members())
    for _number in range(count):
        digests.update(sample)


def tar_webdataset(_: Path, count: int, scratch: Path) -> None:
    """`webdataset.TarWriter` with the same bytes."""
    import webdataset

    picture, fields, caption = members()
    with webdataset.TarWriter(str(scratch / "out.tar"), mtime=0) as tar:
        for i in range(count):
            tar.write({"__key__": f"{i:09d}", "jpg": picture, "json": fields, "txt": caption})


def members() -> tuple[bytes, bytes, bytes]:
    """A sample of about 33 kB, as photographs of 256 px give."""
    return (
        bytes(range(256)) * 128,
        b'{"key": "000000000", "status": "success"}' * 10,
        b"a picture of a thing" * 3,
    )


def column_darkroom(folder: Path, count: int, _: Path) -> None:
    """`data.columns.open_array`, then every row in batches, copied out of the memory map."""
    import numpy as np

    from data.columns import open_array

    total = 0.0
    values = open_array(str(folder), "vae_moments", 0)
    for start in range(0, count, BATCH):
        total += float(np.array(values[start : start + BATCH])[0, 0, 0, 0])
    assert np.isfinite(total)


def column_webdataset(folder: Path, count: int, _: Path) -> None:
    """`webdataset.WebDataset` reading the same rows as .npy members of a tar, decoded and batched."""
    import numpy as np
    import webdataset

    dataset = webdataset.WebDataset(str(folder / "moments.tar"), shardshuffle=False, nodesplitter=None)
    seen = 0
    for (batch,) in dataset.decode().to_tuple("npy").batched(BATCH):
        assert batch.dtype == np.float16 or batch[0].dtype == np.float16
        seen += len(batch)
    assert seen == count


def write_column(folder: Path, count: int) -> None:
    """Writes `count` rows (8, 32, 32) of latent moments, as a column and as a tar of .npy members."""
    import numpy as np

    from data.columns import write_array
    from data.tars import TarWriter

    values = np.random.default_rng(0).standard_normal((count, 8, 32, 32), np.float32).astype(np.float16)
    write_array(str(folder), "vae_moments", 0, values)
    with (folder / "moments.tar").open("wb") as stream:
        tar = TarWriter(stream)
        for i, row in enumerate(values):
            buffer = io.BytesIO()
            np.save(buffer, row, allow_pickle=False)
            tar.add(f"{i:09d}.npy", buffer.getvalue())
        tar.finish()


CONTENDERS: dict[str, Callable[[Path, int, Path], None]] = {
    "darkroom": darkroom,
    "img2dataset": img2dataset,
    "bare": bare,
    "prepare": prepare,
    "passthrough": passthrough,
    "tar_darkroom": tar_darkroom,
    "tar_digests": tar_digests,
    "tar_webdataset": tar_webdataset,
    "column_darkroom": column_darkroom,
    "column_webdataset": column_webdataset,
}


def measure(name: str, folder: Path, count: int) -> dict[str, Any]:
    """CPU and wall seconds of `count` samples, and the process's peak memory in MB."""
    run = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as warm:
        run(folder, count if name.startswith("column") else WARM_UP, Path(warm))
    with tempfile.TemporaryDirectory() as scratch:
        cpu, wall = time.process_time(), time.perf_counter()
        run(folder, count, Path(scratch))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"name": name, "count": count, "cpu_s": cpu, "wall_s": wall, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The process's own peak of resident memory; `ru_maxrss` would count what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))) + "\n")
