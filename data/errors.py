"""What callers may catch.

    DarkroomError
    ├── UserError            the user's input is wrong; one sentence says what to do      exit code 2
    │   └── UnknownPath      a `--set` path that no config has
    ├── SampleError          one sample cannot be used; counted by `reason`, never fatal alone
    ├── ShardMismatch        two columns that should describe the same samples do not
    ├── CorruptArtifact      bytes on disk differ from their recorded digest
    ├── LeaseHeld            another run builds the same artifact for longer than this one waits
    └── StageFailed          a stage ended without a snapshot
        └── GateFailed       an evaluation does not meet a stated condition; its report is written, nothing is promoted

`UserError` is a `ValueError`, so that library callers need not know this tree.
"""

from __future__ import annotations

import errno

NO_PLACE_TO_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
"""`OSError.errno`s of a full or forbidden destination: no second attempt helps, the user has to make room."""


def no_place(error: OSError, where: str) -> str:
    """What to tell of an error in NO_PLACE_TO_WRITE: the file that it names, or `where`, and what to do."""
    trouble = (error.strerror or str(error)).lower()
    return f"{error.filename or where}: {trouble}; mend that and run the same command again, finished work is kept"


class DarkroomError(Exception):
    """Root of every error that Darkroom raises on purpose."""


class UserError(DarkroomError, ValueError):
    """Input that only the user can mend: says what was given, what is allowed, what to do."""


class UnknownPath(UserError):
    """A `--set` path that names no field of the recipe."""


class SampleError(DarkroomError):
    """One sample that cannot be used.

    `reason` is a short snake_case word that the ledger counts (`truncated`, `too_many_pixels`, `empty_caption` …);
    `filtered` tells a deliberate rejection from a failure.
    """

    def __init__(self, reason: str, message: str, *, filtered: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.filtered = filtered

    def __reduce__(self) -> tuple:
        return _rebuild_sample_error, (self.reason, str(self), self.filtered)


def _rebuild_sample_error(reason: str, message: str, filtered: bool) -> SampleError:
    return SampleError(reason, message, filtered=filtered)


class ShardMismatch(DarkroomError):
    """Two columns that should be row-aligned are not: names both files and what differs."""


class CorruptArtifact(DarkroomError):
    """A file whose bytes no longer match what its manifest recorded."""


class LeaseHeld(DarkroomError):
    """Another live run has been building the same artifact for longer than this one was told to wait."""


class StageFailed(DarkroomError):
    """A stage that ended without publishing a snapshot; rerunning the same command resumes it."""


class GateFailed(StageFailed):
    """An evaluation that does not meet a gate of its recipe: its report is written, its run is not made the latest."""
