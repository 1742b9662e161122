"""The places that a command line names, as roots and artifacts: looked at first, refused in one sentence."""

from __future__ import annotations

import errno
import os

from data import storage
from data.errors import UserError


def checked_root(root: str) -> str:
    """The root as an absolute path or URL; whether it can be written is seen by what writes."""
    if not root:
        raise UserError("--root is empty: give a folder, which is made when it is missing")
    if root.startswith("memory://"):
        raise UserError(
            f"--root {root} is this process's own memory, which no worker sees: give a folder or s3://…"
        )
    if not storage.is_local(root):
        return _reachable(root.rstrip("/"))
    try:
        path = storage.local_path(root).expanduser().absolute()
        file = next((p for p in (path, *path.parents) if p.is_file()), None)
        path.resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a link to itself, too long a name, an unknown home folder
        raise UserError(
            f"--root {root} leads nowhere ({error}): give a folder, which is made when it is missing"
        ) from error
    if file is not None:
        what = "is a file" if file == path else f"lies under {file}, which is a file"
        raise UserError(f"--root {root} {what}: give a folder, which is made when it is missing")
    return os.path.normpath(path)


def readable(uri: str) -> str:
    """The place to look at; UserError when nothing can lie there."""
    try:
        is_there = bool(uri) and storage.exists(uri)
    except Exception as error:  # each kind of store has errors of its own
        raise UserError(f"{uri} cannot be looked at ({error}): check the address") from error
    if not is_there:
        raise UserError(
            f"{uri or 'an empty name'} does not exist: give a root, its store, or one artifact's folder"
        )
    return uri.rstrip("/")


def _reachable(url: str) -> str:
    try:
        is_there = storage.has_bucket(url)
        storage.exists(url)
    except Exception as error:  # each kind of store has errors of its own
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--root {url} cannot be reached ({line}): check the address and its credentials"
        ) from error
    if not is_there:
        raise UserError(f"--root {url}: there is no such bucket; make it, or check the name")
    return url


def make_folder(root: str) -> None:
    """Makes `root` where it is a local folder that is not there yet; raises UserError where it cannot be made or written."""
    if not storage.is_local(root):
        return
    try:
        storage.local_path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"--root {root} cannot be made ({reason}): give a folder that you may write to"
        ) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(f"--root {root} cannot be written: give a folder that you may write to")
