"""Connections to hosts of the public Internet alone, within a deadline, and kept to be used again."""

from __future__ import annotations

import errno
import ipaddress
import queue
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import httpcore

from data.errors import SampleError

_PERMANENT_DNS = {socket.EAI_NONAME, socket.EAI_FAIL, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

Resolver = Callable[[str, int], Sequence[str]]
"""(host, port) -> its addresses, the preferred one first; raises `socket.gaierror`."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet; an IPv6 address that carries an IPv4 one counts as that."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    carried = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return is_public(str(carried)) if carried else ip in _GLOBAL_UNICAST and ip.is_global


def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host` in the order in which the system prefers them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


Origin = tuple[str, str, int | None]


class IdleConnections:
    """Connections to use again, at most `limit`. httpcore's own pool looks at each of them twice per request."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[httpcore.HTTPConnection]] = {}
        self._count = 0

    def take(self, origin: Origin) -> httpcore.HTTPConnection | None:
        """A connection to `origin` that the server still holds open; None when there is none."""
        while (connection := self._pop(origin)) is not None:
            if not connection.has_expired():
                return connection
            connection.close()
        return None

    def give_back(self, origin: Origin, connection: httpcore.HTTPConnection) -> None:
        """Keeps `connection` if it can be used again; closes it, or the one given back longest ago, if not."""
        if not connection.is_available():
            connection.close()
            return
        with self._lock:
            self._idle[origin] = [*self._idle.pop(origin, []), connection]
            self._count += 1
        if self._count > self._limit and (oldest := self._pop(None)) is not None:
            oldest.close()

    def close(self) -> None:
        """Closes every idle connection."""
        while (connection := self._pop(None)) is not None:
            connection.close()

    def _pop(self, origin: Origin | None) -> httpcore.HTTPConnection | None:
        """The newest connection to `origin`, or the first of the origin given back to longest ago."""
        with self._lock:
            key = next(iter(self._idle), None) if origin is None else origin
            if key is None or key not in self._idle:
                return None
            connection = self._idle[key].pop(0 if origin is None else -1)
            if not self._idle[key]:
                del self._idle[key]
            self._count -= 1
            return connection


class GuardedNetwork(httpcore.NetworkBackend):
    """Resolves, checks and connects; every socket is read and written against this thread's deadline."""

    def __init__(
        self, resolver: Resolver, *, connect_timeout: float, read_timeout: float, allow_private: bool
    ) -> None:
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self._allow_private = allow_private
        self._resolver = resolver
        self._tcp = httpcore.SyncBackend()
        self._attempt = threading.local()
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[_TimedStream] = weakref.WeakSet()

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Bounds all that this thread does on the network in the block; `deadline` is a `time.monotonic()`."""
        self._attempt.deadline = deadline
        try:
            yield
        finally:
            del self._attempt.deadline

    def left(self, limit: float) -> float:
        """Seconds that the present attempt has, at most `limit`; SampleError `timeout` when it has none."""
        seconds = min(limit, self._attempt.deadline - time.monotonic())
        if seconds <= 0:
            raise SampleError("timeout", "the attempt took too long as a whole")
        return seconds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first address of `host` that is allowed and accepts one."""
        deadline = time.monotonic() + self.left(timeout or self.connect_timeout)
        addresses = _lookup(self._resolver, host, port, deadline)
        allowed = [a for a in addresses if self._allow_private or is_public(a)]
        if addresses and not allowed:
            raise SampleError("private_address", "the name leads to an address that is not public")
        for number, address in enumerate(allowed):
            share = (deadline - time.monotonic()) / (len(allowed) - number)
            try:
                return self.watch(
                    self._tcp.connect_tcp(address, port, max(share, 1e-3), local_address, socket_options)
                )
            except httpcore.ConnectTimeout:
                continue
            except httpcore.ConnectError as error:
                cause = _cause(error)
                if cause.errno in _EXHAUSTED:
                    raise cause from error
        if time.monotonic() >= deadline:
            raise SampleError("timeout", "no connection was made in time")
        raise SampleError("connection_failed", "the host accepts no connection")

    def watch(self, stream: httpcore.NetworkStream) -> _TimedStream:
        """`stream` under this thread's deadline, and within reach of `abort`."""
        timed = _TimedStream(stream, self)
        with self._lock:
            self._streams.add(timed)
        return timed

    def abort(self) -> None:
        """Wakes every thread that waits for a server, by ending its connection."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            sock = stream.get_extra_info("socket")
            assert isinstance(sock, socket.socket)
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _TimedStream(httpcore.NetworkStream):
    """A connection that waits no longer than the rules and the present attempt's deadline allow."""

    def __init__(self, inner: httpcore.NetworkStream, network: GuardedNetwork) -> None:
        self._inner = inner
        self._network = network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._network.left(timeout or self._network.read_timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._network.left(timeout or self._network.read_timeout))

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> object:
        return self._inner.get_extra_info(info)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            seconds = self._network.left(timeout or self._network.connect_timeout)
            return self._network.watch(self._inner.start_tls(ssl_context, server_hostname, seconds))
        except httpcore.ConnectError as error:
            cause = _cause(error)
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
                raise SampleError(
                    "tls_failed", f"no secure connection: {cause.reason or 'refused'}"
                ) from error
            raise
        except SampleError:
            self.close()
            raise


def _lookup(resolver: Resolver, host: str, port: int, deadline: float) -> Sequence[str]:
    """The system's resolver knows no time limit; hence a thread of its own, left behind when it is late."""
    answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(resolver(host, port))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True, name="darkroom-dns").start()
    try:
        answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty as error:
        raise SampleError("dns_unavailable", "the name servers do not answer in time") from error
    if isinstance(answer, Exception):
        raise _lookup_error(answer) from answer
    return answer


def _lookup_error(error: Exception) -> Exception:
    if isinstance(error, UnicodeError | OverflowError):
        return SampleError("invalid_url", "the host name is not valid")
    if not isinstance(error, socket.gaierror):
        return error
    if error.errno in _PERMANENT_DNS:
        return SampleError("dns_failed", "there is no host of this name")
    return SampleError("dns_unavailable", "the name servers cannot tell the host's address at present")


def _cause(error: httpcore.ConnectError) -> OSError:
    """The operating system's error that httpcore's stands for."""
    return next((item for item in error.args if isinstance(item, OSError)), OSError())
