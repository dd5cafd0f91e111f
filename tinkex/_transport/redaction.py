"""Keeping secrets out of what people read: answers that echo them, errors, logs."""

from __future__ import annotations

import dataclasses
import re
from typing import Iterable, List, Optional
from urllib.parse import urlsplit

from tinkex._transport.request import Reply
from tinkex.config import Config

#: Shorter ones are no secrets, and would garble every text that they happen to occur in.
_LEAST = 4

#: In an answer that is not an error, only what cannot be there by chance is replaced.
_LEAST_IN_RESULT = 12

_SENSITIVE = re.compile("auth|key|token|secret|cookie|password", re.IGNORECASE)


def secrets_of(config: Config) -> List[str]:
    """The secrets among the settings, but for the key."""
    found = list(config.access_headers.values())
    found += [text for name, text in config.extra_headers.items() if _SENSITIVE.search(name)]
    if config.proxy:
        password = urlsplit(config.proxy).password
        found += [password] if password else []
    return found


def redact(text: str, key: Optional[str], secrets: Iterable[str]) -> str:
    """Return *text* without the key and without the other *secrets*."""
    for secret in _ordered(key, secrets, _LEAST):
        text = text.replace(secret, _stand_in(secret, key))
    return text


def redact_reply(reply: Reply, key: Optional[str], secrets: Iterable[str]) -> Reply:
    """Return *reply* without secrets that its text echoes, before it gets into an error or a log.

    Binary answers are left alone: they are not shown.
    """
    if "protobuf" in reply.content_type:
        return reply
    body = reply.body
    least = _LEAST if reply.status >= 300 else _LEAST_IN_RESULT
    for secret in _ordered(key, secrets, least):
        raw = secret.encode("latin-1", "replace")
        if raw in body:
            body = body.replace(raw, _stand_in(secret, key).encode())
    return reply if body is reply.body else dataclasses.replace(reply, body=body)


def _ordered(key: Optional[str], secrets: Iterable[str], least: int) -> List[str]:
    """Those that are long enough; longer ones first, as they may hold shorter ones."""
    every = {*secrets, *([key] if key else [])}
    return sorted((s for s in every if len(s) >= least), key=len, reverse=True)


def _stand_in(secret: str, key: Optional[str]) -> str:
    return "<api key>" if secret == key else "<secret>"
