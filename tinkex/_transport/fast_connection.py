"""PrivateChannel: one busy thread's HTTP/1.1 connection, with our own HTTP code.

urllib3 opens the connection (names, TLS, certificates, socket options).  We send requests and read
responses ourselves: that is most of the cost of submitting and polling thousands of samples, and
requests takes fifteen times as long.  Only what a Tinker server needs is here: complete request
bodies, responses read to their end, no proxy, no redirect, no cookie.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
import weakref
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union
from urllib.parse import urlsplit

import certifi
import requests
import urllib3.exceptions
from urllib3.connection import HTTPConnection
from urllib3.util.ssl_ import create_urllib3_context
from urllib3.util.wait import wait_for_read

from tinkex._transport.channel import SOCKET_OPTIONS, Channel, shut_down
from tinkex._transport.request import Body, Reply
from tinkex._transport.response_reading import (
    SMALL_BODY,
    Pace,
    chunk_size,
    content_length,
    decompress,
)
from tinkex.config import Config
from tinkex.wire.codec import Parts

#: Most responses fit into a buffer of this size; the rest of a longer one is read in large blocks.
#: Each waiting thread holds such a buffer, and hundreds wait: 64 KiB each would cost 400 threads 7
#: MiB of RSS.
_RECEIVE = 2048
#: The longest status line and headers of a response, in bytes.  Without a limit, a server that
#: never sends the empty line would fill the memory.
MAX_HEAD_BYTES = 65536
#: A body (or its first block) of up to this size is sent together with the headers: one packet, one
#: system call.
_JOIN_BYTES = 65536


class _Socket:
    """The open socket, kept where `abort` and the finalizer can reach it without the channel."""

    def __init__(self) -> None:
        # Guards what follows, as another thread may call `abort`.
        self.lock = threading.Lock()
        self.sock: Optional[Any] = None
        # True while a thread is in a request.  Then only that thread closes the socket: another
        # thread would free the descriptor while it is being read from.
        self.busy = False
        self.aborted = False

    def close(self) -> None:
        with self.lock:
            sock, self.sock = self.sock, None
        if sock is not None:
            sock.close()


class PrivateChannel:
    """A connection to the server of *config*, opened when needed.

    For one thread at a time; only `abort` and `close_if_idle` may be called by another.

    Attributes:
        stopped: see Channel.
    """

    def __init__(self, config: Config) -> None:
        self.stopped = threading.Event()
        base = urlsplit(config.base_url)
        self._origin = f"{base.scheme}://{base.netloc}"
        self._host_line = f"Host: {base.netloc.rpartition('@')[2]}\r\n"
        self._secure = base.scheme == "https"
        self._host = (base.hostname or "").strip("[]")
        self._port = base.port or (443 if self._secure else 80)
        self._ca_bundle = config.ca_bundle
        self._state = _Socket()
        self._received = b""
        self._pace = Pace(0.0, starts_now=False)  # of the current response
        # Not at exit, when another thread may still be reading.  The finalizer takes a lock
        # although it may run in any thread at any time: only the channel's methods take this lock,
        # and none of them is running once the channel is garbage-collected.
        weakref.finalize(self, self._state.close).atexit = False

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

        *timeout* bounds connecting, and each pause in the response, in seconds.
        """
        head = self._head(method, url, headers, body)
        self._pace = Pace(timeout[1], starts_now=len(body or b"") <= SMALL_BODY)
        with self._state.lock:
            self._state.busy = True
        try:
            sock = self._ready(timeout[0])
            sock.settimeout(timeout[1])
            self._send(sock, head, body)
            return self._read_reply(sock)
        except BaseException as error:
            # Ctrl-C, too: the rest of this response may still arrive, and the next request would
            # take it for its own.
            self.close()
            # After the handshake, even an SSL error means a broken connection, not a refused
            # certificate: another attempt may succeed.
            if isinstance(error, socket.timeout):
                raise requests.ReadTimeout(error) from error
            if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
                raise requests.ConnectionError(error) from error
            raise
        finally:
            with self._state.lock:
                self._state.busy = False
                aborted = self._state.aborted
            if aborted:  # in the meantime: `abort` leaves closing to this thread
                self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._received = b""
        self._state.close()

    def close_if_idle(self) -> None:
        """Close the connection unless a request is in flight.  Any thread may call this."""
        with self._state.lock:
            if self._state.busy:
                return
            sock, self._state.sock = self._state.sock, None
        if sock is not None:
            sock.close()

    def abort(self) -> None:
        """Abort the request in flight, and every later one.  Any thread may call this."""
        self.stopped.set()
        with self._state.lock:
            self._state.aborted = True
            sock, busy = self._state.sock, self._state.busy
        if sock is not None and not busy:
            self._state.close()
        elif sock is not None:
            shut_down(sock)

    def _head(self, method: str, url: str, headers: Mapping[str, str], body: Body) -> bytes:
        target = url[len(self._origin) :]
        if not url.startswith(self._origin) or not target.startswith("/"):
            raise requests.exceptions.InvalidURL(f"{url} is not a path at {self._origin}")
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        # A line break in a value would begin another header, or another request.  Counting line
        # breaks in all is faster than searching each value.
        if lines.count("\n") != len(headers) or " " in target or "\n" in target:
            raise requests.exceptions.InvalidHeader("a header or the path holds a line break")
        # Even an empty body is announced: some servers refuse a POST without a length (411).
        length = (
            "" if body is None and method == "GET" else f"Content-Length: {len(body or b'')}\r\n"
        )
        text = f"{method} {target} HTTP/1.1\r\n{self._host_line}{lines}{length}\r\n"
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError as error:
            raise requests.exceptions.InvalidHeader(f"not latin-1: {error}") from error

    # Opening

    def _ready(self, connect_timeout_s: float) -> Any:
        """Return the socket; open a new one if there is none or the server has closed it."""
        sock = self._state.sock
        # If there is something to read before anything was sent, it is the end of the stream (the
        # server closed an idle connection), or bytes that answer no request of ours.
        if sock is not None and not self._received and not wait_for_read(sock, timeout=0.0):
            return sock
        self.close()
        sock = self._open(connect_timeout_s)
        with self._state.lock:
            self._state.sock = sock
            aborted = self._state.aborted
        if aborted:  # while it was being opened: `abort` found no socket
            self.close()
            raise requests.ConnectionError("the connection was aborted")
        return sock

    def _open(self, timeout_s: float) -> Any:
        connection = HTTPConnection(
            self._host, self._port, timeout=timeout_s, socket_options=SOCKET_OPTIONS
        )
        try:
            connection.connect()
            return self._with_tls(connection.sock) if self._secure else connection.sock
        except BaseException as error:
            connection.close()
            raise _as_requests_raises(error) from error

    def _with_tls(self, sock: Any) -> ssl.SSLSocket:
        # Don't use urllib3's HTTPSConnection: its TLS options differ between releases.
        context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED)
        context.check_hostname = True
        context.load_verify_locations(self._ca_bundle or certifi.where())
        return context.wrap_socket(sock, server_hostname=self._host)

    # Sending

    def _send(self, sock: Any, head: bytes, body: Body) -> None:
        try:
            for block in _blocks(head, body):
                sock.sendall(block)
        except (BrokenPipeError, ConnectionResetError):
            # A server may refuse a body, e.g. with 413, and close the connection before it has read
            # it all: its response, with the reason, may already be there.
            if not wait_for_read(sock, timeout=0.0):
                raise

    # Receiving

    def _read_reply(self, sock: Any) -> Reply:
        while True:
            status, version, headers = self._read_head(sock)
            if status >= 200:
                break  # skip "100 Continue" and the like
        began = time.perf_counter()
        # HTTP/1.1 keeps a connection open by default, HTTP/1.0 only if the server says so.
        keep = headers.get("connection", "").lower()
        reusable = keep != "close" and (version == b"HTTP/1.1" or keep == "keep-alive")
        # The length of the body, by the rules of RFC 9112, section 6.3, in their order.
        if status in (204, 304):
            body = b""
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            body = self._read_chunks(sock)
        elif "content-length" in headers:
            length = headers["content-length"]
            try:
                size = content_length(length)
            except ValueError as error:
                raise _malformed(str(error)) from error
            body = self._read_exactly(sock, size)
        else:
            body, reusable = self._read_to_the_end(sock), False
        if not reusable:
            self.close()
        read_s = time.perf_counter() - began
        coding = headers.get("content-encoding")
        body = decompress(coding.lower(), body) if coding else body
        return Reply(status, headers, body, read_s)

    def _read_head(self, sock: Any) -> Tuple[int, bytes, Dict[str, str]]:
        """Read the status line and the headers; repeated headers are joined with commas."""
        end = self._received.find(b"\r\n\r\n")
        while end < 0:
            if len(self._received) > MAX_HEAD_BYTES:
                raise _malformed(f"its headers are longer than {MAX_HEAD_BYTES} bytes")
            self._receive(sock)
            end = self._received.find(b"\r\n\r\n")
        text, self._received = self._received[:end], self._received[end + 4 :]
        first, *lines = text.split(b"\r\n")
        version, _, rest = first.partition(b" ")
        code = rest[:3]
        if not version.startswith(b"HTTP/1.") or not code.isdigit():
            raise _malformed(f"it begins with {first[:80]!r}")
        headers: Dict[str, str] = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            # Refuse white space around a name: it would hide a length from other readers of the
            # same bytes (RFC 9112, section 5.1), and a folded line is not a header of its own.
            if not colon or name != name.strip():
                raise _malformed(f"one of its headers is {line[:80]!r}")
            key, value = name.lower(), value.strip()
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
        return int(code), version, headers

    def _recv(self, sock: Any, size: int) -> bytes:
        """Read up to *size* bytes; raise if the response falls behind its pace."""
        try:
            self._pace.limit_next(sock)
            data: bytes = sock.recv(size)
        except socket.timeout:
            self._pace.check_after_timeout()
            raise
        self._pace.note(len(data))
        return data

    def _receive(self, sock: Any) -> None:
        """Append the next bytes to `_received`; the end of the stream is an error here."""
        data = self._recv(sock, _RECEIVE)
        if not data:
            what = "in the middle of a response" if self._received else "without a response"
            raise _closed_early(f"the server closed the connection {what}")
        self._received += data

    def _read_exactly(self, sock: Any, length: int) -> bytes:
        """Read *length* bytes."""
        have, self._received = self._received[:length], self._received[length:]
        if len(have) == length:  # nearly always: the body came together with the headers
            return have
        parts, missing = [have], length - len(have)
        while missing:
            data = self._recv(sock, min(missing, 1 << 20))
            if not data:
                raise _closed_early(
                    f"the connection was closed after {length - missing} of {length} bytes "
                    "of the response"
                )
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _read_chunks(self, sock: Any) -> bytes:
        """Read a chunked body and its trailers (RFC 9112, section 7.1)."""
        parts: List[bytes] = []
        while True:
            try:
                size = chunk_size(self._read_line(sock).partition(b";")[0].strip())
            except ValueError as error:
                raise _malformed(str(error)) from error
            if size == 0:
                break
            parts.append(self._read_exactly(sock, size))
            if self._read_line(sock):
                raise _malformed("a chunk is longer than its size")
        while self._read_line(sock):
            pass  # trailers
        return b"".join(parts)

    def _read_line(self, sock: Any) -> bytes:
        end = self._received.find(b"\r\n")
        while end < 0:
            if len(self._received) > MAX_HEAD_BYTES:
                raise _malformed("one of its lines does not end")
            self._receive(sock)
            end = self._received.find(b"\r\n")
        line, self._received = self._received[:end], self._received[end + 2 :]
        return line

    def _read_to_the_end(self, sock: Any) -> bytes:
        parts = [self._received]
        self._received = b""
        while True:
            data = self._recv(sock, 1 << 20)
            if not data:
                return b"".join(parts)
            parts.append(data)


def _blocks(head: bytes, body: Body) -> Iterator[bytes]:
    """Yield what to send, piece by piece."""
    blocks = iter(body if isinstance(body, Parts) else (body or b"",))
    first = next(blocks, b"")
    # A larger block is sent separately: joining it with the headers would copy it.
    if len(first) <= _JOIN_BYTES:
        yield head + first
    else:
        yield head
        yield first
    yield from blocks


#: Anything that a request can be sent over.
AnyChannel = Union[Channel, PrivateChannel]


def _as_requests_raises(error: BaseException) -> BaseException:
    """Return what requests raises when urllib3's connect raises *error*."""
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # also a timeout, in urllib3
    timeouts = (urllib3.exceptions.ConnectTimeoutError, socket.timeout)
    if isinstance(error, timeouts) and not refused:
        return requests.ConnectTimeout(error)
    if isinstance(error, (urllib3.exceptions.SSLError, ssl.SSLError, ssl.CertificateError)):
        return requests.exceptions.SSLError(error)
    if isinstance(error, (urllib3.exceptions.HTTPError, OSError)):
        return requests.ConnectionError(error)
    return error


def _malformed(what: str) -> requests.RequestException:
    return requests.exceptions.ChunkedEncodingError(f"malformed HTTP response: {what}")


def _closed_early(what: str) -> requests.ConnectionError:
    return requests.ConnectionError(what)
