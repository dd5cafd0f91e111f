"""Fuzz the embedded server with mutated requests of every route, in both dialects.

``python tests/proofs/fuzz.py --bodies 1000000`` prints what was sent and found, and exits with 1 if
the server failed (a 500, a logged error, an unreadable response, a failed result although the
request was right), served a request that it must refuse (without its key, from a web page, for a
forged URL), took too long or too much memory, or touched a file outside its folder.

A round is 1000 requests to a fresh server, determined by the seed and the number of the round:
    ``--seed 0 --only 17`` repeats the requests of round 17.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
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
from typing import Any, Callable, Counter, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import unquote_to_bytes

import orjson

sys.path.append(str(Path(__file__).parents[1]))
from proofs.fuzz_draw import KEY, KINDS, as_bytes, drawn
from proofs.fuzz_heads import change_wire
from proofs.fuzz_requests import VALID, Sent
from proofs.fuzz_world import OUTSIDE, Reply, World

from tinkex.local.state.futures import Failure, Waiting
from tinkex.wire.codec import JSON_CONTENT_TYPE

#: Requests per round.
PER_ROUND = 1000
#: A request may take this long, in seconds, on a busy machine.
SLOW_S = 10.0
#: A single request may raise the process's peak memory by this much.
MAX_GROWTH_BYTES = 256 << 20
#: Without progress for this long, in seconds, a process prints its stacks and ends.
HANG_S = 300.0


class Fault(NamedTuple):
    """A fault of the server: where it appeared, and with which request."""

    round: int
    index: int
    what: str
    sent: str


@dataclasses.dataclass
class Findings:
    """What was sent and found.

    Attributes:
        statuses: the responses' statuses, by kind of change.
        served: the number of 2xx responses, by rule of the application.
        rules: all rules of the application.
        peak_bytes: the peak memory of the process.
        slowest: the time of the slowest request, in seconds, and the request.
    """

    bodies: int = 0
    statuses: Counter[Tuple[str, int]] = dataclasses.field(default_factory=collections.Counter)
    served: Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rules: List[str] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    slowest: Tuple[float, str] = (0.0, "")
    faults: List[Fault] = dataclasses.field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Add the findings of another round."""
        self.bodies += other.bodies
        self.statuses += other.statuses
        self.served += other.served
        self.rules = sorted({*self.rules, *other.rules})
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.slowest = max(self.slowest, other.slowest)
        self.faults += other.faults

    def never_served(self) -> List[str]:
        """The rules that refused every request unintentionally, because no request was valid."""
        return [
            rule
            for rule in self.rules
            if not self.served[rule]
            and rule != "DELETE /api/v1/auth/apikey/me"
            and not rule.endswith("v1/<path:path>")  # routes of OpenAI that this server lacks
        ]


class _Errors(logging.Handler):
    """Records logged errors, with their tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.found: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


# One round


class Round:
    """Sends the requests of one round, and finds faults in the responses."""

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
            except Exception as error:  # the application must never let an exception through
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
        raw = change_wire(self._rng, as_bytes(sent))
        if self._rng.random() < 0.02:
            self._over_a_socket(raw)
        environ = self._world.parsed(raw)
        return None if environ is None else self._world.respond(environ)

    def _over_a_socket(self, raw: bytes) -> None:
        """Send *raw*, followed by a valid request, and hang up; the server need only survive."""
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
        """Check the results of queued work, and that the server still works."""
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
            for method, path, _ in VALID:
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
    except Exception:  # not a valid path in a URL, so no rule serves it
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
    """Send the requests of round *number* to a fresh server."""
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
    """Have the process print its stacks and end unless this is called again within HANG_S."""
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
    for kind in KINDS:
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
