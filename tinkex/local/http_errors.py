"""What waitress itself answers (a body too large, a malformed request line), as JSON like the rest.

Runs in the HTTP threads.
"""

from __future__ import annotations

import orjson
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask


class JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress has no types
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

    error_task_class = JsonErrorTask
