"""Captions as they are stored: UTF-8, NFC, one line, single spaces, no control characters."""

from __future__ import annotations

import unicodedata

from pydantic import Field

from data.config import Config
from data.errors import SampleError


class CaptionRules(Config):
    """Which captions are taken. Lengths are in characters after cleaning."""

    min_caption_chars: int = Field(default=1, ge=1, description="shorter captions are filtered")
    max_caption_chars: int = Field(default=10_000, ge=1, description="longer captions are filtered")


def clean(text: str | bytes | None, rules: CaptionRules) -> str:
    """The caption in NFC, control characters removed, each run of whitespace one space; idempotent.

    Raises SampleError: `missing_caption` (None), `invalid_utf8`, `empty_caption`, and, as filters,
    `caption_too_short` and `caption_too_long`.
    """
    if text is None:
        raise SampleError("missing_caption", "the image has no caption")
    decoded = _decoded(text)
    kept = decoded if decoded.isprintable() else "".join(filter(_is_kept, decoded))
    caption = " ".join(unicodedata.normalize("NFC", kept).split())
    if not caption:
        raise SampleError("empty_caption", "the caption is empty")
    if len(caption) < rules.min_caption_chars:
        raise _wrong_length("caption_too_short", caption, f"at least {rules.min_caption_chars}")
    if len(caption) > rules.max_caption_chars:
        raise _wrong_length("caption_too_long", caption, f"at most {rules.max_caption_chars}")
    return caption


def is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it holds no lone surrogate, the mark of bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoded(text: str | bytes) -> str:
    decoded = text if isinstance(text, str) else text.decode("utf-8", "surrogateescape")
    if not is_utf8(decoded):
        raise SampleError("invalid_utf8", "the caption is not UTF-8")
    return decoded


def _is_kept(character: str) -> bool:
    return character.isspace() or (unicodedata.category(character) != "Cc" and character != "\ufeff")


def _wrong_length(reason: str, caption: str, allowed: str) -> SampleError:
    message = f"the caption has {len(caption)} characters; {allowed} are allowed"
    return SampleError(reason, message, filtered=True)
