"""Small files that several processes write: created only where there is none, replaced and removed only as they were read.

On this machine a lock of the kernel keeps writers apart; in an S3 store its own conditions do (`If-None-Match`, `If-Match`).
Nothing is renamed and nothing is listed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple

from fsspec.asyn import sync

from data import storage
from data.errors import CorruptArtifact

S3 = ("s3://", "s3a://")
_REFUSED = (HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED)


class Versioned(NamedTuple):
    """A file as it was read."""

    payload: bytes
    version: str
    """Another one as soon as the payload changes."""


def is_supported(url: str) -> bool:
    """Whether the store of `url` knows conditions: a disk and S3 do."""
    return storage.is_local(url) or url.startswith(S3)


def read(url: str) -> Versioned | None:
    """The file; None where there is none. Raises CorruptArtifact where a folder lies in its place."""
    try:
        if not storage.is_local(url):
            return sync(_place(url)[0].loop, _get, url)
        payload = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise CorruptArtifact(f"{url} is a folder where a file belongs: remove it") from error
    return Versioned(payload, _version(payload))


def create(url: str, payload: bytes) -> bool:
    """Publishes `payload` unless a file is there; whether it did. Of any number of callers, one gets True."""
    if not storage.is_local(url):
        return _granted(url, "put_object", Body=payload, IfNoneMatch="*")
    storage.local_path(url).parent.mkdir(parents=True, exist_ok=True)
    with _alone(url):
        if storage.exists(url):
            return False
        storage.write_bytes(url, payload)
        return True


def replace(url: str, payload: bytes, version: str) -> bool:
    """Publishes `payload` in place of the file that was read as `version`; whether that one was still there."""
    if not storage.is_local(url):
        return _granted(url, "put_object", Body=payload, IfMatch=version)
    with _alone(url):
        if not _is(url, version):
            return False
        storage.write_bytes(url, payload)
        return True


def remove(url: str, version: str) -> bool:
    """Deletes the file that was read as `version`; whether that one was still there."""
    if not storage.is_local(url):
        return _granted(url, "delete_object", IfMatch=version)
    with contextlib.suppress(FileNotFoundError), _alone(url):  # its folder may be gone
        if _is(url, version):
            storage.remove(url)
            return True
    return False


@contextmanager
def _alone(url: str) -> Iterator[None]:
    """One process of this machine at a time; the kernel ends the turn of a process that is killed."""
    path = storage.local_path(url)
    with path.with_suffix(".lock").open("wb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def _is(url: str, version: str) -> bool:
    found = read(url)
    return found is not None and found.version == version


def _version(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _granted(url: str, method: str, **condition: Any) -> bool:
    """Whether the store carried out the request; an answer that was lost on its way may come back as a refusal."""
    filesystem, bucket, key = _place(url)
    try:
        filesystem.call_s3(method, Bucket=bucket, Key=key, **condition)
    except FileNotFoundError:
        if "IfMatch" in condition:
            return False
        raise  # there is no such bucket
    except OSError as error:
        answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
        if answer.get("HTTPStatusCode") in _REFUSED:
            return False
        raise
    return True


async def _get(url: str) -> Versioned:
    filesystem, bucket, key = _place(url)
    answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    async with answer["Body"] as body:
        return Versioned(await body.read(), answer["ETag"])


def _place(url: str) -> tuple[Any, str, str]:
    filesystem, path = storage.filesystem_of(url)
    bucket, key, _ = filesystem.split_path(path)  # type: ignore[attr-defined]
    return filesystem, bucket, key
