"""The log of requests: one DEBUG record of this module's logger for each attempt.

A record has the method, the path without its query, ids, status, bytes and milliseconds; no header,
no key, and nothing from the bodies but ids.  `tinkex --verbose` shows it, and so does
``logging.getLogger("tinkex._transport.request_log").setLevel(logging.DEBUG)``.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Callable, Dict, Optional, Union
from urllib.parse import urlsplit

import orjson

from tinkex._transport.request import Body, Reply, Request

logger = logging.getLogger(__name__)

#: Ids are read from bodies up to this size, in bytes: larger bodies hold data.
_MAX_READ = 1 << 16

#: The top-level fields of a body that are logged.
_ID = re.compile(r"(\w+_id|path|model_path)")
_LONGEST_ID = 200


def is_on() -> bool:
    """Return whether requests are logged; if not, nothing needs to be measured."""
    return logger.isEnabledFor(logging.DEBUG)


def log_exchange(
    request: Request,
    url: str,
    outcome: Union[Reply, Exception],
    took_s: float,
    redact: Callable[[str], str],
) -> None:
    """Log an attempt of *request*, with its response or the error raised instead."""
    ids = _ids(request.body)
    sent = len(request.body or b"")
    if isinstance(outcome, Exception):
        what = f"no response ({type(outcome).__name__})"
        _log(request.method, url, what, sent, None, took_s, ids, redact)
        return
    if not request.secret_reply:
        ids.update(_ids(outcome.body))
    status, received = str(outcome.status), len(outcome.body)
    _log(request.method, url, status, sent, received, took_s, ids, redact)


def log_stream(method: str, url: str, status: int, sent: int, took_s: float) -> None:
    """Log a request whose response is read piece by piece; *took_s* is the time to its headers."""
    _log(method, url, f"{status} (a stream)", sent, None, took_s, {}, str)


def _log(
    method: str,
    url: str,
    outcome: str,
    sent: int,
    received: Optional[int],
    took_s: float,
    ids: Dict[str, Any],
    redact: Callable[[str], str],
) -> None:
    parts = urlsplit(url)
    line = f"{method} {parts.netloc.rpartition('@')[2]}{parts.path} {outcome}, {sent} B sent, "
    line += f"{received} B received, " if received is not None else ""
    line += f"{1000 * took_s:.1f} ms"
    line += "".join(f", {name}={value}" for name, value in ids.items())
    # Redact the whole line: the caller may have passed a secret as a path or an id.
    logger.debug("%s", redact(line))


def _ids(body: Body) -> Dict[str, Any]:
    """Return the ids in a JSON body, by field name."""
    if not isinstance(body, bytes) or len(body) > _MAX_READ or not body.startswith(b"{"):
        return {}
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return {
        name: value
        for name, value in found.items()
        if _ID.fullmatch(name) and isinstance(value, (str, int)) and len(str(value)) <= _LONGEST_ID
    }
