"""A command and all that it starts, looked at ten times a second until the last of them has ended."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAUSE, _LINGER = 0.1, 60.0


@dataclass(frozen=True)
class Seen:
    """What was last seen of a process."""

    line: str
    cpu_s: float
    peak_mib: float


def watched(line: Sequence[str], environment: Mapping[str, str]) -> tuple[float, list[Seen]]:
    """(seconds until the command ended, every process that it started, those included that outlived their parent).

    Raises SystemExit with the end of what it said where the command fails.
    """
    seen: dict[int, Seen] = {}
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        run = subprocess.Popen(line, env=environment, stdout=said, stderr=said, start_new_session=True)
        known = {run.pid}
        while run.poll() is None:
            _look(known, seen)
            time.sleep(_PAUSE)
        seconds = time.perf_counter() - started
        deadline = time.monotonic() + _LINGER
        while _look(known, seen):
            assert time.monotonic() < deadline, f"{line[:4]} left processes behind"
            time.sleep(_PAUSE)
        if run.returncode:
            said.seek(0)
            raise SystemExit(f"{line[:4]} failed:\n{said.read()[-3000:]}")
    return seconds, list(seen.values())


def _look(known: set[int], seen: dict[int, Seen]) -> int:
    """Adds new descendants to `known`, notes of each living one what it has used, and returns how many there are."""
    living = dict(_processes())
    while new := {pid for pid, fields in living.items() if int(fields[1]) in known} - known:
        known |= new
    there = known & living.keys()
    for pid in there:
        with suppress(OSError, IndexError):  # it has just ended
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            peak = int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
            seen[pid] = Seen(line, sum(map(int, living[pid][11:13])) / _TICKS, peak)
    return len(there)


def _processes() -> Iterator[tuple[int, list[str]]]:
    """pid -> the fields of its `stat` from the state on: state, parent, …; those that have ended are left out."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                yield int(entry.name), fields
