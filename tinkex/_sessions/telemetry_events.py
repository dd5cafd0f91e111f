"""The events of telemetry, and the errors in them (docs/protocol.md, "Telemetry").  Pure.

Nothing that a user gave us is reported: no keys, tokens or prompts, and neither names nor contents
of the user's files.  Of an error, its type and status are reported, and the part of our own message
before it quotes a server or a library; of a traceback, the places in code, with paths inside
packages only.
"""

from __future__ import annotations

import os
import re
import traceback
from types import TracebackType
from typing import Any, Dict, Iterator, List, Optional, Tuple

from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ConfigError,
    InvalidInputError,
    OperationTimeoutError,
    RequestFailedError,
    ResponseDecodeError,
    ResultExpiredError,
    SessionLostError,
)

#: No text of an event is longer than this, in characters.
_MAX_TEXT = 500
_MAX_FRAMES = 40

#: Folders that packages lie in: what comes after the last of them says which package it is.
_PACKAGE_ROOT = re.compile(r"site-packages|dist-packages|python3\.\d+")

#: Errors whose messages hold no value that a user gave, up to the first ": ".
_OUR_MESSAGES = (
    APIError,
    RequestFailedError,
    ResultExpiredError,
    SessionLostError,
    OperationTimeoutError,
)

Facts = Dict[str, Any]


def is_user_error(error: BaseException) -> bool:
    """True if the user caused it: the server reports so, or a response was 4xx (but not 408)."""
    return any(_is_user_error(found) for found in _chain(error))


def _is_user_error(error: BaseException) -> bool:
    if isinstance(error, RequestFailedError) and error.category == "user":
        return True
    if isinstance(error, (InvalidInputError, ConfigError)):
        return True
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status != 408


def _chain(error: BaseException) -> Iterator[BaseException]:
    """*error* and what led to it."""
    seen: List[BaseException] = []  # chains can be circular
    found: Optional[BaseException] = error
    while found is not None and found not in seen:
        seen.append(found)
        yield found
        found = found.__cause__ or found.__context__


def user_error(error: BaseException) -> Facts:
    """Data of the generic event ``user_error``."""
    facts: Facts = {"error_type": _type(error)}
    message, status = safe_message(error), getattr(error, "status", None)
    if message:
        facts["message"] = message
    if status is not None:
        facts["status_code"] = status
    return facts


def unhandled(error: BaseException) -> Facts:
    """Fields of an UNHANDLED_EXCEPTION event."""
    facts: Facts = {"error_type": _type(error), "error_message": safe_message(error)}
    places = safe_traceback(error.__traceback__)
    if places:
        facts["traceback"] = places
    return facts


def failed_request(
    error: BaseException, *, request_id: str, request_type: str, iteration: int, elapsed_s: float
) -> Optional[Tuple[str, Facts]]:
    """Name and data of the event for accepted work that failed; None if it has no event."""
    facts: Facts = {"request_id": request_id, "request_type": request_type}
    where: Facts = {"iteration": iteration, "elapsed_time": elapsed_s}
    user = {"is_user_error": is_user_error(error)}
    if isinstance(error, RequestFailedError) and error.status is None:
        reported = {"error": safe_message(error), "error_category": error.category or "unknown"}
        return "APIFuture.result_async.application_error", {**facts, **reported, **user, **where}
    if isinstance(error, OperationTimeoutError):
        return "APIFuture.result_async.timeout", {**facts, **where}
    if isinstance(error, ResponseDecodeError):
        kind = {"exception_type": _type(error)}
        return "APIFuture.result_async.validation_error", {**facts, **kind, **where}
    fatal = {
        "kind": "fatal",
        "should_retry": False,
        **user,
        "exception": safe_message(error),
        "exception_type": _type(error),
        **where,
    }
    if isinstance(error, APIConnectionError):
        return "APIFuture.result_async.connection_error", {**facts, **fatal}
    if isinstance(error, (APIStatusError, RequestFailedError)):
        status = {"status_code": error.status}
        return "APIFuture.result_async.api_status_error", {**facts, **status, **fatal}
    return None


def safe_message(error: BaseException) -> str:
    """Our own part of the message of *error*; empty if it may hold a value of the user's.

    Our messages quote servers and libraries after ``": "``.  Those about bad input or settings
    quote the user's own values, and the messages of other errors may hold anything.
    """
    if not isinstance(error, _OUR_MESSAGES):
        return ""
    return error.message.partition(": ")[0][:_MAX_TEXT]


def safe_traceback(trace: Optional[TracebackType]) -> str:
    """The places in code, outermost first, without the text of the lines."""
    # By hand: traceback.extract_tb reads the source files.
    places = [
        f'File "{package_path(frame.f_code.co_filename)}", line {line}, in {frame.f_code.co_name}'
        for frame, line in traceback.walk_tb(trace)
    ]
    return "\n".join(places[-_MAX_FRAMES:])


def package_path(path: str) -> str:
    """Return *path* from its package on; only the file name if it is in no package."""
    absolute = os.path.abspath(path)
    if absolute.startswith(_PACKAGE + os.sep):
        return os.path.relpath(absolute, os.path.dirname(_PACKAGE)).replace("\\", "/")
    parts = path.replace("\\", "/").split("/")
    for index in range(len(parts) - 1, 0, -1):
        if _PACKAGE_ROOT.fullmatch(parts[index - 1]):
            return "/".join(parts[index:])
    return parts[-1]


#: The folder of this package.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _type(error: BaseException) -> str:
    return type(error).__name__
