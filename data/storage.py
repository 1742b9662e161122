"""Bytes on any fsspec URL. Publishing is atomic: readers see the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import BinaryIO

import fsspec

CHUNK = 1 << 20
_TEMPORARY = ".tmp-"


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine (bare or `file://`)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local `url`. Asserts that it is local."""
    assert is_local(url), f"{url} is not on this machine"
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """`url` extended by relative parts. Raises ValueError when a part would leave it."""
    for part in parts:
        if part.startswith("/") or ".." in part.split("/"):
            raise ValueError(f"{part!r} leaves {url}: only relative paths without '..' are allowed")
    scheme, mark, path = url.rpartition("://")
    return scheme + mark + "/".join([path.rstrip("/"), *parts])


def read_bytes(url: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    if is_local(url):
        return local_path(url).read_bytes()
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.cat_file(path)


def write_bytes(url: str, payload: bytes) -> None:
    """Publishes `payload` at `url` in one step and durably; parent folders are made."""
    if not is_local(url):
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.pipe_file(path, payload)
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def publish_file(source: Path, url: str) -> None:
    """Moves the finished local file `source` to `url` in one step."""
    if not is_local(url):
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.put_file(str(source), path)
        source.unlink()
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.parent != target.parent:
        temporary = _temporary_beside(target)
        shutil.move(source, temporary)  # a copy where the file systems differ: hence the sync after it
        source = temporary
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    source.replace(target)
    _sync_folder(target.parent)


def exists(url: str) -> bool:
    """Whether a file or folder lies at `url`."""
    if is_local(url):
        return local_path(url).exists()
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.exists(path)


def list_files(url: str) -> list[str]:
    """Names of the files directly under the folder `url`, sorted; empty where there is no folder.

    What a killed writer left unpublished is not among them.
    """
    if is_local(url):
        folder = local_path(url)
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        return sorted(name for name in names if not name.startswith(_TEMPORARY))
    filesystem, path = fsspec.core.url_to_fs(url)
    if not filesystem.isdir(path):
        return []
    return sorted(
        i["name"].rsplit("/", 1)[-1] for i in filesystem.ls(path, detail=True) if i["type"] == "file"
    )


def list_folders(url: str) -> list[str]:
    """Names of the folders directly under the folder `url`, sorted; empty where there is none."""
    if is_local(url):
        folder = local_path(url)
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    filesystem, path = fsspec.core.url_to_fs(url)
    if not filesystem.isdir(path):
        return []
    infos = filesystem.ls(path, detail=True)
    return sorted(i["name"].rstrip("/").rsplit("/", 1)[-1] for i in infos if i["type"] == "directory")


def remove(url: str) -> None:
    """Deletes one file; nothing happens where there is none."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    filesystem, path = fsspec.core.url_to_fs(url)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)


def open_read(url: str) -> BinaryIO:
    """A seekable binary stream."""
    return fsspec.open(url, "rb").open()  # type: ignore[return-value]


def sha256(url: str) -> tuple[int, str]:
    """(bytes, hex SHA-256) of the file at `url`, read in chunks."""
    digest, size = hashlib.sha256(), 0
    with open_read(url) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f"{_TEMPORARY}{secrets.token_hex(6)}-{target.name}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
