"""What waitress itself answers (a body too large, a malformed request line), as JSON like the rest,
and the access log of all that it answers.

Runs in the HTTP threads.
"""

from __future__ import annotations

import time
from typing import Any, Optional

import orjson
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask

from tinkex.local.access_log import WriteLine, log_request


class _Logged:
    """A task of waitress that writes its line of the access log, if the server keeps one."""

    channel: Any
    request: Any
    status: str

    def service(self) -> None:
        """Answer the request."""
        write: Optional[WriteLine] = self.channel.access_log
        began = time.monotonic()
        try:
            super().service()  # type: ignore[misc]
        finally:
            if write is not None:
                log_request(write, self.request, self.status, time.monotonic() - began)


class LoggedTask(_Logged, WSGITask):  # type: ignore[misc]  # waitress has no types
    """Answers a request with the application."""


class JsonErrorTask(_Logged, ErrorTask):  # type: ignore[misc]
    """Answers a request that never reaches the application, and closes the connection."""

    def execute(self) -> None:
        """Write the answer."""
        error = self.request.error
        detail = f"{error.reason}: {error.body}"
        body = orjson.dumps({"detail": detail})
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.content_length = len(body)
        self.set_close_on_finish()
        self.write(body)


class JsonErrorChannel(HTTPChannel):  # type: ignore[misc]
    """A connection whose errors are JSON."""

    task_class = LoggedTask
    error_task_class = JsonErrorTask
    access_log: Optional[WriteLine] = None


def channel_type(access_log: Optional[WriteLine]) -> Any:
    """Return the class of a server's connections; *access_log* gets a line for each request."""
    if access_log is None:
        return JsonErrorChannel
    return type("LoggedChannel", (JsonErrorChannel,), {"access_log": staticmethod(access_log)})
