"""Connections of the embedded server: waitress's, but for three things.

What waitress itself answers (a body too large, a malformed request line) is JSON like the rest.
And the body of a request that will be refused for its headers is read and dropped: someone without
the key fills neither memory nor disk, and still gets the answer.  And there can be an access log.

Bodies are read in the thread tinkex-server, errors are answered in the HTTP threads.
"""

from __future__ import annotations

import io
import time
from typing import Any, Optional

import orjson
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask, WSGITask

from tinkex.local.http.access_log import WriteLine, log_request
from tinkex.local.http.admission import Admission, Head


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


class _Dropped:
    """Takes the place of the buffer of a body, and keeps nothing but its size."""

    def __init__(self) -> None:
        self._size = 0

    def append(self, data: bytes) -> None:
        self._size += len(data)

    def __len__(self) -> int:
        return self._size

    def getfile(self) -> io.BytesIO:
        return io.BytesIO()

    def close(self) -> None:
        pass


class AdmissionParser(HTTPRequestParser):  # type: ignore[misc]
    """Reads a request, and drops its body unless *admission* admits the request."""

    def __init__(self, adj: Any, admission: Admission) -> None:
        super().__init__(adj)
        self._admission = admission

    def parse_header(self, header_plus: bytes) -> None:
        """Read the header; then it is known what to do with the body."""
        super().parse_header(header_plus)
        if self.body_rcv is None:
            return
        size = None if self.chunked else self.content_length
        head = Head(self.command, self.path, self.headers, size)
        if not self._admission.admits(head):
            self.body_rcv.buf = _Dropped()


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection whose errors are JSON, and whose requests *admission* judges.

    *access_log* gets a line for each request.
    """

    task_class = LoggedTask
    error_task_class = JsonErrorTask

    def __init__(
        self,
        *args: Any,
        admission: Admission,
        access_log: Optional[WriteLine] = None,
        **options: Any,
    ) -> None:
        self.access_log = access_log
        self.parser_class = lambda adj: AdmissionParser(adj, admission)
        super().__init__(*args, **options)
