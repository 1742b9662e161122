"""Which URL is asked for next, and how far ahead of the results."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import httpx

from data.errors import SampleError

READ_AHEAD_BYTES = 256 * 2**20
"""Finished bodies that wait for their turn, together with what the unfinished ones are expected to become."""

READ_AHEAD_URLS = 8192
_FIRST_GUESS_BYTES = 2**20


@dataclass(slots=True, eq=False)
class Job:
    """One URL on its way."""

    max_bytes: int
    order: int
    finished: queue.SimpleQueue[Job]
    seconds_left: float
    url: httpx.URL = field(default_factory=httpx.URL)
    at: httpx.URL = field(default_factory=httpx.URL)
    """Where the next request goes: `url`, or what it redirected to."""
    attempt: int = 1
    hops: int = 0
    abandoned: bool = False
    outcome: bytes | Exception | None = None

    def finish(self, outcome: bytes | Exception) -> None:
        """Hands the body, or what went wrong, to whoever waits for it."""
        self.outcome = outcome
        self.finished.put(self)

    def restart(self, seconds: float) -> None:
        """Makes the next request a new attempt from the first URL on, with `seconds` of its own."""
        self.at, self.hops, self.seconds_left = self.url, 0, seconds
        self.attempt += 1


class ReadAhead:
    """The jobs of one `fetch_all` in order, no more of them than memory is meant for. Used by one thread."""

    def __init__(self, max_unfinished: int) -> None:
        self.jobs: deque[Job] = deque()
        self.finished: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._max_unfinished = max_unfinished
        self._unfinished = 0
        self._held = 0
        self._seen_jobs = 1
        self._seen_bytes = _FIRST_GUESS_BYTES

    def has_room(self) -> bool:
        """Whether one more job may be started."""
        expected = self._held + self._unfinished * self._seen_bytes / self._seen_jobs
        few = self._unfinished < self._max_unfinished and len(self.jobs) < READ_AHEAD_URLS
        return not self.jobs or (few and expected < READ_AHEAD_BYTES)

    def add(self, job: Job) -> None:
        """Takes `job` behind the others."""
        self.jobs.append(job)
        self._unfinished += 1

    def collect(self, *, wait: bool) -> None:
        """Counts what has finished since the last call, and waits for one when asked to."""
        while wait or not self.finished.empty():
            size = _size(self.finished.get())
            self._unfinished -= 1
            self._held += size
            self._seen_jobs += 1
            self._seen_bytes += size
            wait = False

    def take(self) -> bytes | SampleError:
        """The outcome of the first job, which must have finished; raises what is no fault of its URL."""
        job = self.jobs.popleft()
        self._held -= _size(job)
        if isinstance(job.outcome, bytes | SampleError):
            return job.outcome
        assert job.outcome is not None
        raise job.outcome

    def abandon(self) -> None:
        """Tells every job that nobody waits for it any more."""
        for job in self.jobs:
            job.abandoned = True


class Schedule:
    """Which job is next: the first in order that is due and whose host has fewer than `per_host` under way."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._changed = threading.Condition()
        self._ready: list[tuple[int, Job]] = []
        self._waiting: dict[str, list[tuple[int, Job]]] = {}
        self._delayed: list[tuple[float, int, Job]] = []
        self._busy: dict[str, int] = {}
        self.closed = False

    def put(self, job: Job, delay: float) -> bool:
        """Takes `job` in, to run in `delay` seconds or later; False when closed."""
        with self._changed:
            if self.closed:
                return False
            if delay > 0:
                heapq.heappush(self._delayed, (time.monotonic() + delay, job.order, job))
            else:
                self._admit(job)
            self._changed.notify()
            return True

    def take(self) -> Job | None:
        """Waits for the next job; its host's slot is taken until `release`. None when closed."""
        with self._changed:
            while not self.closed:
                now = time.monotonic()
                while self._delayed and self._delayed[0][0] <= now:
                    self._admit(heapq.heappop(self._delayed)[-1])
                if self._ready:
                    job = heapq.heappop(self._ready)[-1]
                    if self._ready or self._delayed:
                        self._changed.notify()
                    return job
                self._changed.wait(self._delayed[0][0] - now if self._delayed else None)
            return None

    def release(self, host: str) -> None:
        """Gives the slot of a job's host to the next one that waits for it."""
        with self._changed:
            waiting = self._waiting.get(host)
            if waiting:
                heapq.heappush(self._ready, heapq.heappop(waiting))
                self._changed.notify()
                return
            self._waiting.pop(host, None)
            self._busy[host] -= 1
            if not self._busy[host]:
                del self._busy[host]

    def close(self) -> list[Job]:
        """Ends every `take`; returns the jobs that nobody has taken."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
            queued = [*self._ready, *itertools.chain(*self._waiting.values())]
            return [job for _, job in queued] + [job for *_, job in self._delayed]

    def _admit(self, job: Job) -> None:
        host = job.at.host
        if self._busy.get(host, 0) < self._per_host:
            self._busy[host] = self._busy.get(host, 0) + 1
            heapq.heappush(self._ready, (job.order, job))
        else:
            heapq.heappush(self._waiting.setdefault(host, []), (job.order, job))


def _size(job: Job) -> int:
    return len(job.outcome) if isinstance(job.outcome, bytes) else 0
