"""Row-aligned arrays: what is written is what is mapped, and nothing misaligned or unrepresentable gets in."""

from __future__ import annotations

import gc
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from data import columns
from data.errors import CorruptArtifact, ShardMismatch
from data.manifest import ShardRecord, keys_digest

HALVES = st.floats(-65504, 65504, width=16)


def test_an_array_is_mapped_as_it_was_written(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    record = columns.write_array(str(tmp_path), "img_emb", 7, values)
    path = tmp_path / "img_emb" / "img_emb_00007.npy"
    assert record.path == "img_emb/img_emb_00007.npy"
    assert (record.bytes, record.sha256) == (
        path.stat().st_size,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    opened = columns.open_array(str(tmp_path), "img_emb", 7)
    assert not opened.flags.writeable and not opened.flags.owndata
    assert opened.dtype == np.dtype("<f2") and opened.flags.c_contiguous
    np.testing.assert_array_equal(opened, values)


class _Ending:
    """Garbage that runs Python code as it goes."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        sum(range(50))


def test_threads_that_open_arrays_at_once_do_not_upset_each_others_parser(tmp_path: Path) -> None:
    columns.write_array(str(tmp_path), "img_emb", 0, np.ones((2, 3)))
    npy = pa.py_buffer((tmp_path / columns.array_path("img_emb", 0)).read_bytes())

    def opened(_: int) -> set[tuple[int, ...]]:
        return {columns._array(npy).shape for _ in range(100) if _Ending()}

    before = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5, 2, 2)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(opened, range(40))) == [{(2, 3)}] * 40
    finally:
        gc.set_threshold(*before[0])
        sys.setswitchinterval(before[1])


def test_an_array_can_be_read_from_an_object_store() -> None:
    folder = f"memory://columns-{uuid4().hex}"
    columns.write_array(folder, "img_emb", 0, np.ones((2, 3)))
    np.testing.assert_array_equal(columns.open_array(folder, "img_emb", 0), np.ones((2, 3)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_ragged_rows_come_back_one_by_one(tmp_path: Path, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    rows = [
        data.draw(nps.arrays(np.float16, (length, width), elements=HALVES))
        for length in data.draw(st.lists(st.integers(0, 5), max_size=6))
    ]
    folder = str(tmp_path / uuid4().hex)
    values, offsets = columns.write_ragged(folder, "text_hidden", 3, rows)
    assert values.path == "text_hidden/text_hidden_00003.npy"
    assert offsets.path == "text_hidden_offsets/text_hidden_offsets_00003.npy"
    opened = columns.open_ragged(folder, "text_hidden", 3)
    assert len(opened) == len(rows) and opened.offsets.dtype == np.dtype("<i8")
    for row, expected in enumerate(rows):
        np.testing.assert_array_equal(opened[row], expected)
    with pytest.raises(IndexError):
        opened[len(rows)]


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 1)])
def test_any_number_of_rows_can_be_written(tmp_path: Path, shape: tuple[int, int]) -> None:
    columns.write_array(str(tmp_path), "text_emb", 0, np.ones(shape))
    assert columns.open_array(str(tmp_path), "text_emb", 0).shape == shape


@pytest.mark.parametrize(
    ("value", "problem"), [(np.nan, "not finite"), (np.inf, "not finite"), (7e4, "beyond float16")]
)
def test_a_value_that_the_disk_cannot_hold_is_refused_by_row(
    tmp_path: Path, value: float, problem: str
) -> None:
    values = np.zeros((4, 2, 3, 3), np.float32)
    values[2, 1, 0, 2] = value
    with pytest.raises(ValueError, match=f"vae_moments: a value of row 2 .*{problem}"):
        columns.write_array(str(tmp_path), "vae_moments", 0, values)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_bad_value_of_a_ragged_column_is_named_by_its_row(tmp_path: Path) -> None:
    rows = [np.zeros((2, 3)), np.zeros((0, 3)), np.full((1, 3), np.nan)]
    with pytest.raises(ValueError, match="text_hidden: a value of row 2 is not finite"):
        columns.write_ragged(str(tmp_path), "text_hidden", 0, rows)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((3, 2, 2)), np.float32(1)])
def test_an_array_with_other_axes_than_its_column_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="img_emb: row 0 has shape"):
        columns.write_array(str(tmp_path), "img_emb", 0, values)


def test_ragged_rows_of_unequal_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_hidden: row 1 has shape"):
        columns.write_ragged(str(tmp_path), "text_hidden", 0, [np.zeros((2, 3)), np.zeros((2, 4))])


def test_words_are_not_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="img_emb"):
        columns.write_array(str(tmp_path), "img_emb", 0, np.array([["a", "b"]]))


def _saved(folder: Path, column: str, values: np.ndarray) -> None:
    path = folder / columns.array_path(column, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


@pytest.mark.parametrize(
    "values",
    [np.ones((2, 3), np.float32), np.ones(3, np.float16), np.asfortranarray(np.ones((2, 3), np.float16))],
)
def test_a_file_that_is_not_of_the_column_is_corrupt(tmp_path: Path, values: np.ndarray) -> None:
    _saved(tmp_path, "img_emb", values)
    with pytest.raises(CorruptArtifact, match=r"img_emb_00000\.npy"):
        columns.open_array(str(tmp_path), "img_emb", 0)


@pytest.mark.parametrize("size", [0, 5, 60, 130])
def test_a_cut_file_is_corrupt(tmp_path: Path, size: int) -> None:
    record = columns.write_array(str(tmp_path), "img_emb", 0, np.ones((4, 8)))
    path = tmp_path / record.path
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptArtifact, match=r"img_emb_00000\.npy"):
        columns.open_array(str(tmp_path), "img_emb", 0)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    _saved(tmp_path, "img_emb", np.array([[object()]], dtype=object))
    with pytest.raises(CorruptArtifact):
        columns.open_array(str(tmp_path), "img_emb", 0)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 4], [0, 2, 1, 3], []])
def test_row_boundaries_that_do_not_fit_are_corrupt(tmp_path: Path, offsets: list[int]) -> None:
    columns.write_ragged(str(tmp_path), "text_hidden", 0, [np.ones((3, 2))])
    _saved(tmp_path, "text_hidden_offsets", np.array(offsets, dtype=np.int64))
    with pytest.raises(CorruptArtifact, match=r"text_hidden_offsets_00000\.npy"):
        columns.open_ragged(str(tmp_path), "text_hidden", 0)


def test_metadata_is_clip_retrievals(tmp_path: Path) -> None:
    record = columns.write_metadata(str(tmp_path), 12, ["000120000", "000120001"], ["a", "b"])
    assert record.path == "metadata/metadata_00012.parquet"
    table = pq.read_table(tmp_path / record.path).to_pydict()
    assert table == {"image_path": ["000120000", "000120001"], "caption": ["a", "b"]}
    with pytest.raises(ValueError, match="2 keys but 1 captions"):
        columns.write_metadata(str(tmp_path), 12, ["a", "b"], ["a"])


def _record(index: int, keys: list[str]) -> ShardRecord:
    return ShardRecord(index=index, samples=len(keys), keys=keys_digest(keys), files=(), parents={})


def test_columns_join_only_when_their_keys_agree_in_order() -> None:
    columns.verify_join({})
    columns.verify_join({"shards": _record(0, ["a", "b"]), "img_emb": _record(0, ["a", "b"])})
    with pytest.raises(
        ShardMismatch, match=r"shards shard 00000 and img_emb shard 00000 .*2 samples against 1"
    ):
        columns.verify_join({"shards": _record(0, ["a", "b"]), "img_emb": _record(0, ["a"])})
    with pytest.raises(ShardMismatch, match="their 2 keys differ"):
        columns.verify_join({"shards": _record(0, ["a", "b"]), "img_emb": _record(0, ["b", "a"])})
