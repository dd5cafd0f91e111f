"""Fuzz the embedded server: valid requests of every route, changed, in both dialects.

``python tests/proofs/fuzz.py --bodies 1000000`` prints what was sent and found, and exits with 1 if
the server failed (a 500, an error that was logged, a response that cannot be read, a result that
failed for no fault of the request), did what must be refused (without its key, from a web page, for
a forged URL), took too long or too much memory, or touched a file outside its folder.

A round is 1000 requests to a server of its own, and follows from the seed and the number of the
round: ``--seed 0 --only 17`` sends the requests of round 17 again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import importlib
import io
import itertools
import logging
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any, Callable, Counter, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import unquote_to_bytes, urlsplit

import orjson

sys.path.append(str(Path(__file__).parents[1]))
from proofs import fuzz_requests as requests
from proofs.fuzz_requests import Sent

from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.http.serving import _ApplicationTask, _Parser
from tinkex.local.settings import ClientFlags, SamplingLimits, ServerSettings
from tinkex.local.state.futures import Failure, Waiting
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE

KEY = "tml-fuzz-5a1f0c2e"
#: In a file beside the server's folder; no response may contain it.
OUTSIDE = b"this is not the server's to give"
#: Requests of a round.
PER_ROUND = 1000
#: Largest body that the servers take.
MAX_BODY_BYTES = 4 << 20
#: A request may take this long, in seconds, on a busy machine.
SLOW_S = 10.0
#: One request may raise the peak of the process's memory by this much.
MAX_GROWTH_BYTES = 256 << 20
#: Without progress for this long, a process prints its stacks and ends, in seconds.
HANG_S = 300.0


class Reply(NamedTuple):
    """A response."""

    status: int
    headers: Dict[str, str]
    body: bytes


class Fault(NamedTuple):
    """Something that went wrong: where, and with which request."""

    round: int
    index: int
    what: str
    sent: str


@dataclasses.dataclass
class Findings:
    """What was sent and found.

    Attributes:
        statuses: of each kind of change.
        served: 2xx responses by rule of the application.
        rules: all rules of the application.
        peak_bytes: memory of the process, at most.
        slowest: seconds of the slowest request, and the request.
    """

    bodies: int = 0
    statuses: Counter[Tuple[str, int]] = dataclasses.field(default_factory=collections.Counter)
    served: Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rules: List[str] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    slowest: Tuple[float, str] = (0.0, "")
    faults: List[Fault] = dataclasses.field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take in those of another round."""
        self.bodies += other.bodies
        self.statuses += other.statuses
        self.served += other.served
        self.rules = sorted({*self.rules, *other.rules})
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.slowest = max(self.slowest, other.slowest)
        self.faults += other.faults

    def never_served(self) -> List[str]:
        """Rules that refused every request, and not on purpose: the requests were not valid."""
        return [
            rule
            for rule in self.rules
            if not self.served[rule]
            and rule != "DELETE /api/v1/auth/apikey/me"
            and not rule.endswith("v1/<path:path>")  # what OpenAI has and this server has not
        ]


class _Server(LocalServer):
    """A server whose WSGI application can be called without a socket."""

    app: Any = None

    def _assemble(self, *args: Any) -> Any:
        assembled = super()._assemble(*args)
        self.app = assembled[1]
        return assembled


class _Errors(logging.Handler):
    """Keeps what is logged as an error, with its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.found: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


class World:
    """A server that has something of everything, and a client of it without sockets.

    Args:
        folder: gets the server's folder, and a file beside it.
        api_key: the server's key, or None.
        custom_losses: offer them; they need torch.
    """

    def __init__(self, folder: Path, api_key: Optional[str], custom_losses: bool) -> None:
        if custom_losses:
            importlib.import_module("torch")  # not within the first request that needs it
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
        """The headers of a client that may do everything."""
        headers = {"Host": "127.0.0.1:8642", "Content-Type": JSON_CONTENT_TYPE}
        return headers if self.api_key is None else {**headers, "X-API-Key": self.api_key}

    def post(self, path: str, /, **body: Any) -> Any:
        """Send what must be accepted; return the response, or the result if it is queued."""
        sent = Sent("POST", f"/api/v1/{path}", self.headers(), orjson.dumps(body))
        reply = self.call(sent)
        assert reply.status == 200, (path, reply)
        value = orjson.loads(reply.body)
        if "request_id" in value:
            outcome = self.backend.futures.wait(value["request_id"], HANG_S)
            assert not isinstance(outcome, (Failure, Waiting, type(None))), (path, outcome)
            if isinstance(outcome.value, dict):
                value = {**value, **outcome.value}
        return value

    def refill(self, custom_losses: bool) -> None:
        """Make again what the requests have ended or deleted."""
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
        """A number that was not used before."""
        return next(self._numbers)

    def next_seq(self) -> int:
        """The seq_id that is next in MODEL."""
        lane = self.backend.scheduler._models.get(self.names["MODEL"])
        return 1 if lane is None else int(lane.next_seq)

    def filled(self, value: Any) -> Any:
        """Replace names by what they stand for."""
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
        """What is beside the server's folder and was not, or was changed."""
        found = sorted(path.name for path in self._folder.iterdir())
        if found == ["data", "outside"] and (self._folder / "outside").read_bytes() == OUTSIDE:
            return []
        return found

    def parsed(self, raw: bytes) -> Optional[Dict[str, Any]]:
        """Return the WSGI request that waitress makes of *raw*, which comes in two pieces."""
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
    """What a task of waitress needs of its connection."""

    addr = ("127.0.0.1", 1)
    creation_time = 0.0
    access_log = None

    def __init__(self, server: Any) -> None:
        self.server = server
        self.adj = server.adj

    def check_client_disconnected(self) -> bool:
        """No: it listens."""
        return False


def _admission(server: LocalServer) -> Any:
    return server._http.channel_class.args[0]


# Requests


def valid(world: World, rng: Random, index: int) -> Tuple[Sent, Any]:
    """Return a valid request, and its JSON body; each in turn, then any."""
    place = index if index < len(requests.VALID) else rng.randrange(len(requests.VALID))
    method, path, body = requests.VALID[place]
    path, _, query = world.filled(path).partition("?")
    body = world.filled(body)
    raw = b"" if body is None else orjson.dumps(body)
    return Sent(method, path, world.headers(), raw, query), body


def drawn(world: World, rng: Random, index: int) -> Tuple[str, Sent]:
    """Return the kind of a change, and a request that was changed so."""
    sent, body = valid(world, rng, index)
    kind = "valid" if index < len(requests.VALID) else rng.choices(_KINDS, _WEIGHTS)[0]
    if kind == "protobuf":
        sent.path = rng.choice(("/api/v1/forward_backward", "/api/v1/forward"))
        sent.method, sent.query = "POST", ""
        sent.headers["Content-Type"] = rng.choice((PROTOBUF_CONTENT_TYPE, "application/protobuf"))
        message = requests.pass_message(rng, world.names["MODEL"], world.next_seq())
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            requests.change_message(rng, message)
        sent.body = message.SerializeToString()
        if rng.random() < 0.3:
            sent.body = requests.change_bytes(rng, sent.body)
        if rng.random() < 0.1:
            encoding, sent.body = requests.compress(rng, sent.body)
            sent.headers["Content-Encoding"] = encoding
    elif kind == "stranger":
        _make_strange(world, rng, sent)
    elif kind == "headers":
        requests.change_head(rng, sent)
    elif body is not None and kind in _CHANGES_OF_BODIES:
        if kind == "values":
            sent.body = requests.dump(world.filled(requests.change_value(rng, body)))
        elif kind == "bytes":
            sent.body = requests.change_bytes(rng, sent.body)
        elif kind == "text":
            sent.body = requests.change_text(rng, sent.body)
        else:
            encoding, sent.body = requests.compress(rng, sent.body)
            sent.headers["Content-Encoding"] = encoding
            if rng.random() < 0.3:
                requests.change_head(rng, sent)
    return kind, sent


_KINDS = (
    "valid",
    "values",
    "bytes",
    "text",
    "compressed",
    "protobuf",
    "headers",
    "stranger",
    "wire",
)
_WEIGHTS = (4, 40, 8, 4, 6, 16, 10, 4, 8)
_CHANGES_OF_BODIES = ("values", "bytes", "text", "compressed")


def _make_strange(world: World, rng: Random, sent: Sent) -> None:
    """Make *sent* one that must be refused for who sends it."""
    sent.must_fail = True
    if sent.path.startswith("/signed/"):
        query = dict(pair.split("=") for pair in sent.query.split("&"))
        name = rng.choice(("expires", "signature"))
        query[name] = rng.choice((
            "", "0", "9" * 30, "%ff", "x" * 64, "0" * 64, query[name][:-1], query[name] + "0",
        ))  # fmt: skip
        if rng.random() < 0.3:
            query, sent.path = (
                dict(pair.split("=") for pair in sent.query.split("&")),
                sent.path + "x",
            )
        sent.query = "&".join(f"{name}={value}" for name, value in query.items())
    elif world.api_key is None:
        sent.headers.update(rng.choice(requests.FOREIGN))
        if sent.method != "GET" and rng.random() < 0.5:
            sent.headers = {**world.headers(), **rng.choice(requests.CROSS_SITE)}
    elif sent.path == "/api/v1/healthz":
        sent.must_fail = False
    else:
        del sent.headers["X-API-Key"]
        key = rng.choice((
            "", "x", KEY[:-1], KEY + "x", KEY.upper(), "eyJ", "eyJ.eyJ.x",
            "eyJhbGciOiJub25lIn0.e30.",
            "eyJ" + "x" * 5000, "\xff", "\x00", f"{KEY},{KEY}",
        ))  # fmt: skip
        sent.headers[rng.choice(("X-API-Key", "Authorization", "Cookie"))] = rng.choice(
            (key, f"Bearer {key}", f"Basic {key}")
        )


def as_bytes(sent: Sent) -> bytes:
    """Return the HTTP request."""
    target = sent.path + ("?" + sent.query if sent.query else "")
    head = f"{sent.method} {target} HTTP/1.1\r\n"
    for name, value in {**sent.headers, "Content-Length": str(len(sent.body))}.items():
        head += f"{name}: {value}\r\n"
    return head.encode("utf-8", "replace") + b"\r\n" + sent.body


# One round


class Round:
    """Sends the requests of one round, and finds what is wrong with the responses."""

    def __init__(
        self,
        world: World,
        seed: int,
        number: int,
        findings: Findings,
        alive: Callable[[], None],
    ) -> None:
        self._world = world
        self._alive = alive
        self._number = number
        self._rng = Random(f"{seed}:{number}")
        self._findings = findings
        self._queued: List[Tuple[int, str, str]] = []

    def run(self, bodies: int, errors: _Errors, custom_losses: bool) -> None:
        """Send *bodies* requests."""
        findings = self._findings
        for index in range(bodies):
            if index % 100 == 99:
                self._world.refill(custom_losses)
                self._alive()
            kind, sent = drawn(self._world, self._rng, index)
            shown, began, peak = str(sent), time.perf_counter(), _peak_bytes()
            try:
                reply = self._send(kind, sent)
            except Exception as error:  # the application must never let one through
                self._fault(index, f"{type(error).__name__}: {error}", shown)
                continue
            seconds = time.perf_counter() - began
            findings.bodies += 1
            findings.slowest = max(findings.slowest, (seconds, shown))
            if seconds > SLOW_S:
                self._fault(index, f"took {seconds:.1f} s", shown)
            if _peak_bytes() - peak > MAX_GROWTH_BYTES:
                self._fault(index, f"took {(_peak_bytes() - peak) >> 20} MiB", shown)
            findings.statuses[kind, 0 if reply is None else reply.status] += 1
            if reply is not None:
                for what in self._wrong_with(index, sent, reply):
                    self._fault(index, what, shown)
            for error_text in errors.found:
                self._fault(index, error_text, shown)
            errors.found.clear()
        self._finish(errors)

    def _send(self, kind: str, sent: Sent) -> Optional[Reply]:
        if kind != "wire":
            return self._world.call(sent)
        raw = requests.change_wire(self._rng, as_bytes(sent))
        if self._rng.random() < 0.02:
            self._over_a_socket(raw)
        environ = self._world.parsed(raw)
        return None if environ is None else self._world.respond(environ)

    def _over_a_socket(self, raw: bytes) -> None:
        """Send *raw*, with a valid request behind it, and hang up: only the server must stay."""
        address = ("127.0.0.1", int(self._world.server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=SLOW_S) as connection:
            connection.settimeout(0.05)
            with contextlib.suppress(OSError):
                connection.sendall(raw)
                connection.recv(1 << 16)

    def _wrong_with(self, index: int, sent: Sent, reply: Reply) -> Iterator[str]:
        if reply.status >= 500 and not (reply.status == 501 and b"not installed" in reply.body):
            yield f"{reply.status}: {reply.body[:500]!r}"
        if sent.must_fail and reply.status < 400:
            yield f"{reply.status} for what must be refused"
        if any(name.startswith("access-control-") for name in reply.headers):
            yield "the response lets pages of other sites read it"
        if OUTSIDE in reply.body:
            yield "the response has a file from outside the server's folder"
        if b'"server_error"' in reply.body:
            yield f"the stream failed: {reply.body[-500:]!r}"
        if reply.headers.get("content-type", "").startswith(JSON_CONTENT_TYPE) and reply.body:
            try:
                value = orjson.loads(reply.body)
            except orjson.JSONDecodeError as error:
                yield f"{reply.status}, but its JSON is not valid: {error}: {reply.body[:300]!r}"
                return
            if reply.status >= 400 and not (isinstance(value, dict) and value):
                yield f"{reply.status} without a reason"
            if reply.status == 200 and isinstance(value, dict) and "request_id" in value:
                self._queued.append((index, str(value["request_id"]), str(sent)))
        elif reply.status >= 400 and reply.body:
            yield f"{reply.status} that is not JSON: {reply.headers} {reply.body[:300]!r}"
        if reply.status < 400:
            path = unquote_to_bytes(sent.path).decode("utf-8", "replace")
            self._findings.served[_rule_of(self._world, sent.method, path)] += 1

    def _finish(self, errors: _Errors) -> None:
        """Check the results of what was queued, and that the server works."""
        world = self._world
        for index, request_id, shown in self._queued:
            outcome = world.backend.futures.wait(request_id, 0.0)
            if isinstance(outcome, Waiting):
                # A gap before its seq_id is reported once a client polls for its result.
                world.backend.scheduler.refuse_early(outcome.owner)
                outcome = world.backend.futures.wait(request_id, SLOW_S)
            if isinstance(outcome, Waiting):
                self._fault(index, f"{request_id} has no result", shown)
            elif isinstance(outcome, Failure) and outcome.category != "user":
                self._fault(index, f"{request_id} failed: {outcome.message}", shown)
        try:
            world.refill(False)
            for method, path, _ in requests.VALID:
                if method == "GET" and "@" not in path:
                    reply = world.call(Sent("GET", world.filled(path), world.headers(), b""))
                    assert reply.status < 300 or "archive" in path, (path, reply)
        except Exception as error:
            self._fault(-1, f"after the round, the server does not work: {error!r}", "")
        if world.touched_outside():
            self._fault(-1, f"files outside the server's folder: {world.touched_outside()}", "")
        for text in errors.found:
            self._fault(-1, text, "")
        errors.found.clear()

    def _fault(self, index: int, what: str, shown: str) -> None:
        self._findings.faults.append(Fault(self._number, index, what, shown))


def _rule_of(world: World, method: str, path: str) -> str:
    try:
        adapter = world.server.app.url_map.bind("localhost")
        rule, _ = adapter.match(path, method, return_rule=True)
    except Exception:  # not a path that a URL can have: served by none of them
        return ""
    return f"{method} {rule.rule}"


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _nothing() -> None:
    """Do nothing."""


def run_round(
    seed: int,
    number: int,
    bodies: int = PER_ROUND,
    custom_losses: bool = True,
    alive: Callable[[], None] = _nothing,
) -> Findings:
    """Send the requests of round *number* to a server of their own."""
    findings, errors = Findings(), _Errors()
    loggers = [logging.getLogger(name) for name in ("tinkex", "waitress")]
    for logger in loggers:
        logger.addHandler(errors)
    try:
        with tempfile.TemporaryDirectory(prefix="tinkex-fuzz-") as folder:
            world = World(Path(folder), KEY if number % 2 else None, custom_losses)
            try:
                Round(world, seed, number, findings, alive).run(bodies, errors, custom_losses)
                for rule in world.server.app.url_map.iter_rules():
                    findings.rules += [
                        f"{method} {rule.rule}" for method in rule.methods - {"HEAD", "OPTIONS"}
                    ]
            finally:
                world.close()
    finally:
        for logger in loggers:
            logger.removeHandler(errors)
    findings.peak_bytes = _peak_bytes()
    return findings


# The command


def _watched() -> None:
    """Have the process print its stacks and end if this is not called again for HANG_S."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)


def _work(seed: int, rounds: Any, results: Any, custom_losses: bool) -> None:
    logging.getLogger("tinkex").propagate = False
    logging.getLogger("waitress").propagate = False
    for number in iter(rounds.get, None):
        _watched()
        try:
            results.put(run_round(seed, number, custom_losses=custom_losses, alive=_watched))
        except Exception:
            fault = Fault(number, -1, f"the round failed: {traceback.format_exc()}", "")
            results.put(Findings(faults=[fault]))
    faulthandler.cancel_dump_traceback_later()


def fuzz(seed: int, numbers: List[int], processes: int, custom_losses: bool) -> Findings:
    """Run rounds in *processes*, and print faults as they are found."""
    spawning = multiprocessing.get_context("spawn")
    rounds, results = spawning.Queue(), spawning.Queue()
    for item in [*numbers, *[None] * processes]:
        rounds.put(item)
    workers = [
        spawning.Process(target=_work, args=(seed, rounds, results, custom_losses), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    total, began, shown_at = Findings(), time.monotonic(), 0.0
    for done in range(1, len(numbers) + 1):
        while results.empty():
            time.sleep(0.05)
            if not any(worker.is_alive() for worker in workers) and results.empty():
                total.faults.append(Fault(-1, -1, "a process hung or died; see its stacks", ""))
                return total
        found = results.get()
        for fault in found.faults:
            print(f"FAULT --seed {seed} --only {fault.round} request {fault.index}: {fault.what}")
            print(f"    {fault.sent}", flush=True)
        total.add(found)
        if time.monotonic() - shown_at > 60 or done == len(numbers):
            shown_at = time.monotonic()
            rate = total.bodies / (shown_at - began)
            print(
                f"{total.bodies} requests, {rate:.0f}/s, peak {total.peak_bytes >> 20} MiB, "
                f"{len(total.faults)} faults",
                flush=True,
            )
    for worker in workers:
        worker.join()
    return total


def _report(seed: int, total: Findings) -> None:
    statuses = sorted({status for _, status in total.statuses})
    print(f"\nseed {seed}; 0: not a complete HTTP request")
    print(f"{'change':12}" + "".join(f"{status:>8}" for status in statuses))
    for kind in _KINDS:
        print(f"{kind:12}" + "".join(f"{total.statuses[kind, status]:>8}" for status in statuses))
    print(f"slowest: {total.slowest[0]:.2f} s  {total.slowest[1]:.200}")
    print(f"peak memory of a process: {total.peak_bytes >> 20} MiB")


def main() -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this round alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-custom-losses", action="store_true", help="do without torch")
    options = parser.parse_args()
    numbers = list(range(-(-options.bodies // PER_ROUND)))
    if options.only is not None:
        numbers = [options.only]
    total = fuzz(
        options.seed, numbers, min(options.processes, len(numbers)), not options.no_custom_losses
    )
    _report(options.seed, total)
    never = total.never_served()
    if never:
        print("never served:", *never, sep="\n    ")
    print(f"{total.bodies} requests, {len(total.faults)} faults")
    return bool(total.faults or never)


if __name__ == "__main__":
    sys.exit(main())
