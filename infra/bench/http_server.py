"""Pictures over HTTP/1.1 at as little CPU time as Python can: answers made beforehand, connections kept.

    python http_server.py FOLDER

Prints its port. /NUMBER.jpg is the picture NUMBER modulo their count, in the order of their names.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

_REQUEST = re.compile(rb"GET /(\d+)\.jpg HTTP/1\.[01]\r\n(?:[^\r\n]*\r\n)*\r\n")


def answers_of(folder: Path) -> list[bytes]:
    """Whole answers, headers included, of every .jpg of the folder."""
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    return [
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b" % (len(p), p)
        for p in pictures
    ]


class Connection(asyncio.Protocol):
    """One client: any number of requests, one after the other."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers, self._asked = answers, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps where to write."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answers each whole request."""
        self._asked += data
        while found := _REQUEST.match(self._asked):
            self._asked = self._asked[found.end() :]
            self._transport.write(self._answers[int(found[1]) % len(self._answers)])
            if b"connection: close" in found[0].lower():
                self._transport.close()


async def serve(folder: Path) -> None:
    """Serves until it is killed."""
    answers = answers_of(folder)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answers), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
