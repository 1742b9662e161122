"""A hub of models on this machine: folders served over the part of the hub's HTTP interface that its own client uses."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves `repositories` ("owner/name" -> folder). A repository's commit is a digest of its files, as they are now."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        """Method and path of every request."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str) -> str:
        """40 hex digits."""
        digest = hashlib.sha1()
        for name, content in self._files(repository).items():
            digest.update(name.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request: a repository's files, or one of them."""
        parts = unquote(urlsplit(handler.path).path).strip("/").split("/")
        self.asked.append(f"{handler.command} {handler.path}")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.repositories:
            self._tell(handler, "/".join(parts[2:4]), parts[4:])
        elif "/".join(parts[:2]) in self.repositories and parts[2:3] == ["resolve"]:
            content = self._files("/".join(parts[:2])).get("/".join(parts[4:]))
            self._send(handler, content, "/".join(parts[:2]))
        else:
            self._send(handler, None)

    def _tell(self, handler: BaseHTTPRequestHandler, repository: str, rest: list[str]) -> None:
        files, told = self._files(repository), None
        if rest[:1] == ["tree"]:
            told = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        elif rest[:1] != ["revision"] or rest[1] in ("main", self.commit(repository)):
            siblings = [{"rfilename": name} for name in files]
            told = {"id": repository, "sha": self.commit(repository), "siblings": siblings}
        self._send(handler, None if told is None else json.dumps(told).encode())

    def _send(
        self, handler: BaseHTTPRequestHandler, content: bytes | None, repository: str | None = None
    ) -> None:
        handler.send_response(404 if content is None else 200)
        handler.send_header("Content-Length", str(len(content or b"")))
        if content is None:
            handler.send_header("X-Error-Code", "EntryNotFound" if repository else "RepoNotFound")
        if repository:
            handler.send_header("X-Repo-Commit", self.commit(repository))
            handler.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        handler.end_headers()
        if handler.command == "GET" and content:
            handler.wfile.write(content)

    def _files(self, repository: str) -> dict[str, bytes]:
        folder = self.repositories[repository]
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
