"""Files of checkpoints, behind signed URLs (docs/protocol.md, "Archives", "Exported files").

The URLs need no key: until a URL expires, everyone who has it may fetch what it names.
"""

from __future__ import annotations

import functools
import hashlib
from email.utils import formatdate
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple, TypeVar

from flask import Response, request

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import SIGNED_PREFIX
from tinkex.local.http.contents import Content, file_content, files_of, tar_content
from tinkex.local.http.messages import json_response
from tinkex.local.http.signatures import Signer
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.routes.checkpoints import CHECKPOINT
from tinkex.local.settings import ServerSettings
from tinkex.local.state.rows import CheckpointRow, timestamp

T = TypeVar("T")


class DownloadRoutes(Routes):
    """Views that hand out signed URLs, and the views behind such URLs."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        super().__init__(backend, settings)
        self._signer = Signer(settings.signed_url_lifetime_s, wall=backend.wall)

    @route("GET", f"{CHECKPOINT}/archive")
    def archive_url(self, run_id: str, kind: str, name: str) -> Result:
        """Redirect to the archive of a checkpoint."""
        # So that a missing checkpoint is a 404 here, and not only behind the URL.
        self._checkpoint(run_id, kind, name)
        url, expires_at = self._signed(f"archive/{run_id}/{kind}/{name}")
        # Clients read this redirect rather than follow it, and fetch the URL without credentials
        # (docs/protocol.md, "Archives").
        response = json_response({"url": url, "expires": timestamp(expires_at)}, 302)
        response.headers["Location"] = url
        response.headers["Expires"] = formatdate(expires_at, usegmt=True)
        return response

    @route("GET", f"{CHECKPOINT}/external_weights_urls")
    def file_urls(self, run_id: str, kind: str, name: str) -> Result:
        """List URLs of the files of an exported checkpoint."""
        if kind != "external_weights":
            raise HTTPError(
                400,
                f"{kind}/{name} is not an external checkpoint; save_weights_external makes one",
            )
        row = self._checkpoint(run_id, kind, name)
        folder = self._backend.store.checkpoints.folder_of(row)
        urls: Dict[str, str] = {}
        expires_at = 0
        for file in self._read(row, files_of):
            relative = file.relative_to(folder).as_posix()
            urls[relative], expires_at = self._signed(f"files/{run_id}/{kind}/{name}/{relative}")
        return {"urls": urls, "expires": timestamp(expires_at)}

    @route("GET", f"{SIGNED_PREFIX}archive/<run_id>/<kind>/<name>")
    def archive(self, run_id: str, kind: str, name: str) -> Result:
        """Send a checkpoint as a tar archive."""
        # First, so that a client without a key cannot find out which checkpoints exist.
        self._check_signature()
        row = self._checkpoint(run_id, kind, name)
        content = self._read(row, tar_content)
        response = _download(content, _etag(row, ""), "application/x-tar")
        response.headers["Content-Disposition"] = f'attachment; filename="{name}.tar"'
        return response

    @route("GET", f"{SIGNED_PREFIX}files/<run_id>/<kind>/<name>/<path:relative>")
    def file(self, run_id: str, kind: str, name: str, relative: str) -> Result:
        """Send one file of a checkpoint."""
        self._check_signature()  # covers the whole path: only names from `file_urls` pass
        row = self._checkpoint(run_id, kind, name)
        content = self._read(row, functools.partial(file_content, relative=relative))
        return _download(content, _etag(row, relative), "application/octet-stream")

    def _signed(self, path: str) -> Tuple[str, int]:
        """Return the URL of *path* as the client sees this server, and when it expires."""
        signed, expires_at = self._signer.sign(f"{SIGNED_PREFIX}{path}")
        return f"{request.url_root.rstrip('/')}{signed}", expires_at

    def _check_signature(self) -> None:
        self._signer.check(request.path, request.args.get("expires"), request.args.get("signature"))

    def _read(self, row: CheckpointRow, read: Callable[[Path], T]) -> T:
        """Return what *read* finds in the folder of a checkpoint; 404 if a file is missing."""
        try:
            return read(self._backend.store.checkpoints.folder_of(row))
        except FileNotFoundError as error:
            raise self._backend.store.checkpoints.missing_files(row) from error


def _etag(row: CheckpointRow, relative: str) -> str:
    """Return a tag that tells versions apart: a checkpoint may be saved again under its name."""
    text = f"{row.folder}\n{row.created_at!r}\n{relative}".encode()
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def _download(content: Content, etag: str, mimetype: str) -> Response:
    """Send *content*, or the part of it that the client asked for."""
    asked = _range(content.size, etag)
    start, stop = (0, content.size) if asked is None else asked
    response = Response(content.read(start, stop), mimetype=mimetype)
    # Called even if the client hangs up before the end.
    response.call_on_close(content.close)
    # A client that resumes sends the tag back as If-Range, so that it never joins two versions.
    response.set_etag(etag)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Cache-Control"] = "private"
    response.content_length = stop - start
    if asked is not None:
        response.status_code = 206
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
        if start >= stop:  # the range is empty
            response.status_code = 416
            response.headers["Content-Range"] = f"bytes */{content.size}"
    return response


def _range(size: int, etag: str) -> Optional[Tuple[int, int]]:
    """Return the requested range; None for everything, (0, 0) if it is beyond the end."""
    asked = request.range
    # Several ranges would need a multipart response; HTTP allows sending everything instead.
    if asked is None or asked.units != "bytes" or len(asked.ranges) != 1:
        return None
    if request.headers.get("If-Range") and request.if_range.etag != etag:
        return None  # the client has a part of another version
    found: Optional[Tuple[int, int]] = asked.range_for_length(size)
    return (0, 0) if found is None else found
