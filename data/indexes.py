"""Indexes of a sharded data set that other readers ask for, made on request and beside nothing that still grows.

    wids      _index/wids.json        random access by position: wids-shard-index-v1
    sizes     _index/sizes.json       samples of each tar: open_clip and datacomp's resharder look for it beside the tars
    energon   .nv-meta/, *.tar.idx    what `energon prepare` makes, but for its database of keys
    kept      _index/kept.txt         of embeddings: the keys of the pairs that `embed.min_clip_score` keeps, one a line

None of them lies beside the shards as a `*.json`: img2dataset takes every such file for a finished shard of its own. Each
describes the newest state of the data set; after it grew, it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from typing import Any

from data import columns, storage
from data.checksums import BLOCK
from data.errors import CorruptArtifact, UserError
from data.inventory import artifact_folders, inventory
from data.manifest import FileRecord, ShardRecord, Snapshot
from data.tars import ShardReader, members_between

FOLDER = "_index"
"""Where indexes lie in the artifact's folder, unless told otherwise."""


def write_index(uri: str, kind: str, out: str | None = None) -> str:
    """Writes the index `kind` of the data set at `uri`, or of the embeddings there, and returns where it lies.

    `uri` is the artifact's folder, or a root or store with one alone. Raises UserError when there is none or more than one,
    for a kind that is not in `KINDS`, and for an `out` that the index's readers would not find; CorruptArtifact and
    FileNotFoundError for files that are not as they were written.
    """
    if kind not in KINDS:
        raise UserError(f"there is no index of the kind {kind}; give one of {', '.join(KINDS)}")
    return KINDS[kind](dataset(uri, "kept" if kind == "kept" else "image"), out)


def dataset(uri: str, column: str = "image") -> Snapshot:
    """The newest state of the one artifact with `column` at or below `uri`. Raises UserError as `write_index` does."""
    found = [inventory(folder)[0].newest for folder in artifact_folders(uri.rstrip("/"))]
    made = [snapshot for snapshot in found if snapshot and column in snapshot.columns]
    if len(made) != 1:
        there = (
            f"there are {', '.join(s.folder for s in made)}: give one of them" if made else "there is none"
        )
        raise UserError(f"{uri} should hold one {_NAMES[column]}; {there}")
    return made[0]


_NAMES = {"image": "sharded data set", "kept": "set of embeddings made with embed.min_clip_score"}


def write_wids(data: Snapshot, out: str | None = None) -> str:
    """`wids.json`, for `wids.ShardListDataset(PATH)`: reads every tar once for its MD5. Returns its place.

    Its URLs are relative to where it lies when both it and the shards are local, else absolute.
    """
    place = out or storage.join(data.folder, FOLDER)
    shards = [
        {"url": _seen_from(place, storage.join(data.folder, tar.path)), "md5sum": _md5(data, tar)}
        | {"nsamples": shard.samples, "filesize": tar.bytes}
        for shard, tar in _tars(data)
    ]
    index = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": data.fingerprint,
        "shardlist": shards,
    }
    return _publish(place, "wids.json", index)


def write_sizes(data: Snapshot, out: str | None = None) -> str:
    """`sizes.json`: samples by name of tar. Returns its place.

    open_clip finds it only in the folder of the tars: give that as `out` once img2dataset will not extend them any more,
    or pass open_clip `--train-num-samples` with the sum.
    """
    sizes = {tar.path: shard.samples for shard, tar in _tars(data)}
    return _publish(out or storage.join(data.folder, FOLDER), "sizes.json", sizes)


def write_energon(data: Snapshot, out: str | None = None) -> str:
    """`.nv-meta/` with one split `train`, and an index of sample offsets beside each tar. Returns the data set's folder.

    That folder is what Energon's `get_train_dataset` takes. `index.sqlite`, which only Energon's joins and its random access
    by key read, is left out. Raises UserError for an `out`: Energon looks beside the tars.
    """
    if out is not None:
        raise UserError(
            f"--out {out}: Energon finds its index in the folder of the shards alone; leave --out away"
        )
    counts, kinds = {}, dict[str, None]()
    for shard, tar in _tars(data):
        url = storage.join(data.folder, tar.path)
        with ShardReader(url) as reader:
            starts = [*reader.starts, reader.end]
        storage.write_bytes(f"{url}.idx", struct.pack(f"<{len(starts)}Q", *starts))
        counts[tar.path] = shard.samples
        kinds[members_between(url, 0, 1)[0].rpartition(".")[2]] = None
    meta = storage.join(data.folder, ".nv-meta")
    sample = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
    _publish(
        meta,
        "dataset.yaml",
        {"sample_type": sample, "field_map": {"image": ",".join(kinds), "caption": "txt"}},
    )
    _publish(meta, "split.yaml", {"split_parts": {"train": list(counts)}, "exclude": []})
    _publish(meta, ".info.json", {"shard_counts": counts})
    return data.folder


def write_kept(embedded: Snapshot, out: str | None = None) -> str:
    """`kept.txt`, for readers that know nothing of the column `kept`: the keys of the pairs that are in it. Returns its place."""
    path = storage.join(out or storage.join(embedded.folder, FOLDER), "kept.txt")
    keys = (key for shard in embedded.shards for key in _kept_keys(embedded.folder, shard))
    storage.write_bytes(path, "".join(f"{key}\n" for key in keys).encode())
    return path


KINDS: dict[str, Callable[[Snapshot, str | None], str]] = {
    "wids": write_wids,
    "sizes": write_sizes,
    "energon": write_energon,
    "kept": write_kept,
}


def _tars(data: Snapshot) -> list[tuple[ShardRecord, FileRecord]]:
    """Each shard that has samples, with its tar."""
    return [(shard, shard.file(f"{shard.index:05d}.tar")) for shard in data.shards if shard.samples]


def _kept_keys(folder: str, shard: ShardRecord) -> list[str]:
    keys, kept = (
        columns.read_keys(folder, shard.index),
        columns.open_array(folder, "kept", shard.index),
    )
    if len(keys) != len(kept):
        raise CorruptArtifact(f"{folder}: shard {shard.index:05d} has {len(keys)} keys and {len(kept)} marks")
    return [key for key, is_kept in zip(keys, kept.tolist(), strict=True) if is_kept]


def _md5(data: Snapshot, tar: FileRecord) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with storage.open_read(storage.join(data.folder, tar.path)) as stream:
        while chunk := stream.read(BLOCK):
            digest.update(chunk)
    return digest.hexdigest()


def _seen_from(place: str, url: str) -> str:
    if storage.is_local(place) and storage.is_local(url):
        return os.path.relpath(storage.local_path(url), storage.local_path(place))
    return url


def _publish(folder: str, name: str, document: dict[str, Any]) -> str:
    """Writes JSON, which is YAML too."""
    path = storage.join(folder, name)
    storage.write_bytes(path, (json.dumps(document, indent=1) + "\n").encode())
    return path
