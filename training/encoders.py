"""The frozen encoders, by the kind that a recipe names them with, and what identifies their weights.

Each lives in a file of its own: `clip_encoder` (open_clip and transformers), `t5_encoder`, `vae_encoder`. A folder never
touches the network; a hub name does when its weights are not in the local cache.
"""

from __future__ import annotations

from collections.abc import Callable

from training import hub
from training.clip_encoder import ClipEncoder, downloaded
from training.pretrained import CLIP_CONFIG, CLIP_WEIGHTS, Precision, weights_digest
from training.t5_encoder import T5Encoder
from training.vae_encoder import VaeEncoder

__all__ = [
    "CLIP_CONFIG",
    "CLIP_WEIGHTS",
    "LOADERS",
    "ClipEncoder",
    "Precision",
    "T5Encoder",
    "VaeEncoder",
    "commit_of",
    "weights_digest",
]

LOADERS: dict[str, Callable[..., ClipEncoder | T5Encoder | VaeEncoder]] = {
    "clip": ClipEncoder.load,
    "t5": T5Encoder.load,
    "vae": VaeEncoder.load,
}
"""kind -> load(source, device, precision)."""


def commit_of(kind: str, source: str) -> str:
    """The commit of the hub that the name `source` of an encoder of `kind` stands for, downloaded where it is missing.

    Raises UserError when it cannot be had.
    """
    found = downloaded(source) if kind == "clip" else hub.folder(source, "t5" if kind == "t5" else "vae")
    return found.name
