"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any, Dict, Optional

from tinkex.local.errors import HTTPError

_TYPES = {429: "rate_limit_error", 403: "permission_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class OpenAIError(HTTPError):
    """A request that cannot be served; *param* names the parameter at fault."""

    def __init__(
        self, detail: str, param: Optional[str] = None, *, status: int = 400, code: str = ""
    ) -> None:
        super().__init__(status, detail)
        self.param = param
        self.code = code or None


def error_body(problem: HTTPError) -> Dict[str, Any]:
    """Return the JSON of *problem*, whichever part of the server raised it."""
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": problem.detail,
            "type": _TYPES.get(problem.status, kind),
            "param": getattr(problem, "param", None),
            "code": getattr(problem, "code", None) or _CODES.get(problem.status),
        }
    }
