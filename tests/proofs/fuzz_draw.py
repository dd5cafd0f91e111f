"""Which request tests/proofs/fuzz.py sends next, and how it is mutated."""

from __future__ import annotations

from random import Random
from typing import Any, Tuple

import orjson
from proofs import fuzz_bodies, fuzz_heads
from proofs.fuzz_requests import VALID, Sent
from proofs.fuzz_world import World

from tinkex.wire.codec import PROTOBUF_CONTENT_TYPE

KEY = "tml-fuzz-5a1f0c2e"


def valid(world: World, rng: Random, index: int) -> Tuple[Sent, Any]:
    """Return a valid request, and its JSON body: each in turn, then random ones."""
    place = index if index < len(VALID) else rng.randrange(len(VALID))
    method, path, body = VALID[place]
    path, _, query = world.filled(path).partition("?")
    body = world.filled(body)
    raw = b"" if body is None else orjson.dumps(body)
    return Sent(method, path, world.headers(), raw, query), body


def drawn(world: World, rng: Random, index: int) -> Tuple[str, Sent]:
    """Return the kind of a mutation, and a request that was mutated in this way."""
    sent, body = valid(world, rng, index)
    kind = "valid" if index < len(VALID) else rng.choices(KINDS, _WEIGHTS)[0]
    if kind == "protobuf":
        sent.path = rng.choice(("/api/v1/forward_backward", "/api/v1/forward"))
        sent.method, sent.query = "POST", ""
        sent.headers["Content-Type"] = rng.choice((PROTOBUF_CONTENT_TYPE, "application/protobuf"))
        message = fuzz_bodies.pass_message(rng, world.names["MODEL"], world.next_seq())
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            fuzz_bodies.change_message(rng, message)
        sent.body = message.SerializeToString()
        if rng.random() < 0.3:
            sent.body = fuzz_bodies.change_bytes(rng, sent.body)
        if rng.random() < 0.1:
            encoding, sent.body = fuzz_bodies.compress(rng, sent.body)
            sent.headers["Content-Encoding"] = encoding
    elif kind == "stranger":
        _make_strange(world, rng, sent)
    elif kind == "headers":
        fuzz_heads.change_head(rng, sent)
    elif body is not None and kind in _CHANGES_OF_BODIES:
        if kind == "values":
            sent.body = fuzz_bodies.dump(world.filled(fuzz_bodies.change_value(rng, body)))
        elif kind == "bytes":
            sent.body = fuzz_bodies.change_bytes(rng, sent.body)
        elif kind == "text":
            sent.body = fuzz_bodies.change_text(rng, sent.body)
        else:
            encoding, sent.body = fuzz_bodies.compress(rng, sent.body)
            sent.headers["Content-Encoding"] = encoding
            if rng.random() < 0.3:
                fuzz_heads.change_head(rng, sent)
    return kind, sent


KINDS = (
    "valid",
    "values",
    "bytes",
    "text",
    "compressed",
    "protobuf",
    "headers",
    "stranger",
    "wire",
)
_WEIGHTS = (4, 40, 8, 4, 6, 16, 10, 4, 8)
_CHANGES_OF_BODIES = ("values", "bytes", "text", "compressed")


def _make_strange(world: World, rng: Random, sent: Sent) -> None:
    """Change *sent* into a request that must be refused because of its sender."""
    sent.must_fail = True
    if sent.path.startswith("/signed/"):
        query = dict(pair.split("=") for pair in sent.query.split("&"))
        name = rng.choice(("expires", "signature"))
        query[name] = rng.choice((
            "", "0", "9" * 30, "%ff", "x" * 64, "0" * 64, query[name][:-1], query[name] + "0",
        ))  # fmt: skip
        if rng.random() < 0.3:
            query, sent.path = (
                dict(pair.split("=") for pair in sent.query.split("&")),
                sent.path + "x",
            )
        sent.query = "&".join(f"{name}={value}" for name, value in query.items())
    elif world.api_key is None:
        sent.headers.update(rng.choice(fuzz_heads.FOREIGN))
        if sent.method != "GET" and rng.random() < 0.5:
            sent.headers = {**world.headers(), **rng.choice(fuzz_heads.CROSS_SITE)}
    elif sent.path in ("/", "/api/v1/healthz", "/page/files/page.js"):
        sent.must_fail = False
    else:
        del sent.headers["X-API-Key"]
        key = rng.choice((
            "", "x", KEY[:-1], KEY + "x", KEY.upper(), "eyJ", "eyJ.eyJ.x",
            "eyJhbGciOiJub25lIn0.e30.",
            "eyJ" + "x" * 5000, "\xff", "\x00", f"{KEY},{KEY}",
        ))  # fmt: skip
        sent.headers[rng.choice(("X-API-Key", "Authorization", "Cookie"))] = rng.choice(
            (key, f"Bearer {key}", f"Basic {key}")
        )


def as_bytes(sent: Sent) -> bytes:
    """Return the HTTP request."""
    target = sent.path + ("?" + sent.query if sent.query else "")
    head = f"{sent.method} {target} HTTP/1.1\r\n"
    for name, value in {**sent.headers, "Content-Length": str(len(sent.body))}.items():
        head += f"{name}: {value}\r\n"
    return head.encode("utf-8", "replace") + b"\r\n" + sent.body
