"""Row-aligned columns of a dataset as training batches: a map from (seed, epoch, position) to a sample.

Legend: B batch of this rank, H W pixels, D embedding width, T longest caption of the dataset, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from data import storage
from data.columns import Ragged, open_array, open_ragged, verify_join
from data.errors import ShardMismatch, UserError
from data.images import decode
from data.manifest import Snapshot
from data.order import held_out
from data.schema import COLUMNS
from data.tars import ShardReader

IMAGE_CACHE_BYTES = 512 << 20
"""Decoded images up to this size altogether are kept in memory; decoding a small one again costs more than its bytes."""


class ColumnSet:
    """Random access to the columns of one dataset, over all its shards in order; rows that `kept` leaves out do not count.

    Opening verifies that every two columns agree shard by shard on count and ordered keys; ShardMismatch names the files
    that do not. Raises UserError when a column is missing or there is no sample at all.
    """

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._owner = {column: snapshot for snapshot in snapshots for column in snapshot.columns}
        counted = [snapshot for snapshot in snapshots if snapshot.shards]
        if not any(snapshot.samples for snapshot in counted):
            raise UserError(
                f"no input holds a sample ({', '.join(s.folder for s in snapshots) or 'none was given'}): "
                "check the source and the filters of `shard`"
            )
        self.shards = [shard.index for shard in counted[0].shards if shard.samples]
        _verify(counted)
        counts = [shard.samples for shard in counted[0].shards if shard.samples]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._opened: dict[tuple[str, int], Any] = {}
        self._kept = self._kept_rows() if "kept" in self._owner else None
        if self._kept is not None and not len(self._kept):
            raise UserError("embed.min_clip_score leaves no sample: lower it")
        self._held = np.zeros(0, np.int64)
        self._is_validation = False

    def __len__(self) -> int:
        return len(self._held) if self._is_validation else self._total - len(self._held)

    def split(self, validation: int) -> tuple[ColumnSet, ColumnSet]:
        """(training, validation): views of this dataset that share what is open, the second with `validation` samples.

        Which ones is a function of the numbers of samples alone, spread evenly over the dataset: every seed, trainable and
        worker keeps the same ones out. With 0 the first view is all and the second has no sample. Memory is that of
        `validation` numbers. Raises UserError when nothing would be left to train on.
        """
        assert not len(self._held), "a view is not split again"
        if not 0 <= validation < len(self):
            raise UserError(
                f"{validation} of {len(self)} samples for validation: give 0 to {len(self) - 1}, or more samples"
            )
        training, held = copy.copy(self), copy.copy(self)
        training._held = held._held = held_out(len(self), validation)
        held._is_validation = True
        return training, held

    def shape(self, column: str) -> tuple[int, ...]:
        """Per-sample shape as batches hold it: (D,), (T, D) padded, (2C, h, w), (H, W, 3)."""
        if column == "text_hidden":
            return (self._longest, self.empty(column).shape[-1])
        return tuple(self._row(column, 0).shape)

    def rows(self, column: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Stacked rows: float32, or uint8 (n, H, W, 3) for images; text_hidden (n, T, D) zero-padded to the longest."""
        if column == "image":
            return self._images(indices)
        if column == "text_hidden":
            return pad([self._row(column, i) for i in indices], self._longest)[0]
        return np.stack([self._row(column, i) for i in indices]).astype(np.float32)

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The samples' captions."""
        return [self._shard("caption", i).caption(self._locate(i)[1]) for i in indices]

    def keys(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The samples' `__key__`s."""
        return [self._shard("image", i).keys[self._locate(i)[1]] for i in indices]

    def empty(self, column: str) -> np.ndarray:
        """What the empty caption has in `text_emb` (D,) or `text_hidden` (T0, D), float32."""
        path = storage.join(self._folder(column), "empty", f"{column}.npy")
        with storage.open_read(path) as stream:
            return np.load(stream, allow_pickle=False).astype(np.float32)

    def facts(self, column: str) -> Mapping[str, Any]:
        """Facts of the artifact that wrote the column."""
        return self._snapshot(column).facts

    def batch(self, names: Sequence[str], indices: np.ndarray) -> dict[str, Any]:
        """The named columns of the given samples as tensors on the CPU (captions as a list)."""
        fields: dict[str, Any] = {}
        for name in names:
            if name == "caption":
                fields[name] = self.captions(indices)
            elif name == "text_hidden":
                values, lengths = pad([self._row(name, i) for i in indices], self._longest)
                fields[name], fields["text_length"] = torch.from_numpy(values), torch.from_numpy(lengths)
            elif name == "image":
                fields[name] = torch.from_numpy(self._images(indices)).permute(0, 3, 1, 2)
            else:
                fields[name] = torch.from_numpy(self.rows(name, indices))
        return fields

    @cached_property
    def _longest(self) -> int:
        lengths = [int(np.diff(self._open("text_hidden", shard).offsets).max()) for shard in self.shards]
        return max([*lengths, len(self.empty("text_hidden"))])

    @cached_property
    def _decoded(self) -> tuple[np.ndarray, np.ndarray] | None:
        shape = self._row("image", 0).shape
        if self._total * int(np.prod(shape)) > IMAGE_CACHE_BYTES:
            return None
        return np.empty((self._total, *shape), np.uint8), np.zeros(self._total, bool)

    def _images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        if self._decoded is None:
            return _stack([self._row("image", i) for i in indices])
        pixels, known = self._decoded
        places = [self._place(i) for i in indices]
        for i, place in zip(indices, places, strict=True):
            if not known[place]:
                pixels[place] = _stack([self._row("image", i), pixels[place]])[0]
                known[place] = True
        return pixels[places]

    def _row(self, column: str, index: int) -> np.ndarray:
        shard, row = self._locate(index)
        opened = self._open(column, shard)
        return decode(opened.image(row)) if column == "image" else opened[row]

    def _shard(self, column: str, index: int) -> ShardReader:
        return self._open(column, self._locate(index)[0])

    def _kept_rows(self) -> np.ndarray:
        """Positions (int64) among all rows of those that count."""
        return np.flatnonzero(np.concatenate([self._open("kept", shard) for shard in self.shards]))

    @property
    def _total(self) -> int:
        """Samples of both views."""
        return int(self._starts[-1]) if self._kept is None else len(self._kept)

    def _place(self, index: int) -> int:
        """Where sample `index` of this view is among those of both."""
        if self._is_validation:
            return int(self._held[index])
        return int(index + np.searchsorted(self._held - np.arange(len(self._held)), index, side="right"))

    def _locate(self, index: int) -> tuple[int, int]:
        index = self._place(index)
        index = index if self._kept is None else self._kept[index]
        at = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[at], int(index - self._starts[at])

    def _open(self, column: str, shard: int) -> Any:
        kind = COLUMNS[column].kind
        name = "image" if kind == "tar" else column
        if (name, shard) not in self._opened:
            self._opened[name, shard] = _open_column(kind, self._folder(column), column, shard)
        return self._opened[name, shard]

    def _folder(self, column: str) -> str:
        return self._snapshot(column).folder

    def _snapshot(self, column: str) -> Snapshot:
        if column not in self._owner:
            raise UserError(f"no input has the column {column!r}; there are {', '.join(sorted(self._owner))}")
        return self._owner[column]


def stream_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of `count` samples (int64), a function of (seed, epoch): the order in which that epoch visits them."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def batches(
    columns: ColumnSet,
    names: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Endless batches of this rank from global step `first_step` on; resuming costs nothing, whatever the step.

    The global batch of step k is the stream positions [k*B, (k+1)*B); every sample comes once per epoch.
    Raises UserError when `world_size` does not divide `batch_size`.
    """
    if batch_size % world_size:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of {world_size} workers: change either one"
        )
    per_rank, count = batch_size // world_size, len(columns)
    orders: dict[int, np.ndarray] = {}
    step = first_step
    while True:
        positions = step * batch_size + rank * per_rank + np.arange(per_rank)
        epochs = positions // count
        orders = {
            e: orders[e] if e in orders else stream_order(seed, e, count) for e in np.unique(epochs).tolist()
        }
        indices = np.array([orders[int(e)][p % count] for e, p in zip(epochs, positions, strict=True)])
        batch = columns.batch(names, indices)
        batch["position"] = torch.from_numpy(positions.astype(np.int64))
        yield {
            k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
        }
        step += 1


def key_at(columns: ColumnSet, seed: int, position: int) -> str:
    """The `__key__` of the sample at `position` of the training stream that `batches` follows."""
    epoch, place = divmod(position, len(columns))
    return columns.keys([int(stream_order(seed, epoch, len(columns))[place])])[0]


def held_out_batches(
    columns: ColumnSet,
    names: Sequence[str],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """This rank's share of every sample once, in order, in global batches of `batch_size`; `position` numbers them.

    Every rank has as many: samples that `world_size` does not divide are left out at the end.
    """
    mine = np.arange(rank, len(columns) // world_size * world_size, world_size)
    per_rank = max(1, batch_size // world_size)
    for start in range(0, len(mine), per_rank):
        indices = mine[start : start + per_rank]
        batch = columns.batch(names, indices) | {"position": torch.from_numpy(indices)}
        yield {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def prefetch(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a background thread up to `depth` ahead; its exceptions are raised here."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if not _offer(ready, (item, None), stopped):
                    return
            _offer(ready, (None, StopIteration()), stopped)
        except BaseException as error:
            _offer(ready, (None, error), stopped)

    threading.Thread(target=fill, daemon=True, name="darkroom-prefetch").start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()


def pad(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (T_i, D) as one zero-padded (n, length, D) float32 array, and their lengths (n,) int64."""
    values = np.zeros((len(rows), length, rows[0].shape[-1]), np.float32)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
    return values, np.array([len(row) for row in rows], np.int64)


def _offer(ready: queue.Queue, entry: tuple, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            ready.put(entry, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def _open_column(kind: str, folder: str, column: str, shard: int) -> ShardReader | np.ndarray | Ragged:
    if kind == "tar":
        return ShardReader(storage.join(folder, f"{shard:05d}.tar"))
    return open_ragged(folder, column, shard) if kind == "ragged" else open_array(folder, column, shard)


def _verify(snapshots: Sequence[Snapshot]) -> None:
    by_index = [{shard.index: shard for shard in snapshot.shards if shard.samples} for snapshot in snapshots]
    for snapshot, records in zip(snapshots[1:], by_index[1:], strict=True):
        if missing := sorted(set(by_index[0]) ^ set(records)):
            raise ShardMismatch(
                f"{snapshots[0].folder} and {snapshot.folder} do not both have shard {missing[0]:05d}"
            )
    for index in by_index[0]:
        verify_join({s.folder: records[index] for s, records in zip(snapshots, by_index, strict=True)})


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h}" for h, w, _ in sorted(sizes)[:3])
        raise UserError(
            f"images of several sizes ({shown} …) cannot form a batch: set shard.resize=center_crop or border"
        )
    return np.stack(images)
