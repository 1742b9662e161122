"""Embedding a shard: the encoder's own numbers, row by row, whatever the threads do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import columns, sources
from data.errors import CorruptArtifact
from data.images import decode
from data.manifest import ShardRecord
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from data.tars import ShardReader
from stages import overlap
from stages.embed import EMPTY, EmbedConfig, Embedding
from stages.fanout import ShardTask
from stages.overlap import BATCHES_AHEAD, decoded, fetched
from training.encoders import ClipEncoder
from training.systems.clip import Clip, ClipConfig

CPU = torch.device("cpu")
COUNT = 11


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A random CLIP of 16 px."""
    torch.manual_seed(0)
    small = {"embed_dim": 24, "text_width": 24, "text_layers": 1, "vision_width": 32, "vision_layers": 1}
    trainable = Clip(ClipConfig(image_size=16, context_length=12, text_heads=2, **small))
    folder = tmp_path_factory.mktemp("clip")
    trainable.publish(trainable.build(), folder)
    return str(folder)


def make_shard(folder: Path, sizes: list[tuple[int, int]]) -> tuple[str, ShardRecord]:
    """A shard of noisy pictures of these (width, height), stored as they are."""
    noise = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i:02d}.png")
        (pictures / f"{i:02d}.txt").write_text("very " * (i % 4) + f"noisy picture {i}")
    rows = sources.list_rows(SourceConfig(path=str(pictures)))
    out = str(folder / "shards")
    return out, write_shard(rows, 0, out, ShardConfig(resize="no", encode_format="png"))


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> tuple[str, ShardRecord]:
    """Eleven pictures of one size: two batches of four and one of three."""
    return make_shard(tmp_path_factory.mktemp("even"), [(20, 20)] * COUNT)


def embed(clip: str, shard: tuple[str, ShardRecord], out: Path, **config) -> ShardRecord:
    data, record = shard
    work = Embedding(clip, data, EmbedConfig(**{"batch_size": 4, **config}), 0)
    return work(ShardTask(0, record, {"data": "d", "clip": "c"}), str(out))()


def test_every_column_is_row_aligned_and_the_encoders_own(clip, shard, tmp_path):
    record = embed(clip, shard, tmp_path)
    encoder = ClipEncoder.load(clip)
    images, texts = (columns.open_array(str(tmp_path), name, 0) for name in ("img_emb", "text_emb"))
    hidden = columns.open_ragged(str(tmp_path), "text_hidden", 0)
    assert (record.samples, record.keys, len(hidden)) == (COUNT, shard[1].keys, COUNT)
    with ShardReader(f"{shard[0]}/00000.tar") as reader:
        for row in range(COUNT):
            pixels = torch.from_numpy(decode(reader.image(row))).permute(2, 0, 1)[None]
            text, states = encoder.text([reader.caption(row)])
            np.testing.assert_allclose(images[row], encoder.image(pixels)[0], atol=1e-3)
            np.testing.assert_allclose(texts[row], text[0], atol=1e-3)
            np.testing.assert_allclose(hidden[row], states[0], atol=5e-3)


def test_the_empty_caption_is_stored_once_for_guidance(clip, shard, tmp_path):
    embed(clip, shard, tmp_path)
    text, states = ClipEncoder.load(clip).text([""])
    for path, expected in zip(EMPTY, (text[0], states[0]), strict=True):
        stored = np.load(tmp_path / path, allow_pickle=False)
        np.testing.assert_allclose(stored, expected, atol=1e-6)


def test_the_number_of_decoding_threads_changes_no_byte(clip, shard, tmp_path):
    one = embed(clip, shard, tmp_path / "one", decode_threads=1)
    many = embed(clip, shard, tmp_path / "many", decode_threads=5)
    assert one == many  # the records hold the digest of every file


def test_pictures_of_different_sizes_share_a_batch(clip, tmp_path):
    shard = make_shard(tmp_path, [(20, 20), (31, 18), (16, 16), (18, 31), (20, 20)])
    embed(clip, shard, tmp_path / "out")
    stored, encoder = columns.open_array(str(tmp_path / "out"), "img_emb", 0), ClipEncoder.load(clip)
    with ShardReader(f"{shard[0]}/00000.tar") as reader:
        for row in range(5):
            pixels = torch.from_numpy(decode(reader.image(row))).permute(2, 0, 1)[None]
            np.testing.assert_allclose(stored[row], encoder.image(pixels)[0], atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close_and_its_embeddings_are_of_unit_length(clip, shard, tmp_path, precision):
    embed(clip, shard, tmp_path / "fp32")
    embed(clip, shard, tmp_path / "half", precision=precision)
    full, half = (columns.open_array(str(tmp_path / p), "img_emb", 0).astype(float) for p in ("fp32", "half"))
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-3)
    assert (full * half).sum(1).min() > 0.999


def test_a_damaged_picture_is_named(shard, tmp_path):
    data, record = shard
    damaged = tmp_path / "00000.tar"
    content = bytearray(Path(data, "00000.tar").read_bytes())
    start = content.index(b"IDAT") + 40
    content[start : start + 200] = bytes(200)
    damaged.write_bytes(content)
    with (
        ShardReader(str(damaged)) as reader,
        pytest.raises(CorruptArtifact, match=f"{reader.keys[0]} cannot"),
    ):
        list(decoded(reader, 4, CPU))
    assert record.samples == COUNT


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_consecutive_rows_and_few_pictures_are_decoded_ahead(shard, threads, monkeypatch):
    seen: list[bytes] = []
    monkeypatch.setattr(overlap, "decode", lambda payload: (seen.append(payload), decode(payload))[1])
    with ShardReader(f"{shard[0]}/00000.tar") as reader:
        batches = decoded(reader, 2, CPU, threads)
        for number, batch in enumerate(batches):
            assert list(batch.rows) == list(range(COUNT))[2 * number : 2 * number + 2]
            assert len(seen) <= 2 * (number + 1 + BATCHES_AHEAD)
    assert len(seen) == COUNT


def test_a_consumer_that_stops_early_leaves_no_thread_behind(shard):
    import threading

    before = threading.active_count()
    with ShardReader(f"{shard[0]}/00000.tar") as reader:
        batches = decoded(reader, 2, CPU, 3)
        next(batches)
        batches.close()
    assert threading.active_count() == before


def test_results_are_fetched_in_order_and_one_behind():
    launched: list[int] = []

    def outputs():
        for i in range(3):
            launched.append(i)
            yield (torch.tensor([i]),)

    seen = [(int(array[0]), list(launched)) for (array,) in fetched(outputs())]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]


def test_pairs_below_the_least_clip_score_are_counted_and_marked(clip, shard, tmp_path):
    every = embed(clip, shard, tmp_path / "every")
    scores = (
        columns.open_array(str(tmp_path / "every"), "img_emb", 0).astype(np.float32)
        * columns.open_array(str(tmp_path / "every"), "text_emb", 0)
    ).sum(axis=1)
    least = float(np.sort(scores)[3:5].mean())
    record = embed(clip, shard, tmp_path / "some", min_clip_score=least)
    kept = columns.open_array(str(tmp_path / "some"), "kept", 0)
    assert kept.tolist() == (scores >= least).tolist()
    assert (record.ledger.written, record.ledger.filtered) == (COUNT - 4, {"low_clip_score": 4})
    assert (record.samples, record.keys) == (every.samples, every.keys), "the columns stay row-aligned"
