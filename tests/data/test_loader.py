"""The loader: which sample lies at which position of the stream depends on the seed alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import columns, loader, manifest, opened
from data.ahead import prefetch
from data.errors import CorruptArtifact, ShardMismatch, UserError
from data.loader import ColumnSet, batches, pad
from data.manifest import Ledger, ShardRecord, Snapshot, keys_digest
from data.order import SampleOrder
from data.shards import ShardConfig, write_shard
from data.sources import Row

COUNT = 11
PER_SHARD = 4


def _pixels(index: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, width, 3), np.uint8)


def _shards(folder: Path, widths: dict[int, int]) -> Snapshot:
    """`COUNT` pictures with captions in shards of four rows; nothing is written of what has width 0."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rows = []
    for i in range(COUNT):
        path = pictures / f"{i}.png"
        if width := widths.get(i, 8):
            Image.fromarray(_pixels(i, width)).save(path)
        rows.append(Row(i, str(path), f"picture {i}", path.name))
    config = ShardConfig(image_size=8, resize="no", encode_format="png", samples_per_shard=PER_SHARD)
    parts = [rows[i : i + PER_SHARD] for i in range(0, COUNT, PER_SHARD)]
    records = tuple(write_shard(part, i, str(folder / "shards"), config) for i, part in enumerate(parts))
    return Snapshot(
        stage="shard",
        version=1,
        fingerprint="a",
        config={},
        columns=("caption", "image"),
        shards=records,
        folder=str(folder / "shards"),
    )


def _snapshot(stage: str, names: tuple[str, ...], records: tuple[ShardRecord, ...], folder: str) -> Snapshot:
    return Snapshot(
        stage=stage, version=1, fingerprint=stage, config={}, columns=names, shards=records, folder=folder
    )


def _rows_of(data: Snapshot) -> dict[int, list[int]]:
    """shard -> the samples in it, by their place in the dataset."""
    ends = np.cumsum([shard.samples for shard in data.shards])
    parts = zip(data.shards, ends, strict=True)
    return {shard.index: list(range(int(end) - shard.samples, int(end))) for shard, end in parts}


def _length(sample: int) -> int:
    return 1 + sample % 3


def _embeddings(folder: Path, data: Snapshot) -> Snapshot:
    """img_emb of sample i is (i, i, i); its text_hidden are 1 to 3 tokens of width 2 that are all i + 1."""
    at, records = str(folder / "embed"), []
    for shard in data.shards:
        samples = _rows_of(data)[shard.index]
        values = np.repeat(np.array(samples, np.float32)[:, None], 3, axis=1)
        hidden = [np.full((_length(i), 2), i + 1, np.float32) for i in samples]
        files = (
            columns.write_array(at, "img_emb", shard.index, values),
            *columns.write_ragged(at, "text_hidden", shard.index, hidden),
        )
        records.append(shard.model_copy(update={"files": files}))
    columns.publish(at, "empty/text_hidden.npy", columns._npy(np.full((5, 2), 0.5, np.float16)))
    return Snapshot(
        stage="embed",
        version=1,
        fingerprint="b",
        config={},
        columns=("img_emb", "text_hidden"),
        shards=tuple(records),
        facts={"width": 3},
        folder=at,
    )


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> list[Snapshot]:
    """Shards and embeddings of `COUNT` samples."""
    folder = tmp_path_factory.mktemp("dataset")
    data = _shards(folder, {})
    return [data, _embeddings(folder, data)]


@pytest.fixture
def dataset(snapshots: list[Snapshot]) -> ColumnSet:
    """A freshly opened dataset."""
    return ColumnSet(snapshots)


def _samples(
    dataset: ColumnSet, steps: int, batch_size: int, *, seed: int = 3, **more: int
) -> list[list[int]]:
    """The samples of the first `steps` batches, read back from their embeddings."""
    stream = batches(dataset, ("img_emb",), seed=seed, batch_size=batch_size, **more)
    return [batch["img_emb"][:, 0].int().tolist() for batch in itertools.islice(stream, steps)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 11, 13, 30])
def test_every_sample_comes_once_per_epoch(dataset: ColumnSet, batch_size: int) -> None:
    stream = list(itertools.chain(*_samples(dataset, -(-3 * COUNT // batch_size), batch_size)))
    epochs = [stream[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 18])
def test_the_global_batch_does_not_depend_on_the_world_size(
    dataset: ColumnSet, batch_size: int, world_size: int
) -> None:
    ranks = [_samples(dataset, 8, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    joined = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert joined == _samples(dataset, 8, batch_size)


def test_the_position_is_the_global_one(dataset: ColumnSet) -> None:
    for rank in range(2):
        batch = next(
            batches(dataset, ("img_emb",), seed=3, batch_size=6, first_step=5, rank=rank, world_size=2)
        )
        assert batch["position"].dtype == torch.int64
        assert batch["position"].tolist() == [30 + 3 * rank + i for i in range(3)]
        expected = SampleOrder([4, 4, 3], 3)(batch["position"].numpy())
        assert batch["img_emb"][:, 0].tolist() == expected.tolist()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 40), st.integers(1, 25))
def test_resuming_gives_what_an_unbroken_run_gives(
    snapshots: list[Snapshot], first_step: int, batch_size: int
) -> None:
    dataset = ColumnSet(snapshots)
    unbroken = _samples(dataset, first_step + 3, batch_size)
    assert _samples(dataset, 3, batch_size, first_step=first_step) == unbroken[first_step:]


def test_resuming_at_a_huge_step_is_immediate(dataset: ColumnSet) -> None:
    step = 10**15
    began = time.monotonic()
    assert _samples(dataset, 2, 6, first_step=step)[1:] == _samples(dataset, 1, 6, first_step=step + 1)
    assert time.monotonic() - began < 5


def test_runs_of_changing_world_sizes_see_what_an_unbroken_run_sees(dataset: ColumnSet) -> None:
    seen: list[int] = []
    for first_step, world_size in [(0, 1), (4, 3), (8, 2)]:
        ranks = [
            _samples(dataset, 4, 6, first_step=first_step, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        seen += itertools.chain(*itertools.chain(*ranks))
    assert sorted(seen) == sorted(itertools.chain(*_samples(dataset, 12, 6)))


def test_a_batch_size_that_the_workers_cannot_share_is_refused_with_what_would_work(
    dataset: ColumnSet,
) -> None:
    sentence = "batch_size 64 is not a multiple of 3 workers: take a batch of 63 or 66, or 1, 2 workers"
    with pytest.raises(UserError, match=sentence):
        next(batches(dataset, ("img_emb",), seed=0, batch_size=64, world_size=3))
    with pytest.raises(UserError, match="take a batch of 8, or 1, 2, 4 workers"):
        next(batches(dataset, ("img_emb",), seed=0, batch_size=4, world_size=8))


def test_more_shards_than_descriptors_cost_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "MAX_ARRAYS", 300)
    (tmp_path / "img_emb").mkdir()
    payload = columns._npy(np.arange(6, dtype=np.float16).reshape(2, 3))
    for shard in range(3000):
        (tmp_path / columns.array_path("img_emb", shard)).write_bytes(payload)
    records = tuple(ShardRecord(index=i, samples=2, keys="k", files=()) for i in range(3000))
    many = ColumnSet([_snapshot("embed", ("img_emb",), records, str(tmp_path))])
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert (many.rows("img_emb", np.arange(0, 6000, 2)) == [0, 1, 2]).all()
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 1 and len(many._open._arrays) == 300


def test_a_batch_holds_each_column_as_the_trainables_expect_it(dataset: ColumnSet) -> None:
    names = ("image", "caption", "img_emb", "text_hidden")
    batch = dataset.batch(names, np.array([9, 0, 4]))
    assert batch["caption"] == ["picture 9", "picture 0", "picture 4"]
    assert batch["img_emb"].dtype == torch.float32 and batch["img_emb"].tolist() == [
        [9] * 3,
        [0] * 3,
        [4] * 3,
    ]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(batch["image"].permute(0, 2, 3, 1), [_pixels(i) for i in (9, 0, 4)])
    assert dataset.keys([9, 0]) == ["000020001", "000000000"]
    assert dataset.facts("img_emb") == {"width": 3}
    shapes = {"image": (8, 8, 3), "img_emb": (3,), "text_hidden": (5, 2)}
    assert {name: dataset.shape(name) for name in shapes} == shapes


def test_captions_are_padded_to_the_longest_of_the_dataset_counting_the_empty_one(dataset: ColumnSet) -> None:
    indices = np.array([2, 0, 10])
    batch = dataset.batch(("text_hidden",), indices)
    assert batch["text_length"].dtype == torch.int64
    assert batch["text_length"].tolist() == [_length(i) for i in indices]
    expected = [[[i + 1] * 2] * _length(i) + [[0, 0]] * (5 - _length(i)) for i in indices]
    assert batch["text_hidden"].dtype == torch.float32 and batch["text_hidden"].tolist() == expected
    np.testing.assert_array_equal(dataset.rows("text_hidden", indices), expected)
    np.testing.assert_array_equal(dataset.empty("text_hidden"), np.full((5, 2), 0.5))


def test_padding_keeps_rows_and_tells_their_lengths() -> None:
    values, lengths = pad([np.ones((2, 3)), np.full((0, 3), 9.0), np.full((4, 3), 2.0)], 4)
    assert values.dtype == np.float32 and values.shape == (3, 4, 3) and lengths.tolist() == [2, 0, 4]
    assert values.sum(axis=(1, 2)).tolist() == [6, 0, 24] and not values[0, 2:].any()


def test_a_shard_without_samples_is_stepped_over(tmp_path: Path) -> None:
    data = _shards(tmp_path, dict.fromkeys([4, 5, 6, 7, 9], 0))
    dataset = ColumnSet([data, _embeddings(tmp_path, data)])
    assert [shard.samples for shard in data.shards] == [4, 0, 2] and len(dataset) == 6
    assert dataset.captions(range(6)) == [f"picture {i}" for i in (0, 1, 2, 3, 8, 10)]
    assert sorted(_samples(dataset, 1, 6)[0]) == list(range(6))


@pytest.mark.parametrize("cached", [True, False])
def test_images_of_several_sizes_cannot_form_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(loader, "IMAGE_CACHE_BYTES", loader.IMAGE_CACHE_BYTES if cached else 0)
    dataset = ColumnSet([_shards(tmp_path, {6: 9})])
    assert dataset.rows("image", [0, 1]).shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match=r"several sizes \(8x8, 9x8 …\).*set shard\.resize"):
        dataset.rows("image", [0, 6])
    assert (dataset._decoded is not None) is cached


def test_the_cache_of_images_gives_what_decoding_gives_and_belongs_to_nobody_else(
    snapshots: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = ColumnSet(snapshots)
    for indices in ([3, 1, 3], [1, 10, 0], range(COUNT)):
        np.testing.assert_array_equal(cached.rows("image", indices), [_pixels(i) for i in indices])
    cached.rows("image", [3])[:] = 0
    cached.batch(("image",), np.array([3]))["image"].zero_()
    np.testing.assert_array_equal(cached.rows("image", [3])[0], _pixels(3))
    monkeypatch.setattr(loader, "IMAGE_CACHE_BYTES", COUNT * 8 * 8 * 3 - 1)
    uncached = ColumnSet(snapshots)
    np.testing.assert_array_equal(uncached.rows("image", range(COUNT)), cached.rows("image", range(COUNT)))
    assert uncached._decoded is None and cached._decoded is not None
    assert cached._decoded[0].nbytes == COUNT * 8 * 8 * 3


def _changed(snapshot: Snapshot, index: int, **change: object) -> Snapshot:
    shards = [s.model_copy(update=change) if s.index == index else s for s in snapshot.shards]
    return snapshot.model_copy(update={"shards": tuple(shards)})


def test_a_join_that_does_not_fit_names_both_sides(snapshots: list[Snapshot]) -> None:
    data, embed = snapshots
    for change, problem in [
        ({"samples": 3}, "4 samples against 3"),
        ({"keys": keys_digest(["x"])}, "their 4 keys differ"),
    ]:
        with pytest.raises(ShardMismatch, match=problem) as caught:
            ColumnSet([data, _changed(embed, 1, **change)])
        assert data.folder in str(caught.value) and embed.folder in str(caught.value)
        assert "shard 00001" in str(caught.value)
    with pytest.raises(ShardMismatch, match="do not both have shard 00002") as caught:
        ColumnSet([data, embed.model_copy(update={"shards": embed.shards[:2]})])
    assert data.folder in str(caught.value) and embed.folder in str(caught.value)


def test_a_column_that_no_input_has_is_named(snapshots: list[Snapshot]) -> None:
    weights = Snapshot(stage="vae", version=1, fingerprint="w", config={}, folder="weights")
    dataset = ColumnSet([*snapshots, weights])
    with pytest.raises(UserError, match="no input has the column 'vae_moments'; there are caption, image"):
        dataset.shape("vae_moments")


def test_a_dataset_without_a_sample_is_refused(snapshots: list[Snapshot]) -> None:
    nothing = ShardRecord(index=0, samples=0, keys=keys_digest([]), files=())
    for empty in ([], [snapshots[0].model_copy(update={"shards": (nothing,)})]):
        with pytest.raises(UserError, match="no input holds a sample"):
            ColumnSet(empty)


def test_columns_are_read_from_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    at = "memory://loader-test"
    record = columns.write_array(at, "img_emb", 0, np.eye(3))
    shard = ShardRecord(index=0, samples=3, keys=keys_digest("abc"), files=(record,))
    snapshot = Snapshot(
        stage="embed", version=1, fingerprint="m", config={}, columns=("img_emb",), shards=(shard,)
    )
    np.testing.assert_array_equal(
        ColumnSet([manifest.publish_snapshot(at, snapshot)]).rows("img_emb", [2, 0]), np.eye(3)[[2, 0]]
    )


def _fetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "darkroom-prefetch"]


def _stop_within(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _fetchers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _fetchers()


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetching_changes_nothing_and_ends_its_thread(depth: int) -> None:
    assert list(prefetch(iter(range(20)), depth)) == list(range(20))
    assert _stop_within(2)


def test_an_error_of_the_background_is_raised_in_its_turn() -> None:
    def failing() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("lost")

    stream = prefetch(failing())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(KeyError, match="lost"):
        next(stream)
    assert _stop_within(2)


def test_prefetching_runs_ahead_by_its_depth_and_stops_with_its_consumer() -> None:
    made: list[int] = []
    stream = prefetch((made.append(i) or i for i in itertools.count()), depth=3)
    assert next(stream) == 0
    time.sleep(0.3)
    assert made == [0, 1, 2, 3, 4], "one was taken, three are queued, one waits for its place"
    stream.close()
    assert _stop_within(2)


def test_rows_that_kept_leaves_out_are_passed_over_in_every_column(tmp_path):
    data = _shards(tmp_path, {})
    kept = np.arange(COUNT) % 3 != 0
    parts = [kept[i : i + PER_SHARD] for i in range(0, COUNT, PER_SHARD)]

    def scored(name: str, masks: list[np.ndarray], written: list[int]) -> Snapshot:
        folder, records = str(tmp_path / name), []
        for shard, mask, count in zip(data.shards, masks, written, strict=True):
            ledger = Ledger(written=count, filtered={"clip_score": len(mask) - count})
            files = (columns.write_array(folder, "kept", shard.index, mask),)
            records.append(shard.model_copy(update={"files": files, "ledger": ledger}))
        return _snapshot("embed", ("kept",), tuple(records), folder)

    chosen = ColumnSet([data, scored("e", parts, [2, 3, 2])])
    assert chosen.captions(range(len(chosen))) == [f"picture {i}" for i in np.flatnonzero(kept)]
    assert (chosen.rows("image", [0])[0] == _pixels(1)).all()
    with pytest.raises(UserError, match="min_clip_score leaves no sample"):
        ColumnSet([data, scored("n", [part & False for part in parts], [0, 0, 0])])
    with pytest.raises(CorruptArtifact, match="`kept` of shard 00001 keeps 3 rows, 4 on record"):
        ColumnSet([data, scored("c", parts, [2, 4, 2])]).captions(range(8))


def _everything(view: ColumnSet) -> list[int]:
    return view.rows("img_emb", range(len(view)))[:, 0].astype(int).tolist() if len(view) else []


@pytest.mark.parametrize("validation", [0, 1, 3, COUNT - 1])
def test_a_split_shares_the_samples_out_and_training_never_meets_the_held_out(
    dataset: ColumnSet, validation: int
) -> None:
    training, held = dataset.split(validation)
    assert (len(training), len(held)) == (COUNT - validation, validation)
    assert sorted(_everything(training) + _everything(held)) == list(range(COUNT))
    assert _everything(training) == sorted(_everything(training))
    np.testing.assert_array_equal(
        training.rows("image", range(len(training))), [_pixels(i) for i in _everything(training)]
    )
    assert held.captions(range(validation)) == [f"picture {i}" for i in _everything(held)]
    assert training.shape("text_hidden") == held.shape("text_hidden") == dataset.shape("text_hidden")
    seen = set(itertools.chain(*_samples(training, 30, 4)))
    assert seen == set(_everything(training))


@pytest.mark.parametrize("position", [0, 5, COUNT, 3 * COUNT + 2])
def test_a_position_of_the_stream_has_the_key_of_the_sample_there(dataset: ColumnSet, position: int) -> None:
    stream = batches(dataset, ["img_emb"], seed=3, batch_size=1, first_step=position)
    row = next(stream)["img_emb"]
    keys = {dataset.keys([i])[0]: dataset.rows("img_emb", [i]) for i in range(COUNT)}
    np.testing.assert_array_equal(row, keys[loader.key_at(dataset, 3, position)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_held_out_batches_are_everything_once_shared_out_evenly(dataset: ColumnSet, world_size: int) -> None:
    size = max(6, world_size)
    ranks = [
        list(loader.held_out_batches(dataset, ["img_emb"], batch_size=size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    sizes = [[len(batch["position"]) for batch in rank] for rank in ranks]
    assert all(each == sizes[0] for each in sizes), "no rank waits for another in a collective"
    assert sizes[0][0] == size // world_size
    seen = [
        (p, weight)
        for together in zip(*ranks, strict=True)
        for batch in together
        for p, weight in zip(batch["position"].tolist(), batch["weight"].tolist(), strict=True)
    ]
    assert sorted(p for p, weight in seen if weight == 1) == list(range(COUNT)), "none is left out"
    assert all(p == COUNT - 1 for p, weight in seen if weight == 0)
    assert len(seen) == -(-COUNT // world_size) * world_size
    first = sorted(p for p, weight in seen[:size] if weight)
    assert first == list(range(min(size, COUNT))), "the global batches do not depend on the world size"
    for batch in ranks[-1]:
        np.testing.assert_array_equal(batch["img_emb"], dataset.rows("img_emb", batch["position"].numpy()))


def test_a_split_leaves_something_to_train_on(dataset: ColumnSet) -> None:
    with pytest.raises(UserError, match="11 of 11 samples for validation: give 0 to 10"):
        dataset.split(COUNT)
