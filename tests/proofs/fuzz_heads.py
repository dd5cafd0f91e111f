"""How tests/proofs/fuzz.py mutates the part before a body: headers, URLs, framing, senders."""

from __future__ import annotations

from random import Random
from typing import Dict, Tuple
from urllib.parse import quote

from proofs.fuzz_bodies import ODD_NAMES, change_bytes
from proofs.fuzz_requests import Sent

from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE

_ODD_TYPES = (
    "", "text/plain", "application/json; charset=utf-16", "APPLICATION/JSON", "application/json;",
    "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/protobuf",
    JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, ";", "a" * 3000, "\xe9",
    "application/json, text/plain",
)  # fmt: skip

_ODD_HEADERS: Dict[str, Tuple[str, ...]] = {
    "Accept": ("application/x-protobuf", "*/*;q=NaN", "x" * 9000, "", ",;=", "\xff"),
    "Range": ("bytes=0-5", "bytes=5-0", "bytes=-1", "bytes=" + "9" * 5000 + "-", "bytes=0-0,2-3",
              "bytes=-0", "bytes=1-\xb2", "items=0-1", "bytes", "bytes=" + "0-1," * 2000),
    "If-Range": ('"x"', "W/", "Mon, 99 Foo 99999999999 00:00:00 GMT", '"' * 50, "\xff",
                 "Thu, 01 Jan 1970 00:00:00 +9999999999"),
    "If-None-Match": ('"x"', "*", "\xff"),
    "If-Modified-Since": ("x", "Thu, 01 Jan 0000 00:00:00 GMT"),
    "X-Idempotency-Key": ("", "k", "k" * 256, "k" * 257, "\xff\x00", "../x"),
    "Cookie": ("session=x", "=" * 3000, "\xff"),
    "X-Forwarded-For": ("evil", "1.1.1.1"),
    "X-Forwarded-Host": ("evil.example",),
    "Forwarded": ("host=evil",),
    "Expect": ("100-continue", "x"),
    "Upgrade": ("websocket", "h2c"),
    "Connection": ("close", "keep-alive, Upgrade", "x" * 1000),
    "Accept-Encoding": ("gzip", "zstd;q=-1"),
    "X-HTTP-Method-Override": ("DELETE",),
    "User-Agent": ("\xff", ""),
}  # fmt: skip

_ODD_QUERIES = (
    "limit=x", "limit=-1", "limit=0", "offset=99999999999999999999999", "limit=\xb2", "limit=%ff",
    "offset=1e3", "limit=" + "9" * 5000, "access_scope=all", "access_scope=accessible", "day=today",
    "day=0001-01-01", "day=9999-12-31", "day=2026-11-31", "day=%00", "day=20261126",
    "day=2026-W01-1",
    "event_type=x", "event_type=checkpoints", "project_id=%00", "project_id=%ed%a0%80", "&" * 3000,
    "=", "%", "%zz", "a=b&" * 2000, "limit=1&limit=x", "expires=1&signature=x", "+", "a[]=1",
    "limit[]=1",
)  # fmt: skip

#: Headers that show that a request is from a foreign web page.
FOREIGN = (
    {"Host": "evil.example"}, {"Host": "localhost.evil.example:1"}, {"Host": ""},
    {"Host": "127.0.0.1@evil.example"}, {"Host": "\xff"}, {"Host": "169.254.169.254"},
    {"Host": "[::1"}, {"Host": "localhost, evil"}, {"Host": "0.0.0.0"}, {"Host": "x" * 5000},
)  # fmt: skip
CROSS_SITE = (
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
    {"Origin": "\xff"}, {"Origin": "http://["}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://127.0.0.1"}, {"Origin": "x" * 5000},
)  # fmt: skip


def change_head(rng: Random, sent: Sent) -> None:
    """Change headers, the path, the query or the method."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        choice = rng.random()
        if choice < 0.4:
            name = rng.choice(list(_ODD_HEADERS))
            sent.headers[name] = rng.choice(_ODD_HEADERS[name])
        elif choice < 0.5:
            sent.headers["Content-Type"] = rng.choice(_ODD_TYPES)
        elif choice < 0.65:
            sent.query = rng.choice(_ODD_QUERIES)
        elif choice < 0.7:
            sent.method = rng.choice(
                ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "X")
            )
        elif choice < 0.75:
            sent.headers.update({f"X-{n}": "v" for n in range(rng.choice((10, 500)))})
        else:
            sent.path = _change_path(rng, sent.path)


def _change_path(rng: Random, path: str) -> str:
    parts = path.split("/")
    place = rng.randrange(1, len(parts))
    choice = rng.random()
    if choice < 0.6:
        parts[place] = quote(rng.choice(ODD_NAMES).encode("utf-8", "surrogatepass"), safe="")
    elif choice < 0.7:
        parts[place] = rng.choice(
            ("..", "%2e%2e", "..%2f..%2foutside", "%00", "%ff", "%", "*", "//")
        )
    elif choice < 0.8:
        parts.insert(place, rng.choice(("", ".", "..", "x")))
    elif choice < 0.9:
        del parts[place]
    else:
        parts[place] += rng.choice((";x", "%20", ".", "/", "%0a", "x" * 3000))
    return "/".join(parts) or "/"


def change_wire(rng: Random, raw: bytes) -> bytes:
    """Return an HTTP request as bytes, with its framing changed."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    choice = rng.random()
    if choice < 0.25:
        odd = rng.choice((
            b"Content-Length: -1", b"Content-Length: 1e3", b"Content-Length: " + b"9" * 30,
            b"Content-Length: " + b"9" * 5000, b"Content-Length: 0", b"Content-Length: 3, 3",
            b"Content-Length: +5", b"Content-Length: \xb2", b"Transfer-Encoding: chunked",
            b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity",
            b"Transfer-Encoding: x", b"Host: evil.example", b"Expect: 100-continue", b": x", b"x",
            b" folded", b"A:" + b"b" * 300_000, b"X\x00: y", b"X: \x00", b"\xff: \xff",
        ))  # fmt: skip
        lines.insert(rng.randint(1, len(lines)), odd)
    elif choice < 0.4:
        lines[1:1] = [b"H%d: v" % n for n in range(rng.choice((100, 3000)))]
    elif choice < 0.55:
        lines[0] = rng.choice((
            b"GET", b"", b"GET /", b"GET / HTTP/9.9", b"GET  /  HTTP/1.1", b"\x16\x03\x01\x02\x00",
            b"GET http://evil.example/api/v1/healthz HTTP/1.1", b"GET //evil/ HTTP/1.1",
            b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"GET /\xff HTTP/1.1",
            b"get / HTTP/1.1",
            b"PRI * HTTP/2.0", b"GET http://[ HTTP/1.1", b"GET /" + b"x" * 300_000 + b" HTTP/1.1",
            b"GET /%zz?%zz#%zz HTTP/1.1", b"GET /;:@[ HTTP/1.1", b"GET ../../outside HTTP/1.1",
        ))  # fmt: skip
    elif choice < 0.8:
        chunks = rng.choice((
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), b"%x;ext=1\r\n%b\r\n0\r\nT: x\r\n\r\n"
            % (len(body), body), b"ffffffffffffffff\r\n" + body, b"-1\r\n" + body, b"zz\r\n\r\n",
            b"1\r\n" * 50, b"0\r\n\r\n", b"%x\r\n%bxx0\r\n\r\n" % (len(body), body), b"\r\n" * 20,
            b"1" * 5000 + b"\r\n", b"0x1\r\na\r\n0\r\n\r\n", b"1_0\r\n" + body,
        ))  # fmt: skip
        lines = [line for line in lines if not line.lower().startswith(b"content-length")]
        return b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]) + chunks
    else:
        return change_bytes(rng, raw)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
