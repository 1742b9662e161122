"""A real S3 server on this machine: moto's, one request at a time so that its conditions are atomic, as S3's are."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

_REFUSAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>no</Message></Error>"


class ObjectStore:
    """An S3 server that forgets everything at the end.

    `lag`: seconds until listings show what was written. `refuses`: (method, bucket/key) -> whether the answer is a 500; it
    may wait.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self.heal()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._turn = threading.Lock()
        self._written: dict[str, float] = {}
        self._server = make_server("127.0.0.1", 0, self._answer, True, request_handler=MotoRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def heal(self) -> None:
        """Makes it a server without faults."""
        self.lag = 0.0
        self.refuses: Callable[[str, str], bool] = lambda *_: False

    def stop(self) -> None:
        """Ends the server and waits for it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        answer: list[Any] = []
        if self.refuses(environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"]).lstrip("/")):
            start_response("500 Internal Server Error", [("Content-Length", str(len(_REFUSAL)))])
            return [_REFUSAL]

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            answer[:] = [status, headers]

        with self._turn:
            if environ["REQUEST_METHOD"] in ("PUT", "POST"):
                self._written[unquote(environ["PATH_INFO"]).lstrip("/")] = time.monotonic()
            parts = self._moto(environ, start)
            body = b"".join(parts)
        status, headers = answer
        if self.lag and "list-type=2" in environ.get("QUERY_STRING", ""):
            body = self._as_seen_earlier(body.decode(), unquote(environ["PATH_INFO"]).strip("/")).encode()
            headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return [body]

    def _as_seen_earlier(self, listing: str, bucket: str) -> str:
        settled = [k for k, at in self._written.items() if time.monotonic() - at > self.lag]

        def kept(found: re.Match[str]) -> str:
            name = f"{bucket}/{unquote(found[2])}"
            seen = name in settled if found[1] == "Contents" else any(k.startswith(name) for k in settled)
            return found[0] if seen else ""

        pattern = r"<(Contents|CommonPrefixes)>\s*<(?:Key|Prefix)>([^<]*)</(?:Key|Prefix)>.*?</\1>"
        return re.sub(pattern, kept, listing, flags=re.DOTALL)
