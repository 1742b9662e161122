"""Captions are stored as one clean line of UTF-8, or refused with a reason."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.captions import CaptionRules, clean, is_utf8
from data.errors import SampleError

RULES = CaptionRules()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", "a red circle"),
        ("  two\tspaces \r\n here ", "two spaces here"),
        ("cafe\u0301", "caf\u00e9"),
        ("bell\x07 and\x00 nul", "bell and nul"),
        ("\ufeffmarked", "marked"),
        ("family \U0001f468\u200d\U0001f469", "family \U0001f468\u200d\U0001f469"),
        (b"bytes \xc3\xa9", "bytes \u00e9"),
    ],
)
def test_a_caption_is_one_clean_line(text: str | bytes, expected: str) -> None:
    assert clean(text, RULES) == expected


@pytest.mark.parametrize(
    ("text", "reason", "filtered"),
    [
        (None, "missing_caption", False),
        ("", "empty_caption", False),
        (" \n\x00\t ", "empty_caption", False),
        (b"caf\xe9", "invalid_utf8", False),
        ("lone \udce9 surrogate", "invalid_utf8", False),
        ("ab", "caption_too_short", True),
        ("abcdefghi", "caption_too_long", True),
    ],
)
def test_a_caption_that_cannot_be_used_has_a_reason(
    text: str | bytes | None, reason: str, filtered: bool
) -> None:
    with pytest.raises(SampleError) as caught:
        clean(text, CaptionRules(min_caption_chars=3, max_caption_chars=8))
    assert (caught.value.reason, caught.value.filtered) == (reason, filtered)


@given(st.text(st.characters(codec=None), max_size=40))
def test_whatever_is_accepted_is_clean_and_stays_as_it_is(text: str) -> None:
    try:
        caption = clean(text, RULES)
    except SampleError as error:
        assert error.reason in {"empty_caption", "invalid_utf8"}
        return
    assert is_utf8(caption) and clean(caption, RULES) == caption == unicodedata.normalize("NFC", caption)
    assert caption == " ".join(caption.split()) != ""
    assert not any(unicodedata.category(character) == "Cc" for character in caption)
