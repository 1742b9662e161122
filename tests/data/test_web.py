"""Pictures come from the web in order and within limits; what goes wrong is named, and tried again only if that may help."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import connections, schedule, web
from data.config import fingerprint
from data.connections import is_public
from data.errors import SampleError
from data.schedule import Job
from data.web import FetchRules, WebFetcher, is_retryable, opted_out

PICTURE = bytes(range(256)) * 4
LIMIT = 10_000


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Web

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")[0]
        earlier = self.server.count(path, dict(self.headers))
        with suppress(BrokenPipeError, ConnectionResetError):
            self.server.answers.get(path, _missing)(self, earlier)

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


Answer = Callable[[_Handler, int], None]
"""Answers a request; the number tells how often its path was asked for before."""


class Web(ThreadingHTTPServer):
    """A web server on loopback whose paths behave as `answers` says; it counts what it is asked."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, answers: dict[str, Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.asked: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self.most: Counter[str] = Counter()
        self.closing = threading.Event()
        self.ended = threading.Event()
        """Set as soon as the server has closed a connection."""
        self._now: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, path: str, headers: dict[str, str]) -> int:
        """Counts a request; returns how many there were before for its path."""
        with self._lock:
            self.asked[path] += 1
            self.headers[path] = headers
            return self.asked[path] - 1

    @contextmanager
    def present(self, *names: str) -> Iterator[None]:
        """Notes how many requests are in such a block at once, for each of `names`."""
        with self._lock:
            self._now.update(names)
            self.most |= self._now
        try:
            yield
        finally:
            with self._lock:
                self._now.subtract(names)

    def handle_error(self, *_: Any) -> None:
        assert isinstance(sys.exception(), OSError), "clients may vanish; our own mistakes are to be seen"

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.ended.set()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.server_port}/{path}"


def _missing(handler: _Handler, _: int) -> None:
    handler.reply(404, b"nothing here")


def _picture(handler: _Handler, _: int) -> None:
    handler.reply(200, PICTURE)


def _to(location: str, status: int = 302) -> Answer:
    return lambda handler, _: handler.reply(status, Location=location)


def _stall(handler: _Handler, _: int) -> None:
    handler.server.closing.wait(5)


def _drip(handler: _Handler, _: int) -> None:
    handler.reply(200, length=1000)
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"x")


def _drip_headers(handler: _Handler, _: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"X: y\r\n")


def _cut_off(handler: _Handler, earlier: int) -> None:
    handler.reply(200, PICTURE[:100] if earlier == 0 else PICTURE, length=len(PICTURE))
    handler.close_connection = True


def _hang_up(handler: _Handler, earlier: int) -> None:
    if earlier:
        return handler.reply(200, PICTURE)
    handler.close_connection = True
    return None


def _understated(handler: _Handler, _: int) -> None:
    handler.reply(200, PICTURE, length=100)


def _endless(handler: _Handler, _: int) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while not handler.server.closing.is_set():
        handler.wfile.write(b"x" * 1000)


def _chunked(handler: _Handler, _: int) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"400\r\n" + PICTURE + b"\r\n0\r\n\r\n")


def _compressed(body: bytes) -> Answer:
    return lambda handler, _: handler.reply(200, body, Content_Encoding="gzip")


def _raw(answer: bytes) -> Answer:
    def send(handler: _Handler, _: int) -> None:
        handler.wfile.write(answer)
        handler.close_connection = True

    return send


@pytest.fixture
def server() -> Iterator[Web]:
    yield from _running(Web({"picture": _picture}))


def _running(server: Web) -> Iterator[Web]:
    serving = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    serving.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        serving.join()


def _rules(**changes: object) -> FetchRules:
    quick = {"allow_private": True, "backoff_seconds": 0.001, "concurrency": 4, "connect_timeout": 2.0}
    return FetchRules.model_validate(quick | {"read_timeout": 5.0, "total_timeout": 10.0} | changes)


def _loopback(_host: str, _port: int) -> list[str]:
    return ["127.0.0.1"]


def _fetch(url: str, limit: int = LIMIT, resolver: web.Resolver = _loopback, **rules: object) -> bytes:
    with WebFetcher(_rules(**rules), resolver) as fetcher:
        return fetcher.fetch(url, limit)


def _reason(url: str, limit: int = LIMIT, resolver: web.Resolver = _loopback, **rules: object) -> str:
    with pytest.raises(SampleError) as caught:
        _fetch(url, limit, resolver, **rules)
    assert "secret" not in str(caught.value)
    return caught.value.reason


# --- what comes back ------------------------------------------------------------------------------------------------


def test_the_body_comes_back_as_it_is(server: Web) -> None:
    server.answers |= {
        "page": lambda h, _: h.reply(200, b"<html>", Content_Type="text/html"),
        "chunked": _chunked,
    }
    server.answers["empty"] = lambda handler, _: handler.reply(200)
    assert _fetch(server.url("picture"), limit=len(PICTURE)) == PICTURE
    assert _fetch(server.url("chunked")) == PICTURE
    assert _fetch(server.url("page")) == b"<html>", "what is a picture is told by its bytes, elsewhere"
    assert _fetch(server.url("empty")) == b""


def test_we_say_who_we_are_and_ask_for_plain_bytes(server: Web) -> None:
    _fetch(server.url("picture"), user_agent="studio/2 (mail@example.org)")
    assert server.headers["picture"]["User-Agent"] == "studio/2 (mail@example.org)"
    assert server.headers["picture"]["Accept-Encoding"] == "identity"
    assert server.headers["picture"]["Host"] == f"127.0.0.1:{server.server_port}"


def test_urls_need_not_be_ascii_or_trimmed(server: Web) -> None:
    assert _fetch(f" {server.url('picture/kätzchen 1.jpg?a=b c#top')}\n") == PICTURE
    assert _fetch(server.url("picture", host="bücher.example")) == PICTURE
    assert server.headers["picture"]["Host"].startswith("xn--bcher-kva.example")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "picture.jpg",
        "//example.com/a.jpg",
        "ftp://example.com/a.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http://",
        "http://me:secret@/a.jpg",
        "http://me:secret@example.com:port/",
        "http://me:secret@example.com:99999/",
        "http://[::1/",
        "http://0177.0.0.1/",
        "http://example.com/\r\nX: y",
        "http://.example.com/",
        f"http://{'a' * 70}.example.com/",
        "http://\udcff.example.com/",
        "http://example.com/" + "a" * 70_000,
    ],
)
def test_what_is_no_web_address_is_an_invalid_url(url: str) -> None:
    assert _reason(url, resolver=web.resolve) == "invalid_url"


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_body_beyond_the_limit_is_cut_off(server: Web) -> None:
    server.answers |= {"endless": _endless, "chunked": _chunked}
    for path in ("picture", "chunked", "endless"):
        assert _reason(server.url(path), limit=len(PICTURE) - 1) == "too_many_bytes"
    assert server.asked == {"picture": 1, "chunked": 1, "endless": 1}


def test_what_is_announced_as_too_large_is_not_waited_for(server: Web) -> None:
    def announce(handler: _Handler, _: int) -> None:
        handler.reply(200, length=10**12)
        handler.server.closing.wait(20)

    server.answers["huge"] = announce
    assert _reason(server.url("huge"), read_timeout=30.0, total_timeout=30.0) == "too_many_bytes"


def test_a_compressed_body_is_inflated_no_further_than_the_limit(server: Web) -> None:
    server.answers["gzip"] = _compressed(gzip.compress(PICTURE))
    server.answers["bomb"] = _compressed(gzip.compress(bytes(30_000_000)))
    server.answers["cut"] = _compressed(gzip.compress(os.urandom(1000))[:-200])
    server.answers["garbage"] = _compressed(PICTURE)
    server.answers["brotli"] = lambda handler, _: handler.reply(200, PICTURE, Content_Encoding="br")
    assert _fetch(server.url("gzip"), limit=len(PICTURE)) == PICTURE
    assert _reason(server.url("gzip"), limit=len(PICTURE) - 1) == "too_many_bytes"
    tracemalloc.start()
    assert _reason(server.url("bomb"), limit=1_000_000) == "too_many_bytes"
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    assert _reason(server.url("cut"), attempts=1) == "incomplete_body"
    assert _reason(server.url("garbage"), attempts=1) == "malformed_response"
    assert _reason(server.url("brotli")) == "unsupported_encoding"


@pytest.mark.parametrize("path", ["stall", "drip", "drip_headers"])
def test_a_slow_server_gets_no_more_than_the_total_time(server: Web, path: str) -> None:
    server.answers |= {"stall": _stall, "drip": _drip, "drip_headers": _drip_headers}
    started = time.monotonic()
    assert _reason(server.url(path), total_timeout=0.2, read_timeout=5.0, attempts=1) == "timeout"
    assert 0.2 <= time.monotonic() - started < 4.0


def test_a_silent_server_is_given_up_after_the_read_timeout(server: Web) -> None:
    server.answers["stall"] = _stall
    assert _reason(server.url("stall"), read_timeout=0.1, attempts=2) == "timeout"
    _until(lambda: server.asked["stall"] == 2)


def test_the_total_time_includes_redirects(server: Web) -> None:
    def slow_redirect(handler: _Handler, _: int) -> None:
        handler.server.closing.wait(0.1)
        handler.reply(302, Location="/slow")

    server.answers["slow"] = slow_redirect
    assert _reason(server.url("slow"), total_timeout=0.25, attempts=1) == "timeout"
    assert 1 <= server.asked["slow"] <= 3


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_body_shorter_than_promised_is_asked_for_again(server: Web) -> None:
    server.answers["cut"] = _cut_off
    assert _reason(server.url("cut"), attempts=1) == "incomplete_body"
    server.asked.clear()
    assert _fetch(server.url("cut")) == PICTURE and server.asked["cut"] == 2


def test_a_body_longer_than_promised_does_not_leak_into_the_next_answer(server: Web) -> None:
    server.answers["understated"] = _understated
    with WebFetcher(_rules(concurrency=1)) as fetcher:
        assert fetcher.fetch(server.url("understated"), LIMIT) == PICTURE[:100]
        assert fetcher.fetch(server.url("picture"), LIMIT) == PICTURE


def test_a_connection_that_ends_without_an_answer_is_made_again(server: Web) -> None:
    server.answers["hang_up"] = _hang_up
    assert _reason(server.url("hang_up"), attempts=1) == "connection_failed"
    server.asked.clear()
    assert _fetch(server.url("hang_up")) == PICTURE and server.asked["hang_up"] == 2


def test_where_nobody_listens_the_connection_fails() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        assert _reason(url) == "connection_failed"


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example.com ESMTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nbroken header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
def test_an_answer_that_is_not_http_is_named_so(server: Web, answer: bytes) -> None:
    server.answers["raw"] = _raw(answer)
    assert _reason(server.url("raw")) == "malformed_response"


def test_only_passing_faults_are_tried_again(server: Web) -> None:
    server.answers |= {
        f"s{code}": lambda h, _, code=code: h.reply(code) for code in (204, 206, 403, 410, 500)
    }
    server.answers["s503"] = lambda handler, earlier: handler.reply(503 if earlier < 2 else 200, PICTURE)
    for code in (204, 206, 403, 410):
        assert _reason(server.url(f"s{code}")) == f"http_{code}" and server.asked[f"s{code}"] == 1
    assert _reason(server.url("nothing")) == "http_404" and server.asked["nothing"] == 1
    assert _reason(server.url("s500"), attempts=4) == "http_500" and server.asked["s500"] == 4
    assert _fetch(server.url("s503"), attempts=3) == PICTURE and server.asked["s503"] == 3


def test_the_reasons_that_may_pass() -> None:
    assert all(map(is_retryable, ("timeout", "connection_failed", "incomplete_body", "dns_unavailable")))
    assert all(map(is_retryable, ("http_408", "http_425", "http_429", "http_500", "http_503", "http_599")))
    lasting = (
        "http_404",
        "http_403",
        "private_address",
        "invalid_url",
        "tls_failed",
        "opted_out",
        "dns_failed",
    )
    assert not any(map(is_retryable, lasting))


class _Pauses(WebFetcher):
    """A fetcher that notes how long each job was told to wait, and lets it wait no longer than a millisecond."""

    def __init__(self, rules: FetchRules) -> None:
        super().__init__(rules, _loopback)
        self.noted: dict[str, list[float]] = {}

    def _put(self, job: Job, delay: float = 0.0) -> None:
        self.noted.setdefault(job.url.path, []).append(delay)
        super()._put(job, min(delay, 0.001))


def test_pauses_double_are_drawn_at_random_and_end_at_half_a_minute(server: Web) -> None:
    server.answers["busy"] = lambda handler, _: handler.reply(503)
    urls = [server.url(f"busy/{number}") for number in range(24)]
    with _Pauses(_rules(attempts=8, backoff_seconds=0.5)) as fetcher:
        outcomes = list(fetcher.fetch_all(urls, LIMIT))
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, SampleError)} == {"http_503"}
    assert server.asked["busy"] == 8 * len(urls)
    first, *pauses = np.array(list(fetcher.noted.values())).T
    assert len(pauses) == 7 and not first.any(), "nothing is waited for before the first attempt"
    for number, drawn in enumerate(pauses):
        longest = min(0.5 * 2**number, web.MAX_WAIT_SECONDS)
        assert drawn.max() <= longest and drawn.min() >= 0
        assert drawn.max() > 0.6 * longest and drawn.min() < 0.4 * longest, "spread over the whole of it"
        assert len({*drawn}) == len(drawn) or longest == web.MAX_WAIT_SECONDS


def test_what_asks_to_wait_is_waited_for_with_jitter_on_top(server: Web) -> None:
    server.answers["busy"] = lambda handler, _: handler.reply(429, Retry_After="7")
    with _Pauses(_rules(attempts=2, backoff_seconds=0.5)) as fetcher:
        list(fetcher.fetch_all([server.url(f"busy/{number}") for number in range(8)], LIMIT))
    pauses = [drawn for _, drawn in fetcher.noted.values()]
    assert all(7 <= pause <= 7.5 for pause in pauses) and len({*pauses}) == len(pauses)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_what_will_not_pass_is_not_paused_for(server: Web, status: int) -> None:
    server.answers["gone"] = lambda handler, _: handler.reply(status)
    with _Pauses(_rules(attempts=9)) as fetcher, pytest.raises(SampleError, match=str(status)):
        fetcher.fetch(server.url("gone"), LIMIT)
    assert fetcher.noted == {"/gone": [0.0]} and server.asked["gone"] == 1


def test_a_server_may_say_when_to_come_back(server: Web) -> None:
    server.answers["busy"] = lambda h, earlier: h.reply(200 if earlier else 429, PICTURE, Retry_After="1")
    started = time.monotonic()
    assert _fetch(server.url("busy")) == PICTURE
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("", 0),
        ("7", 7),
        ("100000", 30),
        ("9" * 5000, 30),
        ("-5", 0),
        ("nan", 0),
        ("soon", 0),
        ("Wed, 99 Zzz 9999 99:99:99 GMT", 0),
        (formatdate(0, usegmt=True), 0),
        (formatdate(4e9, usegmt=True), 30),
    ],
)
def test_the_wait_is_a_number_or_a_date_and_never_long(value: str, seconds: float) -> None:
    assert web._wait_seconds(value) == seconds


def test_a_waiting_job_holds_up_nobody(server: Web) -> None:
    server.answers["busy"] = lambda handler, _: handler.reply(429, Retry_After="30")
    with WebFetcher(_rules(concurrency=1, per_host=1)) as fetcher:
        arriving = fetcher.fetch_all(
            [server.url("picture"), server.url("busy"), server.url("picture/2")], LIMIT
        )
        assert next(arriving) == PICTURE
        assert fetcher.fetch(server.url("picture/3"), LIMIT) == PICTURE
        assert server.asked == {"picture": 3, "busy": 1}


# --- redirects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Web, status: int) -> None:
    server.answers |= {"old": _to("/older?x=1", status), "older": _to(server.url("picture"), status)}
    assert _fetch(server.url("old"), max_redirects=2) == PICTURE
    assert _reason(server.url("old"), max_redirects=1) == "too_many_redirects"


def test_a_circle_of_redirects_ends(server: Web) -> None:
    server.answers["loop"] = _to("/loop")
    assert _reason(server.url("loop"), max_redirects=5) == "too_many_redirects"
    assert server.asked["loop"] == 6


def test_another_attempt_begins_where_the_first_did(server: Web) -> None:
    server.answers["start"] = _to("/end")
    server.answers["end"] = lambda handler, earlier: handler.reply(200 if earlier else 503, PICTURE)
    assert _fetch(server.url("start"), max_redirects=1) == PICTURE
    assert server.asked == {"start": 2, "end": 2}


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://example.com/", "javascript:1", "http://a:b:c/"]
)
def test_redirects_lead_to_web_addresses_alone(server: Web, location: str) -> None:
    server.answers["away"] = _to(location)
    assert _reason(server.url("away")) == "invalid_redirect"


def test_a_redirect_without_a_target_is_an_answer_like_another(server: Web) -> None:
    server.answers["nowhere"] = lambda handler, _: handler.reply(302)
    assert _reason(server.url("nowhere")) == "http_302"


def test_credentials_of_a_url_go_to_its_own_origin_alone(server: Web) -> None:
    server.answers |= {"same": _to("/picture/1"), "other": _to(server.url("picture", host="other.example"))}
    own = f"http://me:s%40cret@pictures.example:{server.server_port}"
    _fetch(f"{own}/same")
    assert server.headers["picture"]["Authorization"] == "Basic bWU6c0BjcmV0"
    _fetch(f"{own}/other")
    assert server.headers["other"]["Authorization"] == "Basic bWU6c0BjcmV0"
    assert "Authorization" not in server.headers["picture"]


# --- opting out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tags",
    [
        ["noai"],
        ["NoImageAI"],
        ["nofollow, noindex"],
        ["none"],
        ["darkroom: noai"],
        ["*: noimageindex"],
        ["otherbot: nofollow, darkroom: noai"],
        ["nofollow", "noai"],
        ["max-snippet: 3, noindex"],
        ["unavailable_after: Wednesday, 25-Jun-10 15:00:00 PST, noai"],
        ["Studio: noindex"],
    ],
)
def test_a_picture_is_left_out_when_its_server_asks(tags: list[str]) -> None:
    assert opted_out(tags, "studio")


@pytest.mark.parametrize(
    "tags",
    [
        [],
        [""],
        ["all"],
        ["nofollow"],
        ["otherbot: noindex, noai"],
        ["max-image-preview: none"],
        ["unavailable_after: 25 Jun 2010 15:00:00 PST"],
        ["darkroom: all, otherbot: noai"],
        ["noaim"],
    ],
)
def test_a_picture_stays_when_nobody_asks_us_to_leave_it_out(tags: list[str]) -> None:
    assert not opted_out(tags, "studio")


def test_opting_out_is_a_filter_and_can_be_switched_off(server: Web) -> None:
    server.answers["tagged"] = lambda handler, _: handler.reply(200, PICTURE, X_Robots_Tag="noai")
    with WebFetcher(_rules()) as fetcher:
        (outcome,) = fetcher.fetch_all([server.url("tagged")], LIMIT)
    assert isinstance(outcome, SampleError) and (outcome.reason, outcome.filtered) == ("opted_out", True)
    assert pickle.loads(pickle.dumps(outcome)).reason == "opted_out"
    assert server.asked["tagged"] == 1
    assert _fetch(server.url("tagged"), honour_opt_out=False) == PICTURE


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "255.255.255.255",
    "224.0.0.1", "239.1.1.1", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1%lo", "fc00::1", "ff02::1",
    "fec0::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1",
    "2002:7f00:1::", "2002:a00:1::1", "2001::1", "::127.0.0.1", "100::1"],
)  # fmt: skip
def test_addresses_that_the_internet_cannot_reach_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f000001", "2130706433", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]"]
)  # fmt: skip
def test_no_spelling_of_loopback_is_connected_to(server: Web, host: str) -> None:
    url = server.url("picture", host=host)
    assert _reason(url, resolver=web.resolve, allow_private=False) == "private_address"
    assert not server.asked


def test_a_public_name_with_a_private_address_is_not_connected_to(server: Web) -> None:
    url = server.url("picture", host="pictures.example")
    assert _reason(url, allow_private=False) == "private_address"
    assert not server.asked
    assert _fetch(url, allow_private=True) == PICTURE


def test_a_name_is_resolved_once_per_connection_and_that_address_is_used(server: Web) -> None:
    asked: list[str] = []

    def rebinding(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    assert _fetch(server.url("picture", host="pictures.example"), resolver=rebinding) == PICTURE
    assert asked == ["pictures.example"]


def test_a_redirect_to_a_private_address_is_not_followed(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["away"] = _to(f"http://10.0.0.1:{server.server_port}/picture")
    monkeypatch.setattr(connections, "is_public", lambda address: address == "127.0.0.1")

    def resolver(host: str, _port: int) -> list[str]:
        return ["127.0.0.1"] if host == "public.example" else [host]

    url = server.url("away", host="public.example")
    assert _reason(url, resolver=resolver, allow_private=False) == "private_address"
    assert server.asked == {"away": 1}


def test_the_next_address_of_a_host_is_tried_when_one_is_dead(server: Web) -> None:
    def both(_host: str, _port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]

    assert _fetch(server.url("picture", host="two.example"), resolver=both) == PICTURE


def test_a_name_that_does_not_exist_is_told_from_a_name_server_that_is_out() -> None:
    asked: list[int] = []

    def failing(code: int) -> web.Resolver:
        def resolver(_host: str, _port: int) -> list[str]:
            asked.append(code)
            raise socket.gaierror(code, "no")

        return resolver

    assert _reason("http://a.example/", resolver=failing(socket.EAI_NONAME)) == "dns_failed"
    assert _reason("http://a.example/", resolver=failing(socket.EAI_AGAIN)) == "dns_unavailable"
    assert asked == [socket.EAI_NONAME] + [socket.EAI_AGAIN] * 3


def test_a_name_server_that_never_answers_is_not_waited_for() -> None:
    over = threading.Event()

    def resolver(_host: str, _port: int) -> list[str]:
        over.wait(5)
        return ["127.0.0.1"]

    started = time.monotonic()
    assert (
        _reason("http://a.example/", resolver=resolver, connect_timeout=0.1, attempts=1) == "dns_unavailable"
    )
    assert time.monotonic() - started < 4.0
    over.set()


def test_proxies_of_the_environment_are_not_used(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    assert _fetch(server.url("picture")) == PICTURE


# --- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure_server(tmp_path: Path) -> Iterator[Web]:
    """https for pictures.example; `tmp_path / "cert.pem"` is what vouches for it."""
    names = ["-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example"]
    line = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        *names,
    ]
    subprocess.run([*line, "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, check=True, capture_output=True)  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = Web({"picture": _picture})
    server.socket = context.wrap_socket(server.socket, server_side=True)
    yield from _running(server)


def test_the_certificate_is_checked_for_the_host_of_the_url(
    secure_server: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = secure_server.url("picture", "pictures.example", "https")
    assert _reason(url) == "tls_failed"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert _fetch(url) == PICTURE
    assert _reason(secure_server.url("picture", "other.example", "https")) == "tls_failed"
    assert secure_server.asked == {"picture": 1}


def test_a_server_without_tls_is_told_from_one_that_vanished(server: Web) -> None:
    assert _reason(server.url("picture", scheme="https")) == "tls_failed"


# --- many at once ---------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_urls(server: Web) -> None:
    def uneven(handler: _Handler, _: int) -> None:
        number = int(handler.path.rsplit("/")[-1])
        handler.server.closing.wait(0.02 * (number % 3))
        handler.reply(404 if number % 7 == 3 else 200, b"%d" % number)

    server.answers["uneven"] = uneven
    urls = (server.url(f"uneven/{n}") if n != 5 else "nonsense" for n in range(40))
    with WebFetcher(_rules()) as fetcher:
        outcomes = list(fetcher.fetch_all(urls, LIMIT))
        assert list(fetcher.fetch_all([], LIMIT)) == []
    told = [str(o.reason) if isinstance(o, SampleError) else int(o) for o in outcomes]
    expected = ["http_404" if n % 7 == 3 else n for n in range(40)]
    assert told == [*expected[:5], "invalid_url", *expected[6:]]


def test_no_more_requests_run_at_once_than_the_rules_allow(server: Web) -> None:
    def slow(handler: _Handler, _: int) -> None:
        with handler.server.present(handler.headers["Host"].split(":")[0], "all hosts"):
            handler.server.closing.wait(0.03)
        handler.reply(200)

    server.answers["slow"] = slow
    hosts = ["one.example"] * 12 + ["two.example"] * 12 + ["three.example"] * 12
    with WebFetcher(_rules(concurrency=5, per_host=2), _loopback) as fetcher:
        list(fetcher.fetch_all([server.url("slow", host=host) for host in hosts], LIMIT))
    assert max(server.most[host] for host in hosts) == 2 < server.most["all hosts"] <= 5


def test_a_slow_host_holds_up_only_the_order(server: Web) -> None:
    slow_may_go_on = threading.Event()
    outcomes: list[bytes | SampleError] = []

    def slow(handler: _Handler, _: int) -> None:
        slow_may_go_on.wait(20)
        handler.reply(200, b"slow")

    server.answers["slow"] = slow
    urls = [server.url("slow", host="slow.example")] * 6 + [server.url("picture", host="quick.example")] * 20
    with WebFetcher(
        _rules(concurrency=3, per_host=2, read_timeout=30, total_timeout=30), _loopback
    ) as fetcher:
        arriving = fetcher.fetch_all(urls, LIMIT)
        consumer = threading.Thread(target=lambda: outcomes.extend(arriving))
        consumer.start()
        _until(lambda: server.asked["picture"] == 20)
        slow_may_go_on.set()
        consumer.join()
    assert outcomes == [b"slow"] * 6 + [PICTURE] * 20
    assert server.asked["slow"] == 6, "none of them ran into its time limit"


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_no_more_is_fetched_ahead_than_memory_is_meant_for(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "READ_AHEAD_BYTES", 10 * len(PICTURE))
    monkeypatch.setattr(schedule, "_FIRST_GUESS_BYTES", len(PICTURE))
    with WebFetcher(_rules()) as fetcher:
        arriving = fetcher.fetch_all((server.url("picture") for _ in range(100)), LIMIT)
        assert next(arriving) == PICTURE
        _until(lambda: not fetcher._schedule._busy)
        assert server.asked["picture"] <= 12
        assert sum(1 for _ in arriving) == 99


def test_connections_are_used_again(server: Web) -> None:
    lookups: list[str] = []

    def resolver(host: str, _port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1"]

    with WebFetcher(_rules(concurrency=3), resolver) as fetcher:
        list(fetcher.fetch_all([server.url("picture", host="a.example")] * 50, LIMIT))
    assert len(lookups) <= 3 and server.asked["picture"] == 50


def test_a_connection_that_the_server_has_closed_costs_no_attempt(server: Web) -> None:
    def close_after(handler: _Handler, _: int) -> None:
        handler.reply(200, PICTURE)
        handler.close_connection = True

    server.answers["once"] = close_after
    with WebFetcher(_rules(attempts=1)) as fetcher:
        fetcher.fetch(server.url("once"), LIMIT)
        assert server.ended.wait(20)
        assert fetcher.fetch(server.url("once"), LIMIT) == PICTURE


def test_no_more_connections_are_kept_than_requests_run_at_once(server: Web) -> None:
    lookups: list[str] = []

    def resolver(host: str, _port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1"]

    with WebFetcher(_rules(concurrency=2), resolver) as fetcher:
        for host in ("a.example", "b.example", "a.example", "c.example", "a.example", "b.example"):
            fetcher.fetch(server.url("picture", host=host), LIMIT)
    assert lookups == ["a.example", "b.example", "c.example", "b.example"], "the longest unused one is closed"


def test_a_fault_of_this_machine_is_not_a_fault_of_the_picture() -> None:
    def broken(_host: str, _port: int) -> list[str]:
        raise OSError(24, "too many open files")

    with pytest.raises(OSError, match="too many open files"):
        _fetch("http://a.example/", resolver=broken)


def test_leaving_the_block_cuts_off_what_is_under_way(server: Web) -> None:
    server.answers |= {"stall": _stall, "busy": lambda handler, _: handler.reply(503, Retry_After="30")}
    failures: list[BaseException] = []

    def wait_for(url: str) -> None:
        with pytest.raises(RuntimeError, match="closed") as caught:
            fetcher.fetch(url, LIMIT)
        failures.append(caught.value)

    started = time.monotonic()
    with WebFetcher(_rules(read_timeout=30, total_timeout=30)) as fetcher:
        waiting = [threading.Thread(target=wait_for, args=(server.url(path),)) for path in ("stall", "busy")]
        for thread in waiting:
            thread.start()
        _until(lambda: server.asked.total() == 2)
    for thread in waiting:
        thread.join()
    assert len(failures) == 2 and time.monotonic() - started < 10
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.fetch(server.url("picture"), LIMIT)


def test_how_hard_we_try_is_no_part_of_a_result() -> None:
    assert fingerprint(FetchRules()) == fingerprint(FetchRules(concurrency=1, attempts=9, allow_private=True))
    assert fingerprint(FetchRules()) != fingerprint(FetchRules(honour_opt_out=False))
