"""Near-duplicate pictures: a 64-bit hash of a picture's coarse look, and which hashes lie within a few bits of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import cv2
import imagehash
import numpy as np
from PIL import Image

from data import jpegs
from data.images import decode

HASH_BITS = 64
MAX_DISTANCE = 16
_SIDE = 32


def payload_hash(payload: bytes) -> str:
    """`perceptual_hash` of an upright encoded picture, such as a shard's; a JPEG is decoded no larger than serves.

    Raises SampleError as `decode` does.
    """
    if not jpegs.is_plain(payload):
        return perceptual_hash(decode(payload))
    least = min(jpegs.size(payload)) / _SIDE
    return perceptual_hash(jpegs.pixels(payload, max(r for r in jpegs.REDUCTIONS if r <= max(1, least))))


def perceptual_hash(pixels: np.ndarray | Image.Image) -> str:
    """16 hex digits: which of the 8 x 8 lowest frequencies of the gray picture lie above their median (pHash).

    `pixels` is uint8 (H, W, 3) RGB, or a PIL image. It is averaged down to 32 x 32 first, so a reduced picture serves as
    well as the whole. A picture that was resized, encoded anew or made a little brighter has a hash within a few bits;
    one that was flipped or cropped has not.
    """
    rgb = np.asarray(pixels.convert("RGB") if isinstance(pixels, Image.Image) else pixels)
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3, f"not RGB: {rgb.dtype} {rgb.shape}"
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return str(imagehash.phash(Image.fromarray(small), hash_size=8, highfreq_factor=_SIDE // 8))


def hash_values(hashes: Sequence[str]) -> np.ndarray:
    """Hashes of 16 hex digits as uint64 (n,), in order."""
    return np.array([int(digits, 16) for digits in hashes], np.uint64)


def near_duplicates(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """int64 (n,): of each row of `hashes`, uint64 (n,), the earliest kept row within `max_distance` bits of it, or -1.

    A row that has such a row is a duplicate and is not kept; only kept rows are compared with. Likeness therefore does
    not spread from duplicate to duplicate: every row that goes is within `max_distance` (0 to 16) of a row that stays,
    and no two rows that stay are. The order of the rows decides, and nothing is approximate.
    """
    assert hashes.dtype == np.uint64 and hashes.ndim == 1, f"not uint64 (n,): {hashes.dtype} {hashes.shape}"
    assert 0 <= max_distance <= MAX_DISTANCE, f"max_distance {max_distance} is not 0 to {MAX_DISTANCE}"
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    kept = np.empty(len(values), np.int64)
    kept[by_appearance] = first[by_appearance][_earliest_kept(values[by_appearance], max_distance)]
    found = kept[inverse]  # equal hashes share their fate
    return np.where(found == np.arange(len(hashes)), -1, found)


def _earliest_kept(values: np.ndarray, max_distance: int) -> np.ndarray:
    """int64 (n,): of each of the distinct values, in order, the earliest kept one that is near, or itself."""
    count = len(values)
    codes = [later * count + earlier for earlier, later in _near_pairs(values, max_distance)]
    pairs = np.unique(np.concatenate(codes)) if codes else np.zeros(0, np.int64)
    found, gone = np.arange(count), bytearray(count)
    for later, earlier in zip((pairs // count).tolist(), (pairs % count).tolist(), strict=True):
        if not gone[later] and not gone[earlier]:
            gone[later], found[later] = 1, earlier
    return found


def _near_pairs(values: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (earlier, later) within `max_distance` bits, in batches; a pair may come more than once.

    Two hashes within d bits agree in at least one of d + 1 runs of bits, whichever bits differ (the pigeonhole
    principle): so only values that share a run are compared.
    """
    if max_distance == 0:
        return  # distinct values differ
    edges = np.linspace(0, HASH_BITS, max_distance + 2).round().astype(int)
    for low, high in pairwise(edges.tolist()):
        keys = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(keys, kind="stable")
        keys, sorted_values = keys[order], values[order]
        ends = np.searchsorted(keys, keys, side="right")
        at, step = np.arange(len(values)), 1
        while len(at := at[at + step < ends[at]]):
            near = np.bitwise_count(sorted_values[at] ^ sorted_values[at + step]) <= max_distance
            yield order[at[near]], order[at[near] + step]  # stable: the first of the two appeared earlier
            step += 1
