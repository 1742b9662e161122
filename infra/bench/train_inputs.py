"""What both sides of `train_peers.py` read: pictures with captions, models of random weights, and the columns of ours.

pictures/          JPEGs of the race's size and metadata.jsonl, as the peers' scripts read a folder
clip/, vae/        transformers' CLIP (for DALLE2-pytorch, open_clip's) and diffusers' autoencoder
shards/, embed/, encode/    ours, written by the stages' own code
peer_emb/          the image embeddings in the float32 that DALLE2-pytorch's script needs
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from embed import write_clip
from PIL import Image
from train_networks import TOKENS, ClipSizes
from train_races import Race

from data import sources
from data.manifest import ShardRecord, Snapshot, publish_snapshot
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from stages.embed import EmbedConfig, Embedding
from stages.encode import EncodeConfig, Encoding
from stages.fanout import ShardTask
from training.clip_conversion import _open_clip_vocabulary
from training.vae_encoder import VaeEncoder

BATCH = 8


def make_inputs(race: Race, photos: Path | None, folder: Path) -> float:
    """Writes everything under `folder`; seconds that our stages took to encode a sample, which is done once."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    write_pictures(photos, folder / "pictures", race.samples, race.side)
    if race.peer == "dalle2":
        write_clip(open_clip_config(race.clip()), folder / "clip")
    else:
        write_transformers_clip(race.clip(), folder / "clip")
    if autoencoder := race.autoencoder():
        autoencoder.save_pretrained(folder / "vae")
    race.write_models(folder)
    return write_columns(race, folder) / race.samples


def write_pictures(photos: Path | None, folder: Path, count: int, side: int) -> None:
    """`count` squares: the photographs over and over, or drawn ones. One caption fills `TOKENS`, as one of any large set does."""
    folder.mkdir(parents=True)
    found = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg")) if photos else []
    with (folder / "metadata.jsonl").open("w") as stream:
        for number in range(count):
            picture = _square(found[number % len(found)]) if found else _drawn(number)
            name = f"{number:06d}.jpg"
            picture.resize((side, side), Image.Resampling.BICUBIC).save(folder / name, quality=95)
            text = f"a photograph, the one with number {number}" + " again" * (0 if number else TOKENS)
            stream.write(json.dumps({"file_name": name, "text": text}) + "\n")


def _square(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        side = min(picture.size)
        return picture.convert("RGB").crop((0, 0, side, side))


def _drawn(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8))


def write_transformers_clip(clip: ClipSizes, folder: Path) -> None:
    """`CLIPModel` with CLIP's vocabulary and preprocessing: what ours and the peers load alike."""
    from transformers import CLIPImageProcessor, CLIPTokenizer

    clip.build().save_pretrained(folder)
    square = {"height": clip.side, "width": clip.side}
    CLIPImageProcessor(size={"shortest_edge": clip.side}, crop_size=square).save_pretrained(folder)
    CLIPTokenizer(*_open_clip_vocabulary(), model_max_length=TOKENS).save_pretrained(folder)


def open_clip_config(clip: ClipSizes) -> dict[str, object]:
    """The text tower in open_clip's words, beside a vision tower that only fills a column."""
    return {
        "embed_dim": clip.embed_dim,
        "quick_gelu": True,
        "vision_cfg": {"image_size": clip.side, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
        "text_cfg": {
            "context_length": TOKENS,
            "vocab_size": 49408,
            "width": clip.text.width,
            "heads": clip.text.heads,
            "layers": clip.text.layers,
        },
    }


def write_columns(race: Race, folder: Path) -> float:
    """Shards the pictures and runs our stages' own work on them; its seconds, without sharding."""
    rows = sources.list_rows(SourceConfig(path=str(folder / "pictures")))
    config = ShardConfig(image_size=race.side, samples_per_shard=len(rows))
    shards = str(folder / "shards")
    record = write_shard(rows, 0, shards, config)
    embedding = Embedding(str(folder / "clip"), shards, EmbedConfig(batch_size=BATCH), 0)
    started = time.perf_counter()
    embedded = embedding(ShardTask(0, record), str(folder / "embed"))()
    seconds = time.perf_counter() - started
    _publish("embed", ("img_emb", "text_emb", "text_hidden"), embedded, folder)
    if race.peer == "dalle2":
        _write_for_dalle2(folder)
    return seconds + (_encode(record, folder) if (folder / "vae").exists() else 0.0)


def _encode(record: ShardRecord, folder: Path) -> float:
    encoding = Encoding(str(folder / "vae"), str(folder / "shards"), EncodeConfig(batch_size=BATCH))
    started = time.perf_counter()
    encoded = encoding(ShardTask(0, record), str(folder / "encode"))()
    seconds = time.perf_counter() - started
    facts = {"scaling_factor": VaeEncoder.load(str(folder / "vae")).scaling_factor}
    _publish("encode", ("vae_moments",), encoded, folder, facts)
    return seconds


def _publish(
    stage: str,
    columns: tuple[str, ...],
    record: ShardRecord,
    folder: Path,
    facts: dict[str, float] | None = None,
) -> None:
    snapshot = Snapshot(
        stage=stage,
        version=1,
        fingerprint=stage,
        config={},
        columns=columns,
        shards=(record,),
        facts=facts or {},
    )
    publish_snapshot(str(folder / stage), snapshot)


def _write_for_dalle2(folder: Path) -> None:
    values = np.load(folder / "embed" / "img_emb" / "img_emb_00000.npy")
    (folder / "peer_emb").mkdir()
    np.save(folder / "peer_emb" / "img_emb_00000.npy", values.astype(np.float32))
