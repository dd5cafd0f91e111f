"""Files of checkpoints, behind signed URLs (docs/protocol.md, "Archives", "Exported files").

The URLs need no key: whoever has one may fetch what it names until it expires.
"""

from __future__ import annotations

import hashlib
from email.utils import formatdate
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple, TypeVar

from flask import Flask, Response, request

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import SIGNED_PREFIX
from tinkex.local.http.contents import Content, file_content, files_of, tar_content
from tinkex.local.http.messages import answer
from tinkex.local.http.signed_urls import Signer
from tinkex.local.routes.checkpoints import CHECKPOINT, need_checkpoint
from tinkex.local.routes.session_search import instant
from tinkex.local.settings import ServerSettings
from tinkex.local.state.rows import CheckpointRow

T = TypeVar("T")


def register(app: Flask, backend: Backend, settings: ServerSettings) -> None:
    """Add the routes to *app*."""
    signer = Signer(settings.signed_url_lifetime_s, wall=backend.wall)
    _register_urls(app, backend, signer)
    _register_contents(app, backend, signer)


def _register_urls(app: Flask, backend: Backend, signer: Signer) -> None:
    @app.get(f"{CHECKPOINT}/archive")
    def archive(run_id: str, kind: str, name: str) -> Response:
        need_checkpoint(backend, run_id, kind, name)
        url, expires_at = _signed(signer, f"archive/{run_id}/{kind}/{name}")
        response = answer({"url": url, "expires": instant(expires_at)}, 302)
        response.headers["Location"] = url
        response.headers["Expires"] = formatdate(expires_at, usegmt=True)
        return response

    @app.get(f"{CHECKPOINT}/external_weights_urls")
    def external_weights_urls(run_id: str, kind: str, name: str) -> Response:
        if kind != "external_weights":
            raise HTTPError(
                400,
                f"{kind}/{name} is no external checkpoint; save_weights_external makes one",
            )
        row = need_checkpoint(backend, run_id, kind, name)
        folder = backend.store.folder_of(row)
        urls: Dict[str, str] = {}
        expires_at = 0
        for file in _found(backend, row, files_of):
            relative = file.relative_to(folder).as_posix()
            path = f"files/{run_id}/{kind}/{name}/{relative}"
            urls[relative], expires_at = _signed(signer, path)
        return answer({"urls": urls, "expires": instant(expires_at)})


def _signed(signer: Signer, path: str) -> Tuple[str, int]:
    """Return the URL of *path* as the client sees this server, and when it expires."""
    signed, expires_at = signer.sign(f"{SIGNED_PREFIX}{path}")
    return f"{request.url_root.rstrip('/')}{signed}", expires_at


def _register_contents(app: Flask, backend: Backend, signer: Signer) -> None:
    def check_signature() -> None:
        signer.check(request.path, request.args.get("expires"), request.args.get("signature"))

    @app.get(f"{SIGNED_PREFIX}archive/<run_id>/<kind>/<name>")
    def signed_archive(run_id: str, kind: str, name: str) -> Response:
        check_signature()
        row = need_checkpoint(backend, run_id, kind, name)
        content = _found(backend, row, tar_content)
        response = _download(content, _etag(row, ""), "application/x-tar")
        response.headers["Content-Disposition"] = f'attachment; filename="{name}.tar"'
        return response

    @app.get(f"{SIGNED_PREFIX}files/<run_id>/<kind>/<name>/<path:relative>")
    def signed_file(run_id: str, kind: str, name: str, relative: str) -> Response:
        check_signature()  # of the whole path: only names that were handed out get this far
        row = need_checkpoint(backend, run_id, kind, name)
        content = _found(backend, row, lambda folder: file_content(folder / relative))
        return _download(content, _etag(row, relative), "application/octet-stream")


def _found(backend: Backend, row: CheckpointRow, look: Callable[[Path], T]) -> T:
    """Return what *look* finds in the folder of a checkpoint; HTTPError 404 if it is not there."""
    try:
        return look(backend.store.folder_of(row))
    except FileNotFoundError as error:
        raise backend.store.missing_files(row) from error


def _etag(row: CheckpointRow, relative: str) -> str:
    """Tell versions apart: a checkpoint may be saved again under its name."""
    text = f"{row.folder}\n{row.created_at!r}\n{relative}".encode()
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def _download(content: Content, etag: str, mimetype: str) -> Response:
    """Answer with *content*, or with the part of it that the client asked for."""
    asked = _range(content.size, etag)
    start, stop = (0, content.size) if asked is None else asked
    response = Response(content.read(start, stop), mimetype=mimetype)
    response.call_on_close(content.close)
    response.set_etag(etag)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Cache-Control"] = "private"
    response.content_length = stop - start
    if asked is not None:
        response.status_code = 206
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
        if start >= stop:  # there is nothing there
            response.status_code = 416
            response.headers["Content-Range"] = f"bytes */{content.size}"
    return response


def _range(size: int, etag: str) -> Optional[Tuple[int, int]]:
    """Return the part that was asked for, None for the whole, an empty part if there is none."""
    asked = request.range
    if asked is None or asked.units != "bytes" or len(asked.ranges) != 1:
        return None
    if request.headers.get("If-Range") and request.if_range.etag != etag:
        return None  # it is another version now
    found: Optional[Tuple[int, int]] = asked.range_for_length(size)
    return (0, 0) if found is None else found
