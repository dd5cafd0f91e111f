"""Ask a server whether it hears heartbeats, and that the historic wrong paths are none.

Runs on an embedded server without a model, or on the one that TINKER_BASE_URL names.  In one old
SDK every heartbeat went to a wrong path; its 404s were ignored, and no session was kept alive.
"""

from __future__ import annotations

import os

import requests

import tinkex

RIGHT = "/api/v1/session_heartbeat"
WRONG = ("/api/v1/heartbeat", "/api/v1/session/heartbeat")


def connect() -> tinkex.ServiceClient:
    """Open a session."""
    if "TINKER_BASE_URL" in os.environ:
        return tinkex.ServiceClient()
    return tinkex.ServiceClient.local("deterministic")


def main() -> None:
    """Send one heartbeat to each path."""
    with connect() as service:
        config = service.config
        headers = {"X-API-Key": config.api_key} if config.api_key else {}
        for path, wanted in [(RIGHT, 200), *((path, 404) for path in WRONG)]:
            beat = {"session_id": service.session_id, "type": "session_heartbeat"}
            answer = requests.post(config.base_url + path, json=beat, headers=headers, timeout=10)
            print(f"POST {path:27} {answer.status_code}")
            if answer.status_code != wanted:
                raise SystemExit(f"{path} answered {answer.status_code}, not {wanted}")


if __name__ == "__main__":
    main()
