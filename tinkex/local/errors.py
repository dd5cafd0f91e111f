"""HTTPError: a request to the embedded server that fails, with an HTTP status.

Raised anywhere below the routes; the application turns them into ``{"detail": ...}``.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Iterator, Mapping, Optional

from tinkex.errors import InvalidInputError


class HTTPError(Exception):
    """A request that cannot be served: its HTTP *status*, and a *detail* that names the remedy.

    *retry_after_s* and *headers* go into the response.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        retry_after_s: Optional[float] = None,
        headers: Optional[Mapping[str, str]] = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


class StorageError(HTTPError):
    """The data directory cannot be written, as on a full disk, and nothing was changed."""

    def __init__(self, data_dir: Path, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        super().__init__(
            507,  # Insufficient Storage
            f"the server cannot write to {data_dir}: {reason}. Nothing was changed; free some "
            "space on its disk, or make the folder writable, and repeat this",
            # A retry by the client would fail, too, until a person makes room.
            headers={"x-should-retry": "false"},
        )


@contextlib.contextmanager
def storage_errors(data_dir: Path) -> Iterator[None]:
    """Turn errors of the file system and of SQLite into a StorageError about *data_dir*."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise StorageError(data_dir, error) from error


@contextlib.contextmanager
def invalid_input_rejected() -> Iterator[None]:
    """Turn an InvalidInputError into an HTTPError 400, since the value came with the request."""
    try:
        yield
    except InvalidInputError as error:
        raise HTTPError(400, str(error)) from error
