"""The body of an answer from the web, bounded while it comes, and the reasons for which there is none."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import httpcore
import httpx

from data.errors import SampleError


@contextmanager
def network_errors(vanished: str) -> Iterator[None]:
    """Names what goes wrong on the network; `vanished` is the reason when the server ends the connection too early."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise SampleError("timeout", "the server was silent for too long") from error
    except httpcore.LocalProtocolError as error:
        raise SampleError("invalid_url", "the URL cannot be asked for") from error
    except (httpcore.RemoteProtocolError, httpcore.NetworkError) as error:
        if vanished == "connection_failed" and isinstance(error, httpcore.RemoteProtocolError):
            vanished = "connection_failed" if "disconnected" in str(error) else "malformed_response"
        raise SampleError(vanished, _VANISHED[vanished]) from error


_VANISHED = {
    "connection_failed": "the server ended the connection without an answer",
    "malformed_response": "the answer is not HTTP",
    "incomplete_body": "the connection ended before the body was complete",
}


def read_body(response: httpcore.Response, headers: httpx.Headers, max_bytes: int) -> bytes:
    """The whole body, inflated where it came compressed; SampleError as soon as it is longer than `max_bytes`."""
    inflate = _inflater(headers.get("content-encoding", ""))
    if inflate is None and int(headers.get("content-length", 0)) > max_bytes:
        raise _too_many_bytes(max_bytes)
    body = bytearray()
    with network_errors("incomplete_body"):
        for chunk in response.iter_stream():
            body += _inflated(inflate, chunk, max_bytes + 1 - len(body)) if inflate else chunk
            if len(body) > max_bytes:
                raise _too_many_bytes(max_bytes)
    if inflate and not inflate.eof:
        raise SampleError("incomplete_body", "the compressed body ends too early")
    return bytes(body)


def _too_many_bytes(max_bytes: int) -> SampleError:
    return SampleError("too_many_bytes", f"the body is larger than {max_bytes} bytes")


def _inflater(encoding: str) -> zlib._Decompress | None:
    """None for a plain body. We ask for plain ones, but servers that store compressed files send them regardless."""
    if encoding.strip().lower() in ("", "identity"):
        return None
    if encoding.strip().lower() in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32)
    raise SampleError("unsupported_encoding", "the body is compressed, though it was asked for plain")


def _inflated(inflate: zlib._Decompress, chunk: bytes, limit: int) -> bytes:
    try:
        return inflate.decompress(chunk, limit)
    except zlib.error as error:
        raise SampleError("malformed_response", "the body is not compressed as its header says") from error
