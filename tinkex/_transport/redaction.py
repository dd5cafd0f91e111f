"""Keeping secrets out of everything that people read: responses that echo them, errors, logs."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, List, Optional
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from tinkex._transport.request import Reply, Request
    from tinkex._transport.tokens import TokenSource
    from tinkex.config import Config

#: Shorter strings are not secrets, and replacing them would garble texts that contain them.
_MIN_LENGTH = 4

#: In a response that is not an error, a short string may occur by chance, e.g. among token ids.
_MIN_LENGTH_IN_RESULT = 12

_SENSITIVE = re.compile("auth|key|token|secret|cookie|password", re.IGNORECASE)


class Redactor:
    """Removes the secrets of one client from texts and responses.  Thread-safe.

    The secrets are the key, the tokens made from it, the secrets in the settings, and those of a
    request.
    """

    def __init__(self, config: Config, tokens: TokenSource) -> None:
        self._key = config.api_key
        self._tokens = tokens
        self._settings = [*config.access_headers.values()]
        self._settings += [
            text for name, text in config.extra_headers.items() if _SENSITIVE.search(name)
        ]
        password = urlsplit(config.proxy).password if config.proxy else None
        if password:
            self._settings.append(password)

    def text(self, text: str, request: Optional[Request] = None) -> str:
        """Return *text* without secrets, including those of *request*."""
        for secret in self._secrets(request, _MIN_LENGTH):
            text = text.replace(secret, self._stand_in(secret))
        return text

    def reply(self, reply: Reply, request: Request) -> Reply:
        """Return *reply* without any secrets that its body echoes, before they get into an error.

        Binary responses are returned as they are: their contents are never shown.
        """
        if "protobuf" in reply.content_type:
            return reply
        body = reply.body
        min_length = _MIN_LENGTH if reply.status >= 300 else _MIN_LENGTH_IN_RESULT
        for secret in self._secrets(request, min_length):
            raw = secret.encode("latin-1", "replace")
            if raw in body:
                body = body.replace(raw, self._stand_in(secret).encode())
        return reply if body is reply.body else dataclasses.replace(reply, body=body)

    def _secrets(self, request: Optional[Request], min_length: int) -> List[str]:
        """Return secrets of *min_length* or more, longest first: one may contain another."""
        own = () if request is None else request.secrets
        found = {*self._settings, *self._tokens.secrets, *own}
        return sorted((s for s in found if len(s) >= min_length), key=len, reverse=True)

    def _stand_in(self, secret: str) -> str:
        return "<api key>" if secret == self._key else "<secret>"
