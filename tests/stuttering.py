"""A proxy before an object store that fails every fifth request, in four ways in turn."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

FAULTS = ("cut", "refused", "dropped", "unanswered")
"""Half of an answer, one that is an error, none without the request having been heard, and none though it was."""


class Stuttering(BaseHTTPRequestHandler):
    """Passes requests on to a server; every `every`-th one meets a fault, of all kinds in turn."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str]
    every: ClassVar[int] = 5
    numbers: ClassVar[Iterator[int]]
    kinds: ClassVar[dict[str, Iterator[str]]]
    """Of requests whose answers can be cut, and of others."""
    faults: ClassVar[dict[str, int]]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kinds = self.kinds["GET" if self.command == "GET" else "others"]
        fault = next(kinds) if next(self.numbers) % self.every == 0 else ""
        self.faults[fault] = self.faults.get(fault, 0) + 1
        if fault == "refused":
            self.reply(500, {}, b"<Error><Code>InternalError</Code></Error>")
        elif fault != "dropped":
            answer = self.passed_on(body)
            if fault != "unanswered":
                self.reply(*answer, half=fault == "cut")
        self.close_connection = self.close_connection or bool(fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def passed_on(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()

    def reply(self, status: int, headers: Mapping[str, str], payload: bytes, *, half: bool = False) -> None:
        self.send_response_only(status)
        length = {"Content-Length": str(len(payload))}
        hop = ("connection", "transfer-encoding")
        for name, value in (length | dict(headers)).items():
            if name.lower() not in hop:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload[: len(payload) // 2] if half else payload)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stuttering(upstream: str) -> Iterator[tuple[str, Mapping[str, int]]]:
    """The address of such a proxy before the server at `upstream`, and how often each fault was met; "" is none."""
    Stuttering.upstream, Stuttering.faults = upstream.removeprefix("http://"), {}
    Stuttering.numbers = itertools.count(1)
    Stuttering.kinds = {"GET": itertools.cycle(FAULTS), "others": itertools.cycle(FAULTS[1:])}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stuttering)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Stuttering.faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
