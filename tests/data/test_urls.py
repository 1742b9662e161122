"""Credentials in URLs: found, hidden, refused."""

from __future__ import annotations

import pytest

from data.errors import UserError
from data.urls import has_credentials, redacted, refuse_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:word@host/x.png", "https://***@host/x.png"),
        ("https://ghp_token@host/x.png", "https://***@host/x.png"),
        ("s3://KEY:s3cr3t@bucket/x", "s3://***@bucket/x"),
        ("HTTP://u:p@s@h:80/x", "HTTP://***@h:80/x"),
        ("postgresql+asyncpg://prefect:word@db/prefect", "postgresql+asyncpg://***@db/prefect"),
        ("https://h/x?w=1&X-Amz-Signature=abc&y=2", "https://h/x?w=1&X-Amz-Signature=***&y=2"),
        ("https://h/x?sig=a%2Bb#c", "https://h/x?sig=***#c"),
        (
            "cannot reach 'http://u:p@h/api', nor http://u:q@h",
            "cannot reach 'http://***@h/api', nor http://***@h",
        ),
        ("simplecache::https://u:p@h/x", "simplecache::https://***@h/x"),
    ],
)
def test_what_opens_something_is_hidden_and_the_rest_stays(text: str, shown: str) -> None:
    assert redacted(text) == shown == redacted(shown) and has_credentials(text)
    with pytest.raises(UserError, match="a URL with credentials") as refused:
        refuse_credentials("", {"source": {"path": text, "limit": 3}, "more": ["x"]})
    assert str(refused.value).startswith("source.path names ") and "word" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8265/x@y:z/",
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/a:b@c",
        "a star: 12:30@noon",
        "https://h/x?design=1&tokens=3",
        "/home/u:p@h",
        "",
    ],
)
def test_what_is_no_credential_is_left_alone(text: str) -> None:
    assert redacted(text) == text
    refuse_credentials("place", {"path": text, "number": 1, "nothing": None})
