"""Check that a server accepts heartbeats, and rejects those sent to wrong paths of the past.

Runs on an embedded server without a model, or on the server in TINKER_BASE_URL.  An old SDK sent
every heartbeat to a wrong path and ignored the 404s, so no session was kept alive.
"""

from __future__ import annotations

import os
import sys

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
        for path, expected in [(RIGHT, 200), *((path, 404) for path in WRONG)]:
            beat = {"session_id": service.session_id, "type": "session_heartbeat"}
            response = requests.post(config.base_url + path, json=beat, headers=headers, timeout=10)
            print(f"POST {path:27} {response.status_code}")
            if response.status_code != expected:
                raise SystemExit(f"{path} responded with {response.status_code}, not {expected}")


if __name__ == "__main__":
    try:
        main()
    except (tinkex.TinkexError, requests.RequestException) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
