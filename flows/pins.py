"""Which commit of the hub a root's artifacts are made with: noted where a name is first used, and kept for every later run.

A name stands for whatever the hub has today. So that shards of one column, and runs of one root, never mix two states of an
encoder, the root holds each name to its first commit. Another one is asked for by name, `OWNER/NAME@REVISION`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from data import conditional, storage
from data.errors import UserError
from stages.contract import InputRef
from training.encoders import commit_of


def pinned(root: str, ref: InputRef) -> InputRef:
    """`ref` at the commit that `root` holds it to; itself where it is a folder, or a name that was never used here."""
    if not _is_name(ref):
        return ref
    held = conditional.read(_note(root, ref))
    return _at(ref, _commit(held.payload, _note(root, ref))) if held else ref


def hold(root: str, ref: InputRef) -> InputRef:
    """As `pinned`, and from now on `root` holds the name to the commit that it stands for; what is missing is downloaded.

    Raises UserError when it cannot be downloaded.
    """
    if _is_name(ref) and pinned(root, ref) == ref:
        note = {"name": ref.folder, "commit": commit_of(ref.stage, ref.folder)}
        conditional.create(_note(root, ref), (json.dumps(note) + "\n").encode())
    return pinned(root, ref)  # of two who begin at once, the first one's


def _is_name(ref: InputRef) -> bool:
    return ref.external and "://" not in ref.folder and not Path(ref.folder).expanduser().is_dir()


def _note(root: str, ref: InputRef) -> str:
    name = re.sub(r"[^\w.@-]", "+", ref.folder)  # no name of the hub has a plus sign, so no two share a note
    return storage.join(root, "store", "hub", f"{ref.stage}.{name}.json")


def _commit(payload: bytes, url: str) -> str:
    try:
        commit = json.loads(payload)["commit"]
        if re.fullmatch(r"[0-9a-f]{7,64}", commit):
            return commit
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{url} names no commit: remove it, and the next run notes what the hub has then")


def _at(ref: InputRef, commit: str) -> InputRef:
    folder = f"{ref.folder.partition('@')[0]}@{commit}"
    return ref.model_copy(update={"folder": folder})
