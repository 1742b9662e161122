"""Bytes on any fsspec URL. Publishing is atomic: readers see the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec

CHUNK = 1 << 20
_TEMPORARY = ".tmp-"
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call the field of a listing that changes with the content, best first."""


class Entry(NamedTuple):
    """One file of a listing."""

    name: str
    """Path relative to the folder that was listed."""
    stamp: str | None
    """Changes when the content does: size and modification time of a local file, size and etag (or time) of a remote
    one; None where a local name leads nowhere."""


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
    filesystem, path = filesystem_of(url)
    return filesystem.cat_file(path)  # type: ignore[return-value]


def write_bytes(url: str, payload: bytes) -> None:
    """Publishes `payload` at `url` in one step and durably; parent folders are made."""
    if not is_local(url):
        filesystem, path = filesystem_of(url)
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
        filesystem, path = filesystem_of(url)
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


def copy(source: str, url: str) -> None:
    """Publishes the file at `source` at `url` too, in one step; both in one store, or both on this machine. Raises FileNotFoundError."""
    if not is_local(url):
        filesystem, path = filesystem_of(url)
        filesystem.cp_file(filesystem_of(source)[1], path)
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
    try:
        shutil.copyfile(local_path(source), temporary)
        publish_file(temporary, url)
    finally:
        temporary.unlink(missing_ok=True)


def exists(url: str) -> bool:
    """Whether a file or folder lies at `url`."""
    if is_local(url):
        return local_path(url).exists()
    filesystem, path = filesystem_of(url)
    return filesystem.exists(path)


def has_bucket(url: str) -> bool:
    """Whether the bucket of an S3 `url` is there, or may not be asked for; True for other kinds of places."""
    if not url.startswith(("s3://", "s3a://")):
        return True
    filesystem, path = filesystem_of(url)
    try:
        filesystem.call_s3("head_bucket", Bucket=path.split("/")[0])  # type: ignore[attr-defined]
    except FileNotFoundError:
        return False
    except PermissionError:
        pass
    return True


def list_files(url: str) -> list[str]:
    """Names of the files directly under the folder `url`, sorted; empty where there is no folder.

    What a killed writer left unpublished is not among them.
    """
    if is_local(url):
        folder = local_path(url)
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        return sorted(name for name in names if not name.startswith(_TEMPORARY))
    filesystem, path = filesystem_of(url)
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
    filesystem, path = filesystem_of(url)
    if not filesystem.isdir(path):
        return []
    infos = filesystem.ls(path, detail=True)
    return sorted(i["name"].rstrip("/").rsplit("/", 1)[-1] for i in infos if i["type"] == "directory")


def list_tree(url: str) -> list[Entry]:
    """Every file below the folder `url`, sorted by name, in one recursive listing; empty where there is none.

    Hidden files and folders, whose names start with a dot, are left out; links to folders are not followed. Raises OSError
    for a folder that cannot be listed.
    """
    if is_local(url):
        return sorted(_walk(str(local_path(url)), ""))
    filesystem, path = filesystem_of(url)
    root = path.rstrip("/") + "/" if path.strip("/") else ""
    infos: Any = filesystem.find(path, detail=True)
    found = (
        (info["name"].removeprefix(root).lstrip("/"), info)
        for info in infos.values()
        if info["type"] == "file"
    )  # type: ignore[union-attr]
    return sorted(Entry(n, _stamp_of(i)) for n, i in found if n and not n.startswith(".") and "/." not in n)


def is_folder(url: str) -> bool:
    """Whether `url` is a folder, or the beginning of the names of objects in a store."""
    if is_local(url):
        return local_path(url).is_dir()
    filesystem, path = filesystem_of(url)
    return filesystem.isdir(path)


def stamp(url: str) -> str | None:
    """The `Entry.stamp` of one file; None where there is none, and where a local one cannot be looked at."""
    if is_local(url):
        try:
            facts = os.stat(url.removeprefix("file://"))  # noqa: PTH116  half the time of Path.stat, a million times
        except OSError:
            return None
        return f"{facts.st_size}-{facts.st_mtime_ns}"
    filesystem, path = filesystem_of(url)
    try:
        return _stamp_of(filesystem.info(path))
    except FileNotFoundError:
        return None


def read_range(url: str, start: int, size: int) -> bytes:
    """At most `size` bytes of the file from byte `start` on, in one request; fewer where the file ends."""
    if is_local(url):
        with local_path(url).open("rb") as file:
            file.seek(start)
            return file.read(size)
    filesystem, path = filesystem_of(url)
    try:
        return filesystem.cat_file(path, start=start, end=start + size)  # type: ignore[return-value]
    except OSError as error:
        if error.errno == errno.EINVAL and filesystem.size(path) == start:
            return b""  # object stores have no empty ranges
        raise


def remove(url: str) -> None:
    """Deletes one file; nothing happens where there is none."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    filesystem, path = filesystem_of(url)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)


def remove_tree(url: str) -> None:
    """Deletes a folder with all that it holds; nothing happens where there is none. Of a link, the link alone."""
    if is_local(url):
        path = local_path(url)
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        return
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    if filesystem.isdir(path):
        filesystem.rm(path, recursive=True)


def remove_drafts(url: str) -> None:
    """Deletes what killed writers left unpublished anywhere below the local folder `url`, which nobody else may be writing to.

    An object store has no drafts. A lease's own drafts stay: its heart beats all the time.
    """
    if is_local(url):
        for draft in local_path(url).rglob(f"{_TEMPORARY}*"):
            if draft.is_file() and "-lease" not in draft.name:
                draft.unlink(missing_ok=True)


def open_read(url: str, block_bytes: int | None = None) -> BinaryIO:
    """A seekable binary stream; one on a remote file reads ahead `block_bytes`, or as much as its file system finds best."""
    if is_local(url):
        return local_path(url).open("rb")
    filesystem, path = filesystem_of(url)
    options = {} if block_bytes is None else {"block_size": block_bytes, "cache_type": "readahead"}
    return filesystem.open(path, "rb", **options)  # type: ignore[return-value]


def sha256(url: str) -> tuple[int, str]:
    """(bytes, hex SHA-256) of the file at `url`, read in chunks."""
    digest, size = hashlib.sha256(), 0
    with open_read(url) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a remote `url` and the path in it. What it remembers of earlier listings is forgotten: other
    machines write too."""
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return filesystem, path


def _walk(folder: str, prefix: str) -> Iterator[Entry]:
    try:
        listing = os.scandir(folder)
    except FileNotFoundError:  # a folder that went while its parent was listed
        if prefix:
            return
        raise
    with listing as items:
        for item in items:
            if item.name.startswith("."):
                continue
            name = prefix + item.name
            if item.is_dir(follow_symlinks=False):
                yield from _walk(item.path, f"{name}/")
            elif not _is_folder_behind(item):
                yield Entry(name, stamp(item.path))


def _is_folder_behind(item: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder; one that leads nowhere, or to itself, is a file that cannot be read."""
    try:
        return item.is_dir()
    except OSError:
        return False


def _stamp_of(info: dict[str, Any]) -> str:
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    if isinstance(version, datetime):
        version = version.timestamp()
    return f"{info.get('size')}-{str(version).strip(chr(34))}"


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f"{_TEMPORARY}{secrets.token_hex(6)}-{target.name}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
