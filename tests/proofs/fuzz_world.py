"""The servers to which tests/proofs/fuzz.py sends requests, with objects of every kind on them."""

from __future__ import annotations

import importlib
import io
import itertools
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional
from urllib.parse import unquote_to_bytes, urlsplit

import orjson
from proofs import fuzz_requests as requests
from proofs.fuzz_requests import Sent

from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.http.serving import _ApplicationTask, _Parser
from tinkex.local.settings import ClientFlags, SamplingLimits, ServerSettings
from tinkex.local.state.futures import Failure, Waiting
from tinkex.wire.codec import JSON_CONTENT_TYPE

#: The contents of a file beside the server's folder; no response may contain it.
OUTSIDE = b"this is not the server's to give"
#: The largest body that the servers accept.
MAX_BODY_BYTES = 4 << 20
#: A result may take this long, in seconds, on a busy machine.
RESULT_S = 300.0


class Reply(NamedTuple):
    """A response."""

    status: int
    headers: Dict[str, str]
    body: bytes


class _Server(LocalServer):
    """A server whose WSGI application can be called without a socket."""

    app: Any = None

    def _assemble(self, *args: Any) -> Any:
        assembled = super()._assemble(*args)
        self.app = assembled[1]
        return assembled


class World:
    """A server with objects of every kind, and a client of it without sockets.

    Args:
        folder: gets the server's folder, and a file beside it.
        api_key: the server's key, or None.
        custom_losses: whether to offer them; they need torch.
    """

    def __init__(self, folder: Path, api_key: Optional[str], custom_losses: bool) -> None:
        if custom_losses:
            importlib.import_module("torch")  # before the first request that needs it
        self._folder = folder
        self.api_key = api_key
        (folder / "outside").write_bytes(OUTSIDE)
        settings = ServerSettings(
            jwt=api_key is not None,
            flags=ClientFlags(custom_loss_server_side=custom_losses),
            retrieve_hold_s=0.0,
            missing_seq_id_s=0.0,
            max_body_bytes=MAX_BODY_BYTES,
            session_ttl_s=3600.0,
            limits=SamplingLimits(gather_s=0.0, gather_most_s=0.0, max_num_samples=64),
        )
        engine = DeterministicEngine(vocab_size=1000, context_length=128)
        self.server = _Server(engine, data_dir=folder / "data", api_key=api_key, settings=settings)
        self.server.start()
        self.backend = self.server._backend
        self._numbers = itertools.count(1)
        self.names: Dict[str, str] = {}
        self.refill(custom_losses)

    def close(self) -> None:
        """End the server."""
        self.server.close()

    def call(self, sent: Sent) -> Reply:
        """Have the application respond."""
        path = unquote_to_bytes(sent.path).decode("latin-1")
        environ: Dict[str, Any] = {
            "REQUEST_METHOD": sent.method, "SCRIPT_NAME": "", "PATH_INFO": path,
            "QUERY_STRING": sent.query, "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "127.0.0.1", "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(sent.body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
            "wsgi.input_terminated": True, "CONTENT_LENGTH": str(len(sent.body)),
        }  # fmt: skip
        for name, value in sent.headers.items():
            name = name.upper().replace("-", "_")
            environ[name if name == "CONTENT_TYPE" else f"HTTP_{name}"] = value
        return self.respond(environ)

    def respond(self, environ: Dict[str, Any]) -> Reply:
        """Have the application respond to a WSGI request."""
        started: List[Any] = []

        def start_response(status: str, headers: Any, exc_info: Any = None) -> None:
            started[:] = [int(status[:3]), {name.lower(): value for name, value in headers}]

        parts = self.server.app(environ, start_response)
        try:
            body = b"".join(parts)
        finally:
            getattr(parts, "close", int)()
        return Reply(started[0], started[1], body)

    def headers(self) -> Dict[str, str]:
        """Return the headers of a client that may do everything."""
        headers = {"Host": "127.0.0.1:8642", "Content-Type": JSON_CONTENT_TYPE}
        return headers if self.api_key is None else {**headers, "X-API-Key": self.api_key}

    def post(self, path: str, /, **body: Any) -> Any:
        """Send a request that must be accepted; return the response, or the queued result."""
        sent = Sent("POST", f"/api/v1/{path}", self.headers(), orjson.dumps(body))
        reply = self.call(sent)
        assert reply.status == 200, (path, reply)
        value = orjson.loads(reply.body)
        if "request_id" in value:
            outcome = self.backend.futures.wait(value["request_id"], RESULT_S)
            assert not isinstance(outcome, (Failure, Waiting, type(None))), (path, outcome)
            if isinstance(outcome.value, dict):
                value = {**value, **outcome.value}
        return value

    def refill(self, custom_losses: bool) -> None:
        """Recreate the objects that the requests have ended or deleted."""
        try:
            self._refill(custom_losses)
        except AssertionError:  # a request to unload the model was waiting in its queue
            self.names["MODEL"] = ""
            self._refill(custom_losses)

    def _refill(self, custom_losses: bool) -> None:
        names, model = self.names, self.names.get("MODEL", "")
        if "SESSION" not in names or not self.backend._sessions.alive(names["SESSION"], 0.0):
            names["SESSION"] = self.post("create_session")["session_id"]
        session = names["SESSION"]
        names["SPARE"] = self.post("create_session")["session_id"]
        lane = self.backend.scheduler._models.get(model)
        if lane is None or lane.closed or not model.startswith(session):
            model = names["MODEL"] = self.post(
                "create_model", session_id=session, model_seq_id=self.number(),
                base_model="deterministic", lora_config={"rank": 8},
            )["model_id"]  # fmt: skip
        for name, route, label in (
            ("kept", "save_weights", "WEIGHTS"), ("spare", "save_weights", ""),
            ("drawn", "save_weights_for_sampler", "DRAWN"), ("out", "save_weights_external", ""),
        ):  # fmt: skip
            made = self.post(
                route, model_id=model, seq_id=self.next_seq(), path=name, overwrite=True
            )
            names[label or "REQUEST"] = made["path" if label else "request_id"]
        if custom_losses:
            number, valid = self.number(), {path: body for _, path, body in requests.VALID}
            loss = self.filled(valid["/api/v1/create_custom_loss"])
            self.post("create_custom_loss", **{**loss, "custom_loss_seq_id": number})
            names["LOSS"] = f"{session}:loss:{number}"
        names["SAMPLER"] = self.post(
            "create_sampling_session", session_id=session, base_model="deterministic",
            sampling_session_seq_id=self.number(),
        )["sampling_session_id"]  # fmt: skip
        checkpoints = f"/api/v1/training_runs/{model}/checkpoints"
        for label, path in (
            ("@archive", f"{checkpoints}/weights/kept/archive"),
            ("@file", f"{checkpoints}/external_weights/out/external_weights_urls"),
        ):
            found = orjson.loads(self.call(Sent("GET", path, self.headers(), b"")).body)
            url = found["url"] if "url" in found else min(found["urls"].values())
            parts = urlsplit(url)
            names[label] = f"{parts.path}?{parts.query}"

    def number(self) -> int:
        """Return a number that was not used before."""
        return next(self._numbers)

    def next_seq(self) -> int:
        """Return the next seq_id of MODEL."""
        lane = self.backend.scheduler._models.get(self.names["MODEL"])
        return 1 if lane is None else int(lane.next_seq)

    def filled(self, value: Any) -> Any:
        """Replace placeholders by the objects they stand for."""
        if isinstance(value, dict):
            return {name: self.filled(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.filled(item) for item in value]
        if not isinstance(value, str):
            return value
        if value in ("@seq", "@number"):
            return self.next_seq() if value == "@seq" else self.number()
        if value == "@name":
            return f"n{self.number()}"
        for name, thing in self.names.items():
            value = value.replace(name, thing)
        return value

    def touched_outside(self) -> List[str]:
        """Return the files beside the server's folder that are new or were changed."""
        found = sorted(path.name for path in self._folder.iterdir())
        if found == ["data", "outside"] and (self._folder / "outside").read_bytes() == OUTSIDE:
            return []
        return found

    def parsed(self, raw: bytes) -> Optional[Dict[str, Any]]:
        """Return the WSGI request into which waitress parses *raw*, received in two pieces."""
        http = self.server._http
        parser = _Parser(_admission(self.server), http.adj)
        for data in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
            while data and not parser.completed:
                taken = parser.received(data)
                data = data[taken:]
                if not taken:
                    break
        if not parser.completed or parser.error or parser.empty:
            return None
        channel = _Channel(http)
        environ: Dict[str, Any] = _ApplicationTask(channel, parser).get_environment()
        return environ


class _Channel:
    """The parts of a connection that a waitress task needs."""

    addr = ("127.0.0.1", 1)
    creation_time = 0.0
    access_log = None

    def __init__(self, server: Any) -> None:
        self.server = server
        self.adj = server.adj

    def check_client_disconnected(self) -> bool:
        """Report that the client is still connected."""
        return False


def _admission(server: LocalServer) -> Any:
    return server._http.channel_class.args[0]
