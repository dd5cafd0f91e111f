"""The routes of the page: its files, which need no key, and its state, which does."""

from __future__ import annotations

import functools
import pkgutil

from flask import Response, request

from tinkex.local.backend import Backend
from tinkex.local.errors import HTTPError
from tinkex.local.http.admission import PAGE_FILES_PREFIX
from tinkex.local.page.state import PageState
from tinkex.local.routes.base import Result, Routes, route
from tinkex.local.settings import ServerSettings

#: The files of the page, and their types.  Not from Python's mimetypes, which reads the system's
#: tables: on Windows these may call a script text/plain, and with ``nosniff`` browsers then refuse
#: to run it.
_MIME_TYPES = {
    "chart.js": "text/javascript",
    "page.js": "text/javascript",
    "prompt.js": "text/javascript",
    "tokens.js": "text/javascript",
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
}

#: The page loads nothing from elsewhere, runs only its own scripts, and cannot be framed.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class PageRoutes(Routes):
    """Views of the page."""

    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        super().__init__(backend, settings)
        self._state = PageState(backend)
        self._needs_key = settings.api_key is not None

    @route("GET", "/")
    def page(self) -> Result:
        """Return the page, without data; it is marked if it has to ask for a key first."""
        page = _content("index.html")
        if self._needs_key:
            page = page.replace(b'data-key="none"', b'data-key="needed"', 1)
        return Response(page, headers=_HEADERS, mimetype="text/html")

    @route("GET", f"{PAGE_FILES_PREFIX}<name>")
    def file(self, name: str) -> Result:
        """Return one of the page's other files."""
        if name not in _MIME_TYPES:
            raise HTTPError(404, f"the page has no file {name!r:.100}")
        return Response(_content(name), headers=_HEADERS, mimetype=_MIME_TYPES[name])

    @route("GET", "/page/state")
    def state(self) -> Result:
        """Return what is new since the cursor in the query; everything without one."""
        return self._state.since(request.args.get("since", ""))


@functools.cache
def _content(name: str) -> bytes:
    content = pkgutil.get_data(__package__, name)  # works in a zip file, too
    if content is None:
        raise FileNotFoundError(name)
    return content
