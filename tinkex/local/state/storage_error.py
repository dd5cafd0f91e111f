"""StorageError: the data directory cannot be written, as on a full disk."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Iterator

from tinkex.local.errors import HTTPError

#: Insufficient Storage.
STATUS = 507


class StorageError(HTTPError):
    """Nothing was changed, because the server could not write; HTTP status 507.

    Clients do not send the request again by themselves: this lasts until someone makes room.
    """

    def __init__(self, data_dir: Path, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        super().__init__(
            STATUS,
            f"the server cannot write to {data_dir}: {reason}. Nothing was changed; free some "
            "space on its disk, or make the folder writable, and repeat this",
            headers={"x-should-retry": "false"},
        )


@contextlib.contextmanager
def storage_errors(data_dir: Path) -> Iterator[None]:
    """Make a StorageError of what the file system or SQLite raises about *data_dir*."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise StorageError(data_dir, error) from error
