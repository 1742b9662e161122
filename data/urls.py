"""Credentials in URLs: seen, refused where a person names a place, and never written down.

What opens a store comes from the environment or from its own configuration; a URL ends up in records, logs and pages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data.errors import UserError

_HIDDEN = "***"
_PATTERNS = (
    re.compile(r"(\b(?:https?|ftps?|sftp)://)[^/?#\s]+(@)", re.IGNORECASE),
    re.compile(
        r"(\b[a-z][a-z0-9+.-]*://)[^/?#\s]*:[^/?#\s]*(@)", re.IGNORECASE
    ),  # abfs://container@account is none
    re.compile(
        r"([?&;](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|awsaccesskeyid|signature|sig"
        r"|token|access_token|auth|api_?key|password|secret)=)[^&#;\s'\"]+()",
        re.IGNORECASE,
    ),
)


def redacted(text: str) -> str:
    """`text` with stars for the user and password of every URL in it, and for parameters that sign or open something."""
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{_HIDDEN}\g<2>", text)
    return text


def has_credentials(text: str) -> bool:
    """Whether `redacted` would change `text`."""
    return redacted(text) != text


def refuse_credentials(what: str, value: Any) -> None:
    """Raises UserError when `value`, or any text inside of it, is a URL with credentials; says where, and not which."""
    if isinstance(value, str) and has_credentials(value):
        raise UserError(
            f"{what} names {redacted(value)}, a URL with credentials in it: take them out and give them by the environment, "
            "as in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, since places are written into records"
        )
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_credentials(f"{what}.{name}".lstrip("."), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_credentials(what, inner)
