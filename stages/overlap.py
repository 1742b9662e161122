"""Keeps the device busy over one shard: pictures are decoded ahead of it, results are fetched behind it.

Which rows share a batch depends on the shard and the batch size alone, never on the timing of threads.
Legend: B pictures of a batch, H W pixels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.errors import CorruptArtifact, SampleError
from data.images import decode
from data.tars import ShardReader
from stages import telemetry

BATCHES_AHEAD = 2
"""Batches that wait decoded, or are being decoded, while the device works on one: what bounds the memory."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a shard in order, their pictures decoded."""

    rows: range
    pixels: Tensor | list[Tensor]
    """uint8: (B, 3, H, W) in one piece, page-locked for a CUDA device; or a list of (3, H, W) where sizes differ."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each picture."""
        return [(picture.shape[1], picture.shape[2]) for picture in self.pixels]


def decoded(
    reader: ShardReader, batch_size: int, device: torch.device, threads: int | None = None
) -> Iterator[Batch]:
    """The shard's rows `[i·batch_size, (i+1)·batch_size)` as batch i, decoded by `threads` ahead of the caller.

    Raises CorruptArtifact, naming the shard and the key, for a picture that cannot be decoded.
    """
    pin = device.type == "cuda"
    with (
        _threads(threads or decode_threads(device), "decode") as decoders,
        _threads(1, "stack") as stacker,
    ):
        pending: deque[Future[Batch]] = deque()
        for start in range(0, len(reader), batch_size):
            rows = range(start, min(start + batch_size, len(reader)))
            pictures = [decoders.submit(_picture, reader, row) for row in rows]
            pending.append(stacker.submit(_batch, rows, pictures, pin))
            if len(pending) > BATCHES_AHEAD:
                telemetry.tell("darkroom_batches_ready", sum(batch.done() for batch in pending))
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def fetched(outputs: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """Each of `outputs` on the host, one behind: the next batch is at work on the device while one is copied."""
    waiting: _Copy | None = None
    for tensors in outputs:
        copy = _Copy(tensors)
        if waiting:
            yield waiting.arrays()
        waiting = copy
    if waiting:
        yield waiting.arrays()


def decode_threads(device: torch.device) -> int:
    """All CPUs, shared fairly among the GPUs of the machine; one where the network itself runs on the CPUs."""
    if device.type != "cuda":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // torch.cuda.device_count())


class _Copy:
    """A copy to the host that is under way."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # a pageable target would make the copy wait for everything that the device has queued
        self.host = [_started(tensor) for tensor in tensors]
        self.done = torch.cuda.Event() if any(tensor.is_cuda for tensor in tensors) else None
        if self.done:
            self.done.record()

    def arrays(self) -> tuple[np.ndarray, ...]:
        if self.done is None:
            return tuple(tensor.numpy() for tensor in self.host)
        self.done.synchronize()
        return tuple(
            tensor.numpy().copy() for tensor in self.host
        )  # page-locked memory goes back to its pool


def _started(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _picture(reader: ShardReader, row: int) -> np.ndarray:
    try:
        return decode(reader.image(row))
    except SampleError as error:
        raise CorruptArtifact(
            f"{reader.url}: the picture of {reader.keys[row]} cannot be decoded ({error})"
        ) from error


def _batch(rows: range, pictures: Sequence[Future[np.ndarray]], pin: bool) -> Batch:
    arrays = [picture.result() for picture in pictures]
    if len({array.shape for array in arrays}) > 1:
        return Batch(rows, [torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
    stacked = torch.empty((len(arrays), *arrays[0].shape), dtype=torch.uint8, pin_memory=pin)
    np.stack(arrays, out=stacked.numpy())
    return Batch(rows, stacked.permute(0, 3, 1, 2))


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that is left at once: what has not begun is dropped when the caller stops early."""
    pool = ThreadPoolExecutor(count, name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
