"""One request and one response, as they go over the wire.  Values only: Transport sends."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple, Union

import orjson

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import APIConnectionError, APIError, APITimeoutError, ResponseDecodeError
from tinkex.wire.parts import Parts

if TYPE_CHECKING:
    from tinkex.config import Config

JSON_TYPE = "application/json"

NOT_JSON_HINT = ErrorText(
    "Is ", Setting("base_url"), " the address of a Tinker server, and its path prefix right?"
)

#: Characters of a body that are shown.
_SHOWN = 200

Body = Union[bytes, Parts, None]


@dataclasses.dataclass(frozen=True)
class Request:
    """One logical request; every attempt sends the same bytes and the same idempotency key.

    Attributes:
        body: bytes, or the parts of a batch, whose arrays must not change until it was sent.
        read_timeout_s: of one attempt; None takes the config's.
        headers: of this request only; they are not sent to another origin after a redirect.
        secrets: what *headers* or *body* hold that must not be shown, should the server echo it.
        idempotency_key: of all attempts; None has one made.
        raw_credential: send the credential itself, never a token exchanged for it.
        secret_reply: the response is a secret, and shown nowhere.
        follow_redirects: a GET goes on to where the server points, without credentials if that is
            another origin; False returns the 3xx response itself.
        empty_response_ok: a success may have no body, since it is not read.
        encode_s: the seconds that making the body took, for `ServiceClient.metrics`; None is not
            counted.
    """

    method: str
    path: str
    body: Body = dataclasses.field(default=None, repr=False)
    content_type: str = JSON_TYPE
    accept: str = JSON_TYPE
    traffic: str = "work"
    read_timeout_s: Optional[float] = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    secrets: Tuple[str, ...] = dataclasses.field(default=(), repr=False)
    raw_credential: bool = False
    idempotency_key: Optional[str] = None
    secret_reply: bool = False
    follow_redirects: bool = True
    empty_response_ok: bool = False
    encode_s: Optional[float] = dataclasses.field(default=None, repr=False, compare=False)

    def keep_body(self) -> None:
        """Have it send the same bytes again even if its arrays are changed meanwhile."""
        if isinstance(self.body, Parts):
            self.body.keep()

    @property
    def name(self) -> str:
        """Method and path, for messages."""
        return f"{self.method} {self.path.partition('?')[0]}"


def broken_route(request: Request, times: int) -> str:
    """The hint of an error that has come several *times*, word for word."""
    return (
        f"The server answered the same {times} times: its route {request.name} is broken, or "
        "breaks over this request. See its log."
    )


def unreachable_server(error: APIError, config: Config) -> Dict[str, Optional[str]]:
    """Return the *extra* of a log record about *error*: the server, if nothing responds there."""
    is_outage = isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)
    # With a status, something did respond: a gateway.
    return {"unreachable": config.host_and_port if is_outage and error.status is None else None}


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response of any status, read to its end.

    Attributes:
        headers: with lower-case names.
        read_s: the seconds from its headers to its end.
    """

    status: int
    headers: Mapping[str, str] = dataclasses.field(repr=False)
    body: bytes = dataclasses.field(repr=False)
    read_s: float = dataclasses.field(default=0.0, repr=False, compare=False)
    #: The decoded body, from `is_damaged` to `json`: both decode it, once together.
    _decoded: List[Any] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def content_type(self) -> str:
        """Lower-case content type, with its parameters."""
        return self.headers.get("content-type", "").lower()

    @property
    def is_damaged(self) -> bool:
        """True for a success that is no JSON: if it cannot be read, it was damaged on its way."""
        if self.status >= 300:
            return False
        try:
            self._decoded[:] = [orjson.loads(self.body)]
        except orjson.JSONDecodeError:
            return True
        return False

    def json(self) -> Any:
        """The decoded body, the caller's own; ResponseDecodeError if it is not JSON."""
        if self._decoded:
            return self._decoded.pop()
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ResponseDecodeError(
                f"the response (status {self.status}, {self.content_type or 'no content type'}) "
                f"is not JSON: {self.body[:200]!r}",
                status=self.status,
                hint=NOT_JSON_HINT,
            ) from error


def error_if_damaged(request: Request, reply: Reply) -> Optional[ResponseDecodeError]:
    """The error for a success that should be JSON and is not; None if all is well.

    The work was done.  Sent again, under the same key, the request gets its response once more.
    """
    if request.empty_response_ok or "protobuf" in reply.content_type or not reply.is_damaged:
        return None
    error = ResponseDecodeError(
        f"{request.name}: the response is not JSON: {describe(request, reply)}",
        status=reply.status,
        hint=NOT_JSON_HINT,
    )
    error.maybe_taken = True
    return error


def describe(request: Request, reply: Reply) -> str:
    """Status, content type and the beginning of the body, for messages; may hold secrets."""
    kind = reply.content_type.partition(";")[0].strip() or "no content type"
    if request.secret_reply:
        return f"status {reply.status}, {kind}"
    text = re.sub(r"\s+", " ", reply.body[: 4 * _SHOWN].decode("utf-8", "replace")).strip()
    shown = repr(text[:_SHOWN]) if text else "empty body"
    return f"status {reply.status}, {kind}, {shown}"
