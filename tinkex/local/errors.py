"""HTTPError: a request to the embedded server that fails, as an HTTP response.

Raised anywhere below the routes; the application turns it into ``{"detail": ...}``.
"""

from __future__ import annotations

from typing import Mapping, Optional


class HTTPError(Exception):
    """A request that cannot be served: HTTP *status*, and a *detail* that names the remedy.

    *headers* go into the response.
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
