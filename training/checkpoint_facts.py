"""What a checkpoint says of itself, without its tensors: which training it is of, and how far that had come."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data import storage

FILE = "state.json"
LATEST = "LATEST"
"""A file beside the checkpoints with the name of the one that was written last."""


def refuse_another(candidate: Path | str, facts: dict[str, Any], identity: str) -> None:
    """Raises ValueError when the checkpoint `candidate` with these `facts` is not of `identity`."""
    if facts["identity"] != identity:
        raise ValueError(
            f"{candidate} belongs to {facts['identity']}, not to {identity}: remove it or train elsewhere"
        )


def read(candidate: Path | str) -> dict[str, Any]:
    """What `state.json` of a checkpoint says; raises ValueError or OSError when it is not whole."""
    facts = json.loads(storage.read_bytes(storage.join(str(candidate), FILE)))
    if not isinstance(facts, dict) or facts.pop("digest", None) != digest(facts):
        raise ValueError(f"{FILE} changed on disk")
    return facts


def latest(folder: str) -> str:
    """The name of the checkpoint that was last written under `folder`; empty where there is none, or no telling."""
    try:
        return storage.read_bytes(storage.join(folder, LATEST)).decode()
    except OSError:
        return ""


def payload(facts: dict[str, Any]) -> bytes:
    """What `read` reads."""
    return json.dumps({**facts, "digest": digest(facts)}).encode()


def digest(facts: dict[str, Any]) -> str:
    """Hex SHA-256 of `facts`, which `state.json` carries beside them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
