"""Channel: a frozen requests Session that can be aborted from another thread.

Closing a Session does not interrupt a request in flight; `Channel.abort` does, by shutting down its
sockets, so that a closing client does not wait for its long polls.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
import weakref
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Iterator, Mapping, Optional, Tuple, Type

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.response import HTTPResponse

from tinkex._transport.request import Body, Reply
from tinkex._transport.response_reading import SMALL_BODY, CheckedResponse, Pace, decompress
from tinkex.config import Config
from tinkex.wire.codec import Parts

_URLLIB3_DECODES_ZSTD = "zstd" in HTTPResponse.CONTENT_DECODERS

# Detects a dead peer after about a minute, although the responses to long polls may take longer.
_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
]
SOCKET_OPTIONS = [*HTTPConnection.default_socket_options, *_KEEPALIVE]


class _Sockets:
    """The open sockets of one channel.

    Sockets rather than connections: a connection forgets its socket once the server has announced
    that it will close, even while the rest of the response is still being read.
    """

    def __init__(self) -> None:
        # Guards the set and the flag: another thread calls `abort`.
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._aborted = False
        # The pace of the response that each thread waits for; a response without a pace is not
        # limited.  Kept per thread, because requests and urllib3 pass no argument of ours down to
        # the response.
        self._local = threading.local()

    @property
    def pace(self) -> Optional[Pace]:
        """How fast the response that this thread waits for must arrive."""
        return getattr(self._local, "pace", None)

    @pace.setter
    def pace(self, pace: Optional[Pace]) -> None:
        self._local.pace = pace

    def response(self, sock: Any, *args: Any, **kwargs: Any) -> CheckedResponse:
        """Make the response to read from *sock*; takes the place of http.client's class."""
        return CheckedResponse(sock, *args, pace=self.pace, **kwargs)

    def add(self, sock: Any) -> None:
        """Add a new socket; shut it down if the channel was aborted while it was being opened."""
        while not isinstance(sock, socket.socket):  # TLS inside TLS, through an https proxy
            sock = sock.socket
        with self._lock:
            self._open.add(sock)
            aborted = self._aborted
        if aborted:
            shut_down(sock)

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            sockets = list(self._open)
        for sock in sockets:
            shut_down(sock)


def shut_down(sock: socket.socket) -> None:
    """End reads and writes on *sock* in other threads; the thread that uses it closes it."""
    # Closing it here would not wake a reading thread, and would free the descriptor: the next
    # socket of the process might get it while that thread still reads from it.
    with contextlib.suppress(OSError):  # already disconnected
        # Call the plain socket's method: SSLSocket's own would pull the TLS state from under the
        # reading thread.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _Tracked(HTTPConnection):
    """A connection that adds its socket to *sockets*; mixed into each of urllib3's classes."""

    def __init__(self, *args: Any, sockets: _Sockets, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sockets = sockets
        self.response_class = sockets.response  # type: ignore[assignment]  # any callable

    def connect(self) -> None:
        super().connect()
        self._sockets.add(self.sock)


def _tracked_pool(
    pool_class: Type[HTTPConnectionPool], sockets: _Sockets, *args: Any, **kwargs: Any
) -> HTTPConnectionPool:
    """Make a pool whose connections add their sockets to *sockets*."""
    pool = pool_class(*args, **kwargs)
    connection_class = _tracked_class(pool_class.ConnectionCls)
    pool.ConnectionCls = functools.partial(connection_class, sockets=sockets)  # type: ignore[assignment]
    return pool


@functools.cache  # a class is a reference cycle: make one per kind, not per pool
def _tracked_class(connection_class: Any) -> Any:
    return type(f"_Tracked{connection_class.__name__}", (_Tracked, connection_class), {})


class _TrackedAdapter(HTTPAdapter):
    """An adapter whose connections add their sockets to *sockets*."""

    def __init__(self, sockets: _Sockets, pool_size: int) -> None:
        self._sockets = sockets
        self._tracked: weakref.WeakSet[urllib3.PoolManager] = weakref.WeakSet()
        super().__init__(pool_connections=2, pool_maxsize=pool_size, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, socket_options=SOCKET_OPTIONS, **kwargs)
        self._track(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.PoolManager:
        manager: urllib3.PoolManager = super().proxy_manager_for(*args, **kwargs)
        if manager not in self._tracked:  # requests calls this for each request
            self._tracked.add(manager)
            self._track(manager)
        return manager

    def _track(self, manager: urllib3.PoolManager) -> None:
        # Wrap the manager's own classes: a SOCKS proxy's classes connect through the proxy.
        manager.pool_classes_by_scheme = {
            scheme: functools.partial(_tracked_pool, pool_class, self._sockets)  # type: ignore[misc]
            for scheme, pool_class in manager.pool_classes_by_scheme.items()
        }


class _Session(requests.Session):
    """A session that follows no redirect."""

    def resolve_redirects(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # Even with allow_redirects=False, requests parses the target, and a malformed one raises
        # errors of many kinds.
        return iter(())


class Channel:
    """One connection pool to the server.  Thread-safe; keeps *pool_size* connections.

    More threads than that also work, at the cost of a new connection for each request.

    Attributes:
        stopped: set once no further request may begin.  `abort` sets it; the owner may set it, too,
            to let the request in flight finish.
    """

    def __init__(self, config: Config, pool_size: int) -> None:
        self.stopped = threading.Event()
        self._sockets = _Sockets()
        # requests does not promise that threads can share a Session, so this one never changes
        # after it was built: no cookies, no redirects.  Nor does it read the environment, which
        # costs 320 microseconds per request; `config` has already read the proxy and the
        # certificates from it.
        session = _Session()
        session.trust_env = False
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        session.headers.clear()
        if config.proxy:
            session.proxies = {"http": config.proxy, "https": config.proxy}
        if config.ca_bundle:
            session.verify = config.ca_bundle
        adapter = _TrackedAdapter(self._sockets, pool_size)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        self._session = session
        # urllib3 before 2.0 leaves the sockets of an abandoned pool to the garbage collector.
        weakref.finalize(self, session.close)

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: Body,
        timeout: Tuple[float, float],
    ) -> Reply:
        """Send once and read the response to its end.  Raises what requests raises.  Blocks.

        *timeout* bounds connecting, and each pause in the response, in seconds; the second also
        bounds a response as a whole (see Pace).
        """
        began = time.perf_counter()
        # requests would send an iterable in chunks, which not every server reads.
        data = bytes(body) if isinstance(body, Parts) else body
        self._sockets.pace = Pace(timeout[1], starts_now=len(data or b"") <= SMALL_BODY)
        try:
            response = self._session.request(
                method,
                url,
                headers=dict(headers),
                data=data,
                timeout=timeout,
                allow_redirects=False,
            )
        finally:
            self._sockets.pace = None
        took_s = time.perf_counter() - began
        _check_length(response)
        lowered = {name.lower(): value for name, value in response.headers.items()}
        content: bytes = response.content  # requests has undone gzip and deflate
        if lowered.get("content-encoding", "").lower() == "zstd" and not _URLLIB3_DECODES_ZSTD:
            content = decompress("zstd", content)
        read_s = max(0.0, took_s - response.elapsed.total_seconds())  # elapsed ends at the headers
        return Reply(response.status_code, lowered, content, read_s)

    @contextlib.contextmanager
    def stream(
        self, url: str, *, headers: Mapping[str, str], timeout: Tuple[float, float]
    ) -> Iterator[requests.Response]:
        """GET once and yield the response with its body unread, for the caller to read.

        The read timeout bounds each pause in the body.  Raises what requests raises.  Blocks.
        """
        response = self._session.get(
            url, headers=dict(headers), timeout=timeout, allow_redirects=False, stream=True
        )
        try:
            yield response
        finally:
            response.close()

    def close(self) -> None:
        """Close idle connections."""
        self._session.close()

    def close_if_idle(self) -> None:
        """Close idle connections; connections in use are kept."""
        self.close()

    def abort(self) -> None:
        """Abort every request in flight, and every later one, and close."""
        self.stopped.set()
        self._sockets.abort()
        self._session.close()


def _check_length(response: requests.Response) -> None:
    """Raise for a truncated response, which urllib3 before 2.0 takes for complete."""
    announced = response.headers.get("Content-Length", "")
    received = response.raw.tell()
    if announced.isdigit() and received < int(announced):
        raise requests.exceptions.ChunkedEncodingError(
            f"the connection was closed after {received} of {announced} bytes of the response"
        )
