"""Row-aligned columns of a dataset as training batches: a map from (seed, epoch, position) to a sample.

Legend: B batch of this rank, H W pixels, D embedding width, T longest caption of the dataset, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data import storage
from data.ahead import in_order
from data.columns import longest_row, verify_join
from data.errors import CorruptArtifact, ShardMismatch, UserError
from data.images import decode
from data.manifest import Snapshot
from data.opened import MAX_ARRAYS, OpenColumns
from data.order import SampleOrder, held_out, require_equal_shares
from data.shard_cache import ShardCache

IMAGE_CACHE_BYTES = 512 << 20
"""Decoded images up to this size altogether are kept in memory; decoding a small one again costs more than its bytes."""
_POSITIONS_AT_ONCE = 4096
"""Positions of this rank whose samples are found in one go, which costs less than one batch after another."""


class ColumnSet:
    """Random access to the columns of one dataset, over all its shards in order; rows that `kept` leaves out do not count.

    Opening verifies that every two columns agree shard by shard on count and ordered keys; ShardMismatch names the files
    that do not. Raises UserError when a column is missing or there is no sample at all. Shards are opened as they are
    needed, a bounded number at a time; remote ones come through `cache`, by default the one that the environment names.
    """

    def __init__(self, snapshots: Sequence[Snapshot], cache: ShardCache | None = None) -> None:
        self._owner = {column: snapshot for snapshot in snapshots for column in snapshot.columns}
        counted = [snapshot for snapshot in snapshots if snapshot.shards]
        if not any(snapshot.samples for snapshot in counted):
            raise UserError(
                f"no input holds a sample ({', '.join(s.folder for s in snapshots) or 'none was given'}): "
                "check the source and the filters of `shard`"
            )
        _verify(counted)
        self._open = OpenColumns(self._owner, cache)
        self.shards, counts = _counted_rows(self._owner.get("kept", counted[0]), "kept" in self._owner)
        if not self.shards:
            raise UserError("embed.min_clip_score leaves no sample: lower it")
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._held = np.zeros(0, np.int64)
        self._is_validation = False
        self._kept_rows = functools.lru_cache(maxsize=MAX_ARRAYS)(self._read_kept_rows)

    def __len__(self) -> int:
        return len(self._held) if self._is_validation else int(self._starts[-1]) - len(self._held)

    @property
    def counts(self) -> np.ndarray:
        """Samples (int64) of this view in each of `shards`."""
        held = np.diff(np.searchsorted(self._held, self._starts))
        return held if self._is_validation else np.diff(self._starts) - held

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
        self._snapshot(column)
        first = self._open.get(column, self.shards[0])
        if column == "text_hidden":
            return (self._longest, first.values.shape[-1])
        return decode(first.image(0)).shape if column == "image" else tuple(first.shape[1:])

    def rows(self, column: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Stacked rows: float32, or uint8 (n, H, W, 3) for images; text_hidden (n, T, D) zero-padded to the longest."""
        if column == "image":
            return self._images(np.asarray(indices))
        if column == "text_hidden":
            return pad(self._each(column, indices, lambda opened, row: opened[row]), self._longest)[0]
        out: np.ndarray | None = None
        for slots, opened, rows in self._by_shard(column, indices):
            if out is None:
                out = np.empty((len(indices), *opened.shape[1:]), np.float32)
            out[slots] = opened[rows]
        return np.empty((0, *self.shape(column)), np.float32) if out is None else out

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The samples' captions."""
        return self._each("caption", indices, lambda shard, row: shard.caption(row))

    def keys(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The samples' `__key__`s."""
        return self._each("image", indices, lambda shard, row: shard.keys[row])

    def empty(self, column: str) -> np.ndarray:
        """What the empty caption has in `text_emb` (D,) or `text_hidden` (T0, D), float32."""
        path = storage.join(self._snapshot(column).folder, "empty", f"{column}.npy")
        with storage.open_read(path) as stream:
            return np.load(stream, allow_pickle=False).astype(np.float32)

    def facts(self, column: str) -> Mapping[str, Any]:
        """Facts of the artifact that wrote the column."""
        return self._snapshot(column).facts

    def maker(self, column: str) -> str | None:
        """Where the network that computed the column lay: a folder or a hub name; None for what no network computed."""
        parents = self._snapshot(column).parents
        return next((parents[role].folder for role in ("vae", "clip") if role in parents), None)

    def batch(self, names: Sequence[str], indices: np.ndarray) -> dict[str, Any]:
        """The named columns of the given samples as tensors on the CPU (captions as a list)."""
        fields: dict[str, Any] = {}
        for name in names:
            if name == "caption":
                fields[name] = self.captions(indices)
            elif name == "text_hidden":
                rows = self._each(name, indices, lambda opened, row: opened[row])
                values, lengths = pad(rows, self._longest)
                fields[name], fields["text_length"] = torch.from_numpy(values), torch.from_numpy(lengths)
            elif name == "image":
                fields[name] = torch.from_numpy(self.rows(name, indices)).permute(0, 3, 1, 2)
            else:
                fields[name] = torch.from_numpy(self.rows(name, indices))
        return fields

    def fetch_ahead(self, names: Sequence[str], order: SampleOrder, position: int) -> None:
        """Begins to fetch the remote shards that stream `position` and what follows it need. Returns at once.

        Raises UserError when they do not fit the shard cache, since each step would then fetch all of them again.
        """
        if any(self._open.is_remote(name) for name in names):
            here, following = ([self.shards[at] for at in places] for places in order.near(position))
            self._open.require_room(names, dict.fromkeys(here + following))
            self._open.fetch_ahead(names, dict.fromkeys(here + following))

    @functools.cached_property
    def _longest(self) -> int:
        folder = self._snapshot("text_hidden").folder
        work = in_order(lambda shard: longest_row(folder, "text_hidden", shard), self.shards, 8, 64)
        return max(*work, len(self.empty("text_hidden")))

    @functools.cached_property
    def _decoded(self) -> tuple[np.ndarray, np.ndarray] | None:
        count, shape = int(self._starts[-1]), self.shape("image")
        if count * int(np.prod(shape)) > IMAGE_CACHE_BYTES:
            return None
        return np.empty((count, *shape), np.uint8), np.zeros(count, bool)

    def _images(self, indices: np.ndarray) -> np.ndarray:
        if self._decoded is None:
            return _stack(self._each("image", indices, lambda shard, row: decode(shard.image(row))))
        pixels, known = self._decoded
        places = self._places(indices)
        missing = indices[~known[places]]
        for place, image in zip(
            self._places(missing).tolist(),
            self._each("image", missing, lambda shard, row: decode(shard.image(row))),
            strict=True,
        ):
            pixels[place] = _stack([image, pixels[place]])[0]
            known[place] = True
        return pixels[places]

    def _each(
        self, column: str, indices: Sequence[int] | np.ndarray, read: Callable[[Any, int], Any]
    ) -> list[Any]:
        """`read(opened shard, row)` of each sample, in the order of `indices`."""
        found: list[Any] = [None] * len(indices)
        for slots, opened, rows in self._by_shard(column, indices):
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
                found[slot] = read(opened, row)
        return found

    def _by_shard(
        self, column: str, indices: Sequence[int] | np.ndarray
    ) -> Iterator[tuple[np.ndarray, Any, np.ndarray]]:
        """For each shard among those of the samples: their places in `indices`, the opened shard, their rows in it."""
        self._snapshot(column)
        places = self._places(np.asarray(indices, np.int64))
        at = np.searchsorted(self._starts, places, side="right") - 1
        by_shard = np.argsort(at, kind="stable")
        for slots in np.split(by_shard, np.flatnonzero(np.diff(at[by_shard])) + 1) if len(at) else ():
            number = int(at[slots[0]])
            rows = places[slots] - self._starts[number]
            if "kept" in self._owner:
                rows = self._kept_rows(number)[rows]
            yield slots, self._open.get(column, self.shards[number]), rows

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """Where samples of this view are among those of both views."""
        assert not len(indices) or 0 <= indices.min() <= indices.max() < len(self), (
            f"{indices} of {len(self)}"
        )
        if self._is_validation:
            return self._held[indices]
        return indices + np.searchsorted(self._held - np.arange(len(self._held)), indices, side="right")

    def _read_kept_rows(self, number: int) -> np.ndarray:
        """Rows (int64) that count of the shard at `number`."""
        rows = np.flatnonzero(self._open.get("kept", self.shards[number]))
        if len(rows) != (counted := int(np.diff(self._starts)[number])):
            raise CorruptArtifact(
                f"{self._owner['kept'].folder}: `kept` of shard {self.shards[number]:05d} keeps {len(rows)} rows, "
                f"{counted} on record"
            )
        return rows

    def _snapshot(self, column: str) -> Snapshot:
        if column not in self._owner:
            raise UserError(f"no input has the column {column!r}; there are {', '.join(sorted(self._owner))}")
        return self._owner[column]


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

    The global batch of step k is the stream positions [k*B, (k+1)*B); every sample comes once per epoch, and a batch at
    the end of one goes on with the next. Raises UserError when `world_size` does not divide `batch_size`.
    """
    require_equal_shares(batch_size, world_size)
    per_rank = batch_size // world_size
    order = SampleOrder(columns.counts, seed)
    at_once = max(1, min(_POSITIONS_AT_ONCE // per_rank, order.count // batch_size))
    for step in itertools.count(first_step, at_once):
        steps = np.arange(step, step + at_once)[:, None]
        positions = steps * batch_size + rank * per_rank + np.arange(per_rank)  # (at_once, per_rank)
        columns.fetch_ahead(names, order, int(positions[0, 0]))
        for where, indices in zip(positions, order(positions.ravel()).reshape(positions.shape), strict=True):
            batch = columns.batch(names, indices)
            yield on_device({**batch, "position": torch.from_numpy(where)}, device)


def on_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch's tensors on `device`; to a GPU they go from pinned memory, without waiting for the copy."""
    device = torch.device(device)
    if device.type == "cpu":
        return batch
    return {
        name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def key_at(columns: ColumnSet, seed: int, position: int) -> str:
    """The `__key__` of the sample at `position` of the training stream that `batches` follows."""
    return columns.keys(SampleOrder(columns.counts, seed)(np.array([position])))[0]


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

    Every rank has as many: where `world_size` does not divide them, the last sample fills up what is missing at the end, with
    `weight` (B,) float32 0 instead of 1.
    """
    count = len(columns)
    mine = np.arange(rank, -(-count // world_size) * world_size, world_size)
    per_rank = max(1, batch_size // world_size)
    for start in range(0, len(mine), per_rank):
        numbers = mine[start : start + per_rank]
        indices, weight = np.minimum(numbers, count - 1), (numbers < count).astype(np.float32)
        batch = {**columns.batch(names, indices), "position": torch.from_numpy(indices)}
        yield on_device({**batch, "weight": torch.from_numpy(weight)}, device)


def pad(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (T_i, D) as one zero-padded (n, length, D) float32 array, and their lengths (n,) int64."""
    values = np.zeros((len(rows), length, rows[0].shape[-1]), np.float32)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
    return values, np.array([len(row) for row in rows], np.int64)


def _counted_rows(snapshot: Snapshot, is_filtered: bool) -> tuple[list[int], list[int]]:
    """(index, rows that count) of each shard of which any row does."""
    counts = [(s.index, s.ledger.written if is_filtered else s.samples) for s in snapshot.shards]
    return [index for index, count in counts if count], [count for _, count in counts if count]


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
