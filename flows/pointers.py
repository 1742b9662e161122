"""The named pointers of a root: `latest`, the run that ended last, and `production`, the one that serves, with every move of it."""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator

from data import storage
from data.config import Config
from data.errors import CorruptArtifact

LATEST = "latest"
PRODUCTION = "production.json"


class Move(Config):
    """One change of the pointer `production`."""

    run: str
    at: str
    """UTC, ISO 8601."""
    replaced: str | None
    """What served before it: where a rollback goes."""
    reason: str
    is_rollback: bool = False


class Pointer(Config):
    """Every change, the oldest first; the last one names the run that serves."""

    moves: tuple[Move, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _goes_back_to_what_served(self) -> Pointer:
        standing = 0
        for move in self.moves:
            standing += -1 if move.is_rollback else 1
            if standing < 1:
                raise ValueError("a rollback goes back to nothing")
        return self


def history(root: str) -> tuple[Move, ...]:
    """The moves of `production` under `root`; empty where nothing was promoted. Raises CorruptArtifact for what is no pointer."""
    path = storage.join(root, PRODUCTION)
    try:
        return Pointer.model_validate_json(storage.read_bytes(path)).moves
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        raise CorruptArtifact(f"{path} cannot be read: remove it and promote a run again") from error


def move(root: str, moves: tuple[Move, ...], to: Move) -> Move:
    """Adds the move `to` to the history `moves` of `production`; returns it. Its caller holds `runs.keeping`."""
    pointer = Pointer(moves=(*moves, to))
    storage.write_bytes(storage.join(root, PRODUCTION), (pointer.model_dump_json(indent=1) + "\n").encode())
    return to


def pointed(root: str) -> dict[str, str]:
    """Pointer -> the run that it names, of `latest` and `production`, as far as they are there."""
    found = {}
    path = storage.join(root, LATEST)
    try:
        found["latest"] = storage.read_bytes(path).decode().strip()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"{path} cannot be read: remove it") from error
    if moves := history(root):
        found["production"] = moves[-1].run
    return found


def served_before(root: str) -> set[str]:
    """The run that a rollback would go back to."""
    return {move.replaced for move in history(root)[-1:] if move.replaced}
