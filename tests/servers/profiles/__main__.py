"""``python -m servers.profiles NAME``: one of the imitated servers, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from servers.profiles import NAMES, ProfiledServer

from tinkex.local import load_engine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m servers.profiles", description=__doc__)
    parser.add_argument("profile", choices=NAMES)
    parser.add_argument("--model", default="deterministic")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    engine = load_engine(asked.model)
    server = ProfiledServer(engine, profile=asked.profile, port=asked.port, api_key=asked.api_key)
    with server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
