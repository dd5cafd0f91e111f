"""A web worker: Flask in front of a model, with one ServiceClient for all requests.

    python examples/flask_worker.py                            # on the embedded server
    python examples/flask_worker.py --base-url URL --model NAME --port 8080
    curl -d '{"prompt": [1, 2, 3]}' -H 'Content-Type: application/json' http://127.0.0.1:8080/sample

Clients are thread-safe.  A server that forks (gunicorn, uWSGI) must open its client after the fork:
call `create_app` in the worker.  SIGTERM and Ctrl-C end the session and exit.  Needs flask and
waitress, which the extras "local" and "testing" install.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Dict, Tuple

import flask
import waitress

import tinkex
from tinkex.types import ModelInput, SamplingParams


def create_app(service: tinkex.ServiceClient, model: str) -> flask.Flask:
    """Return the application: ``POST /sample`` continues a prompt of token ids."""
    app = flask.Flask(__name__)
    sampler = service.create_sampling_client(base_model=model)

    @app.post("/sample")
    def sample() -> Tuple[Any, int]:
        body = flask.request.get_json()
        try:
            prompt = ModelInput.from_ints(body["prompt"])
            params = SamplingParams(max_tokens=16, seed=body.get("seed"))
            sequence = sampler.sample(prompt, 1, params).result(timeout=60).sequences[0]
        except (KeyError, TypeError, tinkex.InvalidInputError) as error:
            return {"error": f"bad request: {error}"}, 400
        except (tinkex.TinkexError, FutureTimeoutError) as error:
            app.logger.error("sampling failed: %s", error)
            return {"error": "sampling failed"}, 502
        return {"tokens": sequence.tokens}, 200

    @app.get("/status")
    def status() -> Tuple[Any, int]:
        metrics = service.metrics()
        return {"session": service.session_id, "in_flight": metrics.in_flight}, 200

    return app


def connect(options: argparse.Namespace) -> tinkex.ServiceClient:
    """Open a session on the given server, or on one started here."""
    if options.base_url:
        return tinkex.ServiceClient(base_url=options.base_url)
    return tinkex.ServiceClient.local(options.model)


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL"))
    parser.add_argument("--port", type=int, default=8080, help="0 is any free one")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with connect(options) as service:
        app = create_app(service, options.model)
        sockets: Dict[int, Any] = {}  # the listening socket and the connections
        server = waitress.create_server(
            app, map=sockets, host="127.0.0.1", port=options.port, threads=8
        )
        try:
            print(f"listening on http://127.0.0.1:{server.effective_port}", flush=True)
            server.run()
        finally:
            for each in list(sockets.values()):
                each.close()


if __name__ == "__main__":
    try:
        main()
    except tinkex.TinkexError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
