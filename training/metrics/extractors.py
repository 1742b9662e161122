"""What looks at a picture: an extractor by name, from its weights, with all that its numbers depend on.

inception          FID's Inception, tf1 resize      inception=pt_inception-2015-12-05-6726825d.pth, or inception=hub
inception_clean    the same network, clean resize   (the same weights)
clip               a CLIP's towers                  clip=FOLDER, or clip=hub:OWNER/NAME[@REVISION]
dinov2             DINOv2's class token             dinov2=FOLDER, or dinov2=hub for facebook/dinov2-large

A path never touches the network; `hub` is a download when the local cache has nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data import storage
from data.errors import UserError
from training import hub
from training.clip_encoder import ClipEncoder
from training.distributed import device
from training.metrics import dinov2, inception
from training.pretrained import local_folder, weights_digest, without_tf32

MICRO_BATCH = 16
T = TypeVar("T")
WEIGHTS = {
    "inception": f"the file {inception.WEIGHTS_FILE} from the releases of pytorch-fid",
    "clip": "a CLIP folder of open_clip or transformers, such as what a run's clip stage published",
    "dinov2": "a folder with the files of facebook/dinov2-large from the hub",
}
"""What `--extractor NAME=PATH` wants, for people without it."""
HUB = {"inception": "hub", "clip": "hub:OWNER/NAME", "dinov2": "hub"}
"""What it is written instead of PATH to download the weights."""
DINOV2 = "hub:facebook/dinov2-large"
_HUB_KIND: dict[str, hub.Kind] = {"clip": "clip", "dinov2": "dinov2"}
RESIZE = {
    "inception": "tf1",
    "inception_clean": "clean",
    "clip": "the encoder's own",
    "dinov2": "bicubic antialias, squash, 224",
}
"""How pictures reach an extractor's size; CLIP's own rule comes with its weights and counts in their digest."""


@dataclass(frozen=True)
class Extractor:
    """A frozen network with its resize rule."""

    name: str
    digest: str
    """SHA-256 of the weights."""
    resize: str
    features: Callable[[Sequence[Tensor]], Tensor]
    """At most 16 pictures (3, H, W) uint8 -> (B, D) float32; row i depends on picture i alone."""
    text: Callable[[Sequence[str]], np.ndarray] | None = None
    """Captions -> (B, D) float32, where the network reads."""
    head: np.ndarray | None = None
    """(C, D) weights of a classifier on the features."""


def parse(specs: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """name -> (path, whether the weights are custom), of `NAME[:custom]=PATH`. Raises UserError for anything else."""
    found: dict[str, tuple[str, bool]] = {}
    for spec in specs:
        name, given, path = spec.partition("=")
        name, _, kind = name.partition(":")
        if (
            not given
            or not path
            or name not in WEIGHTS
            or kind not in ("", "custom")
            or (kind and name != "inception")
        ):
            raise UserError(
                f"--extractor {spec}: give NAME=PATH, where NAME is {', '.join(WEIGHTS)}, or inception:custom"
            )
        if name in found:
            raise UserError(f"--extractor {name} is given twice: give each once")
        try:
            found[name] = (place_of(name, path), kind == "custom")
        except UserError as error:
            raise UserError(f"--extractor {spec}: {error}") from error
    return found


def place_of(kind: str, source: str) -> str:
    """Where the weights `source` of `kind` are to be had: an existing path, or a name of the hub; nothing is downloaded.

    Raises UserError for neither.
    """
    if source == "hub" and kind in ("inception", "dinov2"):
        return DINOV2 if kind == "dinov2" else source
    if kind != "inception" and re.fullmatch(r"hub:[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        return source
    if is_download(source):
        raise UserError(f"{source!r} names nothing: write {HUB[kind]} to download, or a path")
    path = Path(source).expanduser()
    if not (path.is_file() if kind == "inception" else path.is_dir()):
        raise UserError(f"nothing lies at {source}; it wants {WEIGHTS[kind]}, or {HUB[kind]} to download it")
    return str(path)


def is_download(place: str) -> bool:
    """Whether `place`, as `place_of` takes it, names what is downloaded."""
    return place == "hub" or hub.is_named(place)


def secured(kind: str, place: str) -> str:
    """`place`, as `place_of` gives it, once its weights are on this machine; a name of the hub with its commit, so that another
    machine loads the same. Raises UserError when they cannot be downloaded."""
    if hub.is_named(place):
        return hub.pinned(place, _HUB_KIND[kind])
    if place == "hub":
        _file(place)
    return place


def load(name: str, path: str, *, is_custom: bool = False) -> Extractor:
    """The extractor `name` with the weights at `path`, on this process's device. Raises UserError when they do not fit.

    FID's Inception is refused unless it is the published file or `is_custom`, whose digest makes another protocol.
    """
    if weights_of(name) == "inception":
        return _inception(name, _file(path), is_custom)
    folder, digest = _folder(name, path), digest_of(name, path)
    if name == "clip":
        clip = ClipEncoder.load(folder, device())
        look, reading = functools.partial(clip_images, clip), functools.partial(clip_texts, clip)
        return Extractor(name, digest, RESIZE[name], look, reading)
    model = dinov2.load_dinov2(folder).to(device())
    return Extractor(name, digest, RESIZE[name], functools.partial(dinov2.features, model))


def clip_images(clip: ClipEncoder, images: Sequence[Tensor]) -> Tensor:
    """(B, D) float32 of pictures (3, H, W) uint8 of any sizes, in micro-batches of 16, the last filled up with its own last
    picture: row i depends on picture i alone."""
    with without_tf32():
        return torch.cat([clip.image(filled)[:count] for filled, count in _micro_batches(images)])


def clip_texts(clip: ClipEncoder, captions: Sequence[str]) -> np.ndarray:
    """(B, D) float32 of captions, in micro-batches as those of pictures: memory does not grow with their number."""
    return np.concatenate([_numpy(clip.ragged_text(f)[0][:count]) for f, count in _micro_batches(captions)])


def _micro_batches(given: Sequence[T]) -> Iterator[tuple[list[T], int]]:
    """MICRO_BATCH of `given` at a time, and how many of them are no filling."""
    for start in range(0, len(given), MICRO_BATCH):
        part = list(given[start : start + MICRO_BATCH])
        yield [*part, *part[-1:] * (MICRO_BATCH - len(part))], len(part)


def weights_of(name: str) -> str:
    """Which of `WEIGHTS` the extractor `name` wants."""
    return name.removesuffix("_clean")


def digest_of(name: str, path: str) -> str:
    """SHA-256 of the weights at `path`, without loading them; what the hub names is downloaded."""
    kind = weights_of(name)
    return (
        storage.sha256(_file(path))[1] if kind == "inception" else weights_digest(kind, _folder(name, path))
    )


def _file(place: str) -> str:
    return str(hub.file(inception.WEIGHTS_URL, inception.WEIGHTS_SHA256)) if place == "hub" else place


def _folder(name: str, path: str) -> str:
    folder = hub.folder(path, _HUB_KIND[name]) if hub.is_named(path) else local_folder(path)
    if folder is None:
        raise UserError(f"{path} is no folder: {name} wants {WEIGHTS[name]}")
    return str(folder)


def _inception(name: str, path: str, is_custom: bool) -> Extractor:
    try:
        network: Any = _network(path, is_custom)
    except ValueError as error:
        hint = (
            ""
            if is_custom
            else "; for other weights of this network write inception:custom=PATH, or evaluate.inception_is_custom=true for a run"
        )
        raise UserError(f"{error}{hint}") from error
    resize: Any = RESIZE[name]
    look = functools.partial(inception.features, network, resize=resize)
    return Extractor(name, digest_of(name, path), resize, look, head=_numpy(network.head))


@functools.lru_cache(maxsize=1)
def _network(path: str, is_custom: bool) -> Any:
    """Both conventions use one network."""
    return inception.load_inception(path, None if is_custom else inception.WEIGHTS_SHA256).to(device())


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def pictures(images: Sequence[np.ndarray]) -> list[Tensor]:
    """(H, W, 3) uint8 arrays as (3, H, W) tensors. Raises ValueError for any other: floats have no known range."""
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"a picture must be a uint8 array (H, W, 3), got {image.dtype} {image.shape}")
    return [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for image in images]
