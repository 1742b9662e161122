"""T5's states of a shard's captions: the encoder's own, row by row."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import columns, joins, sources
from data.manifest import ShardRecord
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from data.verify import verify
from stages.fanout import ShardTask
from stages.text import EMPTY, Reading, TextConfig
from training.encoders import T5Encoder

sys.path.insert(0, str(Path(__file__).parents[1]))
from command_lines import result

CAPTIONS = ["a red cat", "an old dog that looks over a fence", "sky", "a cat", "two dogs"]


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Five black pictures with their captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def read(t5: Path, pictures: Path, out: Path, **config) -> ShardRecord:
    rows = sources.list_rows(SourceConfig(path=str(pictures)))
    data = str(out / "shards")
    record = write_shard(rows, 0, data, ShardConfig(resize="no", encode_format="png"))
    work = Reading(str(t5), data, TextConfig(**config), 0)
    task = ShardTask(0, record, {"data": "d", "t5": "t"})
    return work(task, str(out))()


def test_states_are_t5s_own_unpadded_and_in_the_order_of_the_samples(t5_folder, pictures, tmp_path):
    record = read(t5_folder, pictures, tmp_path, batch_size=2)
    encoder = T5Encoder.load(str(t5_folder))
    stored = columns.open_ragged(str(tmp_path), "t5_hidden", 0)
    assert record.samples == len(stored) == len(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        (states,) = encoder.text([caption])
        assert stored[row].shape == tuple(states.shape)
        np.testing.assert_allclose(stored[row], states, atol=2e-3)


def test_the_empty_caption_is_its_end_token(t5_folder, pictures, tmp_path):
    read(t5_folder, pictures, tmp_path)
    empty = np.load(tmp_path / EMPTY, allow_pickle=False)
    (states,) = T5Encoder.load(str(t5_folder)).text([""])
    assert empty.shape == (1, 24) and np.allclose(empty, states, atol=2e-3)


def test_a_long_caption_is_cut_where_the_setting_says(t5_folder, pictures, tmp_path):
    read(t5_folder, pictures, tmp_path, max_length=5)
    stored = columns.open_ragged(str(tmp_path), "t5_hidden", 0)
    assert max(len(stored[row]) for row in range(len(CAPTIONS))) == 5


def test_a_shard_of_states_is_checked_like_any_other_column(t5_folder, pictures, tmp_path):
    record = read(t5_folder, pictures, tmp_path)
    paths = {file.path for file in record.files}
    assert [*joins.in_columns(str(tmp_path), record, ["t5_hidden"], paths)] == []
    less = record.model_copy(update={"samples": record.samples - 1})
    assert [*joins.in_columns(str(tmp_path), less, ["t5_hidden"], paths)]


@pytest.mark.slow
def test_preparing_with_a_t5_adds_its_column_and_the_store_is_sound(t5_folder, pictures, darkroom, tmp_path):
    root = tmp_path / "root"
    settings = {"t5.pretrained": t5_folder, "shard.resize": "no", "shard.samples_per_shard": 2}
    made = result(darkroom("prepare", str(pictures), "--json", root=root, settings=settings))
    assert [(stage["name"], stage["status"]) for stage in made["stages"]] == [
        ("shard", "ran"),
        ("text", "ran"),
    ]
    folder = made["stages"][1]["uri"]
    assert [len(columns.open_ragged(folder, "t5_hidden", shard)) for shard in range(3)] == [2, 2, 1]
    again = result(darkroom("prepare", str(pictures), "--json", root=root, settings=settings))
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
    assert verify(str(root)).ok
