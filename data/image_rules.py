"""Which pictures are taken and what becomes of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data.config import Config


class ImageRules(Config):
    """Which pictures are taken and what becomes of them."""

    image_size: int = Field(default=256, ge=8, le=4096, description="pixels of the side that `resize` fixes")
    resize: Literal["center_crop", "border", "keep_ratio", "bucket", "no"] = Field(
        default="center_crop",
        description="center_crop: shortest side to image_size, middle square; border: longest side to image_size, "
        "white up to a square; keep_ratio: shortest side to image_size; bucket: the size of about image_size^2 "
        "pixels that is nearest in shape, covered, its middle kept; no: as it came",
    )
    bucket_step: int = Field(
        default=64,
        ge=1,
        description="both sides of a bucket are multiples of this, or of image_size / 4 where that is less",
    )
    bucket_aspect_ratio: float = Field(
        default=2.0, ge=1, le=8, description="longer over shorter side of the longest bucket"
    )
    encode_format: Literal["jpg", "png", "webp"] = Field(
        default="jpg", description="format of the stored picture"
    )
    encode_quality: int = Field(default=95, ge=1, le=100, description="quality of jpg and webp; png has none")
    max_pixels: int = Field(
        default=89_478_485, ge=1, description="width x height that the header may announce"
    )
    max_bytes: int = Field(default=100_000_000, ge=1, description="bytes of the original file")
    min_size: int = Field(default=0, ge=0, description="filter: pixels of the shorter side of the original")
    max_aspect_ratio: float = Field(
        default=20.0, ge=1, description="filter: longer over shorter side of the original"
    )
