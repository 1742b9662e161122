"""Every column that can exist: the vocabulary that stages, loaders and trainables share.

Legend: H W pixels, D embedding width, T tokens of one caption (no padding), C latent channels, h w latent size.
`None` in a shape varies between datasets or samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A named quantity that every sample of a dataset has."""

    name: str
    kind: Literal["tar", "array", "ragged"]
    """`tar`: a member beside the sample's key; `array`: one row per sample in `{name}/{name}_{shard:05d}.npy`;
    `ragged`: rows of varying length, all rows concatenated in that file, row boundaries in `{name}_offsets/`."""
    dtype: str
    """numpy dtype on disk."""
    shape: tuple[int | None, ...]
    """Per sample."""
    meaning: str
    """Content, units and value range."""


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column(
            name="image",
            kind="tar",
            dtype="uint8",
            shape=(None, None, 3),
            meaning="the picture as jpg, png or webp: RGB, 0 to 255, upright, transparency composited on white",
        ),
        Column(
            name="caption",
            kind="tar",
            dtype="str",
            shape=(),
            meaning="the text that belongs to the picture, UTF-8, stripped, never empty",
        ),
        Column(
            name="img_emb",
            kind="array",
            dtype="<f2",
            shape=(None,),
            meaning="CLIP image embedding (D,), L2-normalised; clip-retrieval's layout",
        ),
        Column(
            name="text_emb",
            kind="array",
            dtype="<f2",
            shape=(None,),
            meaning="CLIP text embedding (D,), L2-normalised; clip-retrieval's layout",
        ),
        Column(
            name="text_hidden",
            kind="ragged",
            dtype="<f2",
            shape=(None, None),
            meaning="last hidden states of the text encoder (T, D) after its final norm, start to end token, unpadded",
        ),
        Column(
            name="t5_hidden",
            kind="ragged",
            dtype="<f2",
            shape=(None, None),
            meaning="last hidden states of T5's encoder (T, W) after its final norm, end token included, unpadded",
        ),
        Column(
            name="kept",
            kind="array",
            dtype="|b1",
            shape=(),
            meaning="whether the row's CLIP score reaches embed.min_clip_score; readers pass over the others",
        ),
        Column(
            name="vae_moments",
            kind="array",
            dtype="<f2",
            shape=(None, None, None),
            meaning="VAE posterior (2C, h, w): mean in the first C channels, log-variance in the rest; unscaled",
        ),
        Column(
            name="generated",
            kind="array",
            dtype="|u1",
            shape=(None, None, 3),
            meaning="image generated for the row's prompt: RGB, 0 to 255",
        ),
        Column(
            name="reconstructed",
            kind="array",
            dtype="|u1",
            shape=(None, None, 3),
            meaning="the row's image after the VAE's encoder and decoder: RGB, 0 to 255",
        ),
        Column(
            name="predicted_emb",
            kind="array",
            dtype="<f2",
            shape=(None,),
            meaning="image embedding (D,) that the prior predicts from the row's caption, L2-normalised",
        ),
        Column(
            name="inception",
            kind="array",
            dtype="<f4",
            shape=(2048,),
            meaning="pool3 features of FID's Inception under the tf1 resize rule",
        ),
        Column(
            name="inception_clean",
            kind="array",
            dtype="<f4",
            shape=(2048,),
            meaning="pool3 features of FID's Inception under the clean resize rule",
        ),
        Column(
            name="original_inception",
            kind="array",
            dtype="<f4",
            shape=(2048,),
            meaning="as inception, of the pictures that the VAE is held against",
        ),
        Column(
            name="reconstructed_inception",
            kind="array",
            dtype="<f4",
            shape=(2048,),
            meaning="as inception, of these pictures after the VAE's encoder and decoder",
        ),
        Column(
            name="dinov2",
            kind="array",
            dtype="<f4",
            shape=(None,),
            meaning="class token (D,) of DINOv2 after its last norm",
        ),
        Column(
            name="clip",
            kind="array",
            dtype="<f4",
            shape=(None,),
            meaning="image embedding (D,) of a CLIP that looks in place of the run's own, L2-normalised",
        ),
        Column(
            name="clip_text",
            kind="array",
            dtype="<f4",
            shape=(None,),
            meaning="that CLIP's embedding (D,) of the row's caption, L2-normalised",
        ),
    )
}
