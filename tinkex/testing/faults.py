"""Faults to inject into a `FakeServer`.

Pass any of them to `FakeServer.inject`.  A fault of your own is any function of an `Exchange` that
returns a `Reply`, or None to close the connection without a response.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Mapping, Optional, Tuple, Union

from tinkex.testing.exchange import Exchange, Reply

#: A limit, because a body in thousands of pieces would take minutes to trickle.
_MOST_PIECES = 20


@dataclasses.dataclass(frozen=True)
class Latency:
    """Respond as usual, *seconds* later."""

    seconds: float

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        exchange.wait(self.seconds)
        return exchange.work()


@dataclasses.dataclass(frozen=True)
class Hold:
    """Respond only after `Injection.release`; do the work after the wait, or before it."""

    after_work: bool = False

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        reply = exchange.work() if self.after_work else None
        exchange.wait()
        return reply or exchange.work()


@dataclasses.dataclass(frozen=True)
class LoseResponse:
    """Do the work but never respond: the client waits until it times out."""

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        exchange.work()
        exchange.wait()  # until the injection is released, or the server stops
        return None


@dataclasses.dataclass(frozen=True)
class Status:
    """Respond with *code* instead of doing the work, or after it.

    Args:
        body: a mapping is sent as JSON, a string as HTML, bytes without a content type; by default
            it is JSON with a ``detail``.
        retry_after: the header ``Retry-After``, in seconds or as a date.
        after_work: do the work first, as when a gateway loses the server's response.
    """

    code: int
    body: Union[Mapping[str, Any], str, bytes, None] = None
    retry_after: Union[float, str, None] = None
    after_work: bool = False

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        if self.after_work:
            exchange.work()
        headers, body = _encoded({"detail": "injected"} if self.body is None else self.body)
        if self.retry_after is not None:
            headers = (*headers, ("Retry-After", str(self.retry_after)))
        return Reply(self.code, headers, body)


@dataclasses.dataclass(frozen=True)
class Drop:
    """Close the connection without a response, before the work is done or after it."""

    after_work: bool = False

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        if self.after_work:
            exchange.work()
        return None


@dataclasses.dataclass(frozen=True)
class Cut:
    """Do the work, and close the connection in the middle of the response's body."""

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        reply = exchange.work()
        return dataclasses.replace(reply, close_after=len(reply.body) // 2)


@dataclasses.dataclass(frozen=True)
class Truncate:
    """Do the work, and send half of the body as if it were all: the HTTP message is complete."""

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        reply = exchange.work()
        return dataclasses.replace(reply, body=reply.body[: len(reply.body) // 2])


@dataclasses.dataclass(frozen=True)
class Garble:
    """Do the work, and flip the bits of every byte of the body."""

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        reply = exchange.work()
        return dataclasses.replace(reply, body=bytes(byte ^ 0xFF for byte in reply.body))


@dataclasses.dataclass(frozen=True)
class Trickle:
    """Do the work, and send the body in up to 20 pieces, *pause_s* seconds apart."""

    pause_s: float = 0.01

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        reply = exchange.work()
        piece = -(-len(reply.body) // _MOST_PIECES) or 1
        return dataclasses.replace(reply, piece=piece, pause_s=self.pause_s)


@dataclasses.dataclass(frozen=True)
class ExpireResult:
    """Finish the work of a ``retrieve_future``, drop its result, and report that it expired."""

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        exchange.server.drop_result(exchange.request.json()["request_id"])
        return exchange.work()


@dataclasses.dataclass(frozen=True)
class ExpireSessions:
    """Expire all sessions, as if their heartbeats had stopped; the server then reports that."""

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        exchange.server.expire_sessions()
        return exchange.work()


@dataclasses.dataclass(frozen=True)
class Restart:
    """Restart the server; see `FakeServer.restart`.  The request gets no response."""

    keep_state: bool = True
    after_work: bool = False

    def __call__(self, exchange: Exchange) -> Optional[Reply]:
        if self.after_work:
            exchange.work()
        # In another thread, because the restart waits until this request has ended.
        exchange.server.restart_soon(keep_state=self.keep_state)
        exchange.wait()  # until the server stops
        return None


def _encoded(
    body: Union[Mapping[str, Any], str, bytes],
) -> Tuple[Tuple[Tuple[str, str], ...], bytes]:
    """Return the headers for *body*, and its bytes."""
    if isinstance(body, bytes):
        return (), body
    if isinstance(body, str):
        return (("Content-Type", "text/html; charset=utf-8"),), body.encode()
    return (("Content-Type", "application/json"),), json.dumps(body).encode()
