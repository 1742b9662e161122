"""Features on disk: taken up where a call stopped, shared by two at once, and made again where they are damaged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.errors import UserError
from training.metrics.extraction import BLOCK, extract, extract_arrays
from training.metrics.extractors import Extractor

COUNT = 8 * BLOCK + 40
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 3, 3), dtype=np.uint8)
EXPECTED = IMAGES.transpose(0, 3, 1, 2).reshape(COUNT, -1)[:, :5].astype(np.float32)


class Stopped(Exception):
    """What ends a call early."""


def looking(
    name: str = "eye", *, before: Callable[[int], None] = lambda _: None
) -> tuple[Extractor, list[int]]:
    """An extractor whose features are a picture's first five values, and how many pictures each pass had; `before` hears the
    number of passes so far."""
    passes: list[int] = []

    def features(pictures: Sequence[Tensor]) -> Tensor:
        before(len(passes))
        passes.append(len(pictures))
        return torch.stack([picture.flatten()[:5].float() for picture in pictures])

    return Extractor(name, name * 16, "none", features), passes


def stop_after(passes: int) -> Callable[[int], None]:
    def before(done: int) -> None:
        if done == passes:
            raise Stopped

    return before


def test_a_call_that_was_stopped_goes_on_at_its_last_whole_block(tmp_path):
    with pytest.raises(Stopped):
        extract_arrays(IMAGES, [looking(before=stop_after(20))[0]], tmp_path)
    extractor, passes = looking()
    found = extract_arrays(IMAGES, [extractor], tmp_path)
    assert sum(passes) == COUNT - 5 * BLOCK, "20 passes of 16 are five blocks of 64"
    np.testing.assert_array_equal(found.features["eye"], EXPECTED)
    assert found.sizes == {(3, 2)}
    again, passes = looking()
    kept = extract_arrays(IMAGES, [again], tmp_path)
    assert not passes and kept.sizes == {(3, 2)}
    np.testing.assert_array_equal(kept.features["eye"], EXPECTED)


def test_a_further_extractor_looks_alone(tmp_path):
    extract_arrays(IMAGES, [looking()[0]], tmp_path)
    (first, looked), (other, looked_too) = looking(), looking("ear")
    found = extract_arrays(IMAGES, [first, other], tmp_path)
    assert not looked and sum(looked_too) == COUNT
    np.testing.assert_array_equal(found.features["ear"], EXPECTED)


def test_of_two_calls_at_once_the_second_waits_and_takes_what_the_first_left(tmp_path):
    second, passes = looking()
    with ThreadPoolExecutor(1) as beside:
        waiting: list[Future] = []

        def begun(done: int) -> None:
            if done == 10:
                waiting.append(beside.submit(extract_arrays, IMAGES, [second], tmp_path))
            if done == 18:
                assert not passes, "it waits"
                raise Stopped

        with pytest.raises(Stopped):
            extract_arrays(IMAGES, [looking(before=begun)[0]], tmp_path)
        found = waiting[0].result()
    assert sum(passes) == COUNT - 4 * BLOCK, "18 passes of 16 are four blocks and a part"
    np.testing.assert_array_equal(found.features["eye"], EXPECTED)


def test_whole_features_are_read_where_nothing_can_be_written(tmp_path):
    extract_arrays(IMAGES, [looking()[0]], tmp_path)
    for path in (*tmp_path.iterdir(), tmp_path):
        path.chmod(0o555)
    extractor, passes = looking()
    np.testing.assert_array_equal(extract_arrays(IMAGES, [extractor], tmp_path).features["eye"], EXPECTED)
    assert not passes
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("damage", ["cut", "short", "other", "flat", "untold", "nonsense", "endless"])
def test_what_is_no_whole_array_of_these_pictures_is_made_again(tmp_path, damage):
    extract_arrays(IMAGES, [looking()[0]], tmp_path)
    (array,), (told,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    if damage == "cut":
        array.write_bytes(array.read_bytes()[:-8])
    elif damage == "short":
        np.save(array, EXPECTED[:-1])
    elif damage == "other":
        np.save(array, EXPECTED.astype(np.float64))
    elif damage == "flat":
        np.save(array, EXPECTED[:, 0])
    elif damage == "endless":
        told.write_text('{"rows": 1e999, "sizes": []}')
    elif damage == "untold":
        told.unlink()
    else:
        told.write_text(json.dumps({"rows": "all"}))
    extractor, passes = looking()
    found = extract_arrays(IMAGES, [extractor], tmp_path)
    assert sum(passes) == COUNT
    np.testing.assert_array_equal(found.features["eye"], EXPECTED)
    assert {path.suffix for path in Path(tmp_path).iterdir() if path.name != ".lock"} == {".npy", ".json"}


def test_a_full_disk_is_one_sentence_before_a_row_is_written(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"features cannot be kept in .*No space left.*give another place"):
        extract_arrays(IMAGES, [looking()[0]], tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match=r"a.png is no whole picture"):
        extract([tmp_path / "a.png"], [looking()[0]], tmp_path)
