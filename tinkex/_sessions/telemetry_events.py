"""The events of telemetry, and the errors in them (docs/protocol.md, "Telemetry").  Pure.

Nothing that the user gave us is reported: no keys, tokens or prompts, and neither the names nor the
contents of the user's files.  An error is reported with its type, its status and the part of our
own message before any quote from a server or library; a traceback as a list of places in code, with
paths relative to their packages.
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

#: The longest text in an event, in characters.
_MAX_TEXT = 500
_MAX_FRAMES = 40

#: Folders that contain packages: the path after the last of them begins with a package's name.
_PACKAGE_ROOT = re.compile(r"site-packages|dist-packages|python3\.\d+")

#: Errors whose messages contain no values from the user before the first ``": "``.
_OUR_MESSAGES = (
    APIError,
    RequestFailedError,
    ResultExpiredError,
    SessionLostError,
    OperationTimeoutError,
)

Facts = Dict[str, Any]


def is_user_error(error: BaseException) -> bool:
    """Return whether the user caused *error*: bad input or settings, category ``"user"``, or a 4xx
    response (but not 408).
    """
    return any(_is_user_error(found) for found in _chain(error))


def _is_user_error(error: BaseException) -> bool:
    if isinstance(error, RequestFailedError) and error.category == "user":
        return True
    if isinstance(error, (InvalidInputError, ConfigError)):
        return True
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status != 408


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and the errors that led to it."""
    seen: List[BaseException] = []  # chains can be circular
    found: Optional[BaseException] = error
    while found is not None and found not in seen:
        seen.append(found)
        yield found
        found = found.__cause__ or found.__context__


def user_error(error: BaseException) -> Facts:
    """Return the data of the generic event ``user_error``."""
    facts: Facts = {"error_type": _type(error)}
    message, status = safe_message(error), getattr(error, "status", None)
    if message:
        facts["message"] = message
    if status is not None:
        facts["status_code"] = status
    return facts


def unhandled(error: BaseException) -> Facts:
    """Return the fields of an UNHANDLED_EXCEPTION event."""
    facts: Facts = {"error_type": _type(error), "error_message": safe_message(error)}
    places = safe_traceback(error.__traceback__)
    if places:
        facts["traceback"] = places
    return facts


def failed_request(
    error: BaseException, *, request_id: str, request_type: str, iteration: int, elapsed_s: float
) -> Optional[Tuple[str, Facts]]:
    """Return the name and data of the event for accepted work that failed; None if *error* has
    no event.
    """
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
    """Return the part of the message that we wrote; empty if it may contain the user's values.

    Our messages quote servers and libraries after ``": "``.  Messages about bad input or settings
    quote the user's values, and the messages of other errors may contain anything.
    """
    if not isinstance(error, _OUR_MESSAGES):
        return ""
    return error.message.partition(": ")[0][:_MAX_TEXT]


def safe_traceback(trace: Optional[TracebackType]) -> str:
    """Return the places in code, outermost first, without the text of the lines."""
    # Formatted by hand, since traceback.extract_tb reads the source files.
    places = [
        f'File "{package_path(frame.f_code.co_filename)}", line {line}, in {frame.f_code.co_name}'
        for frame, line in traceback.walk_tb(trace)
    ]
    return "\n".join(places[-_MAX_FRAMES:])


def package_path(path: str) -> str:
    """Return *path* starting at its package; only the file name if it is not in a package."""
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
