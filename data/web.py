"""Originals from the web: many at once, handed over in order, each attempt bounded in bytes and in seconds.

    urls ──▶ read-ahead ──▶ schedule ──▶ `concurrency` threads ──▶ connections ──▶ guarded network

A job is one URL, a step of it one request. After a redirect or before another attempt the job goes back to the schedule,
where it holds neither a thread nor its host's slot. The guarded network alone opens connections: it resolves a name once,
checks the addresses and connects to one of those, so that a name cannot mean another machine a moment later.

Proxies of the environment are not used, since behind one the check would be void; `SSL_CERT_FILE` is heeded. Nobody's
robots.txt is read: what a server says of a picture (`X-Robots-Tag`) comes with the picture.
"""

from __future__ import annotations

import base64
import functools
import itertools
import os
import queue
import random
import re
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpcore
import httpx
from pydantic import Field

from data.bodies import network_errors, read_body
from data.config import Config, operational
from data.connections import GuardedNetwork, IdleConnections, Origin, Resolver, resolve
from data.errors import SampleError
from data.schedule import Job, ReadAhead, Schedule

RETRYABLE_REASONS = frozenset(
    {"timeout", "connection_failed", "incomplete_body", "malformed_response", "dns_unavailable"}
    | {f"http_{status}" for status in (408, 425, 429, *range(500, 600))}
)
"""What another attempt may mend. A malformed answer is among them: it may be the unread end of the connection's last."""

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of X-Robots-Tag that keep a picture out; `none` means noindex and nofollow."""

MAX_WAIT_SECONDS = 30.0
"""The longest pause before another attempt, whatever Retry-After asks for."""

_UNFINISHED_PER_THREAD = 8
_KEEP_ALIVE_SECONDS = 5.0

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


class FetchRules(Config):
    """How pictures are asked for. The limits hold for one `WebFetcher`, hence for one process."""

    concurrency: int = operational(32, ge=1, le=1024, description="requests at once")
    per_host: int = operational(8, ge=1, description="requests at once to one host, of each worker")
    connect_timeout: float = operational(10.0, gt=0, description="seconds to resolve a name and connect")
    read_timeout: float = operational(10.0, gt=0, description="seconds without a byte from the server")
    total_timeout: float = operational(60.0, gt=0, description="seconds for one attempt with its redirects")
    attempts: int = operational(
        3, ge=1, description="how often a URL is tried; only passing faults are tried again"
    )
    backoff_seconds: float = operational(
        0.5, ge=0, description="the n-th pause is drawn between 0 and 2^(n-1) times this"
    )
    max_redirects: int = Field(default=5, ge=0, description="redirects that are followed")
    user_agent: str = operational(
        "darkroom/0.1 (image-text data set preparation)",
        pattern=r"^[!-~]([ -~]*[!-~])?$",
        description="how we present ourselves; its first word is the name that X-Robots-Tag may address",
    )
    honour_opt_out: bool = Field(
        default=True,
        description="leave out pictures whose X-Robots-Tag says noai, noimageai, noindex, noimageindex",
    )
    allow_private: bool = operational(
        False, description="also connect to addresses that the public Internet cannot reach"
    )


def is_retryable(reason: str) -> bool:
    """Whether another attempt may succeed where one failed for `reason`."""
    return reason in RETRYABLE_REASONS


def opted_out(tags: Iterable[str], agent: str) -> bool:
    """Whether X-Robots-Tag values `tags` keep a picture out for `agent`.

    A directive holds for everybody, or for the agents that the last `NAME:` before it in the same value names.
    """
    heeded = {"*", "darkroom", agent.lower()}
    for tag in tags:
        scope = "*"
        for item in tag.lower().split(","):
            name, colon, rest = item.strip().partition(":")
            if colon and name not in _VALUED_DIRECTIVES and re.fullmatch(r"[\w*.-]+", name):
                scope, item = name, rest
            if scope in heeded and item.strip() in OPT_OUT_DIRECTIVES:
                return True
    return False


class WebFetcher:
    """Fetches URLs within `rules`; a context manager, to be used by any number of threads.

    Leaving the block cuts off what is still under way; whoever waits for it gets a RuntimeError.
    """

    def __init__(self, rules: FetchRules | None = None, resolver: Resolver = resolve) -> None:
        self._rules = rules or FetchRules()
        self._agent = re.split(r"[/ ]", self._rules.user_agent)[0]
        self._network = GuardedNetwork(
            resolver,
            connect_timeout=self._rules.connect_timeout,
            read_timeout=self._rules.read_timeout,
            allow_private=self._rules.allow_private,
        )
        self._idle = IdleConnections(self._rules.concurrency)
        self._tls = _trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        self._schedule = Schedule(self._rules.per_host)
        self._orders = itertools.count()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> WebFetcher:
        for number in range(self._rules.concurrency):
            thread = threading.Thread(target=self._work, daemon=True, name=f"darkroom-web-{number}")
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._schedule.close():
            job.finish(_closed())
        self._network.abort()
        for thread in self._threads:
            thread.join()
        self._idle.close()

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """The body behind `url`, at most `max_bytes` of it.

        Raises SampleError: `invalid_url`, `dns_failed` (no such name), `dns_unavailable`, `private_address`,
        `connection_failed`, `tls_failed`, `timeout`, `malformed_response`, `http_404` and the like, `invalid_redirect`,
        `too_many_redirects`, `opted_out` (filtered), `unsupported_encoding`, `incomplete_body` or `too_many_bytes`.
        OSError when this machine has no file or memory left for a connection.
        """
        (outcome,) = self.fetch_all([url], max_bytes)
        if isinstance(outcome, SampleError):
            raise outcome
        return outcome

    def fetch_all(self, urls: Iterable[str], max_bytes: int) -> Iterator[bytes | SampleError]:
        """What `fetch` returns or raises as SampleError for each of `urls`, in their order; fetches ahead meanwhile."""
        ahead = ReadAhead(_UNFINISHED_PER_THREAD * self._rules.concurrency)
        remaining = iter(urls)
        try:
            while True:
                while ahead.has_room() and (url := next(remaining, None)) is not None:
                    ahead.add(self._submit(url, max_bytes, ahead.finished))
                if not ahead.jobs:
                    return
                ahead.collect(wait=ahead.jobs[0].outcome is None)
                if ahead.jobs[0].outcome is not None:
                    yield ahead.take()
        finally:
            ahead.abandon()

    def _submit(self, url: str, max_bytes: int, finished: queue.SimpleQueue[Job]) -> Job:
        job = Job(max_bytes, next(self._orders), finished, self._rules.total_timeout)
        try:
            job.url = job.at = _web_url(url, "invalid_url")
        except SampleError as error:
            job.finish(error)
        else:
            self._put(job)
        return job

    def _put(self, job: Job, delay: float = 0.0) -> None:
        if not self._schedule.put(job, delay):
            job.finish(_closed())

    def _work(self) -> None:
        while (job := self._schedule.take()) is not None:
            host = job.at.host
            try:
                if not job.abandoned:
                    self._advance(job)
            except Exception as error:
                job.finish(error)
            finally:
                self._schedule.release(host)

    def _advance(self, job: Job) -> None:
        """One request of `job`, after which it is finished or in the schedule again."""
        started = time.monotonic()
        try:
            with self._network.until(started + job.seconds_left):
                body = self._ask(job)
        except SampleError as error:
            self._retry_or_give_up(job, error)
        else:
            if body is None:
                job.seconds_left -= time.monotonic() - started
                self._put(job)
            else:
                job.finish(body)

    def _retry_or_give_up(self, job: Job, error: SampleError) -> None:
        if self._schedule.closed:
            job.finish(_closed())
        elif not is_retryable(error.reason) or job.attempt >= self._rules.attempts:
            job.finish(error)
        else:
            pause = random.uniform(0.0, self._rules.backoff_seconds * 2.0 ** (job.attempt - 1))
            asked = error.retry_after if isinstance(error, _BadStatus) else 0.0
            job.restart(self._rules.total_timeout)
            self._put(job, min(asked + pause, MAX_WAIT_SECONDS))

    def _ask(self, job: Job) -> bytes | None:
        """The body; None when the answer was a redirect, to which `job` now points."""
        origin, request = _origin(job.at), self._request(job)
        connection = self._idle.take(origin) or httpcore.HTTPConnection(
            request.url.origin, self._tls, _KEEP_ALIVE_SECONDS, network_backend=self._network
        )
        try:
            with network_errors("connection_failed"):
                response = connection.handle_request(request)
            try:
                return self._judge(job, response)
            finally:
                response.close()
        finally:
            self._idle.give_back(origin, connection)

    def _judge(self, job: Job, response: httpcore.Response) -> bytes | None:
        headers = httpx.Headers(response.headers)
        if response.status in _REDIRECTS and "location" in headers:
            self._follow(job, headers["location"])
            return None
        if response.status not in (200, 203):
            raise _BadStatus(response.status, headers.get("retry-after", ""))
        if self._rules.honour_opt_out and opted_out(headers.get_list("x-robots-tag"), self._agent):
            raise SampleError("opted_out", "its server asks to leave this picture out", filtered=True)
        return read_body(response, headers, job.max_bytes)

    def _request(self, job: Job) -> httpcore.Request:
        url = job.at
        headers = [
            (b"Host", url.netloc),
            (b"User-Agent", self._rules.user_agent.encode()),
            (b"Accept", b"*/*"),
            (b"Accept-Encoding", b"identity"),
        ]
        if job.url.userinfo and _origin(url) == _origin(job.url):
            credentials = f"{job.url.username}:{job.url.password}".encode()
            headers.append((b"Authorization", b"Basic " + base64.b64encode(credentials)))
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        return httpcore.Request("GET", target, headers=headers)

    def _follow(self, job: Job, location: str) -> None:
        if job.hops >= self._rules.max_redirects:
            raise SampleError("too_many_redirects", f"more than {self._rules.max_redirects} redirects")
        job.hops += 1
        job.at = _web_url(location, "invalid_redirect", base=job.at)


class _BadStatus(SampleError):
    """An answer without a picture; `retry_after` are the seconds that it asks to wait."""

    def __init__(self, status: int, retry_after: str) -> None:
        super().__init__(f"http_{status}", f"the server answered {status}")
        self.retry_after = _wait_seconds(retry_after)


def _web_url(text: str, reason: str, base: httpx.URL | None = None) -> httpx.URL:
    """The absolute http or https URL that `text` is, seen from `base`; SampleError `reason`, without the text, if none."""
    try:
        url = base.join(text) if base is not None else httpx.URL(text.strip())
        if url.scheme in ("http", "https") and url.host and 0 < (url.port or 80) < 65536:
            return url
    except (httpx.InvalidURL, ValueError):
        raise SampleError(reason, "there is no valid URL") from None
    raise SampleError(reason, "only http and https URLs with a host are fetched")


def _origin(url: httpx.URL) -> Origin:
    return url.scheme, url.host, url.port


@functools.cache
def _trust(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    """Whom TLS trusts; read once for each value of the variables that httpx looks at, since it takes a while."""
    return httpx.create_ssl_context()


def _wait_seconds(retry_after: str) -> float:
    """Retry-After in seconds, 0 to `MAX_WAIT_SECONDS`; it is a number or a date."""
    if retry_after.strip().isdecimal():
        return min(float(retry_after), MAX_WAIT_SECONDS)
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return 0.0
    seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, min(seconds, MAX_WAIT_SECONDS))


def _closed() -> RuntimeError:
    return RuntimeError("the fetcher was closed")
