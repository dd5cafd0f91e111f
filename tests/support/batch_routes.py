"""A poller for a server that wants batch polling, with completions that a test scripts."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple

from support.pending import ScriptedRequest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.transports import open_resources
from tinkex._api._call import read
from tinkex._results.pending import SamplerId
from tinkex._results.poller import Poller
from tinkex._transport.request import Reply
from tinkex.errors import ClientClosedError
from tinkex.futures import APIFuture
from tinkex.types import SaveWeightsResponse, UntypedFuture

CONFIG = "POST /api/v1/client/config"
POLL = "POST /api/v1/retrieve_future"
BATCH = "POST /api/v1/retrieve_futures"
CANCEL = "POST /api/v1/cancel_future"
SAMPLER = SamplerId("sampler", 7)

#: `hold` of an answer that is never sent.
NEVER = threading.Event()


def wants_batches(server: ScriptedServer) -> None:
    """Have *server* set the flag for batch polling; every result is its own request id."""
    server.on(CONFIG, Answer(body={"sample_use_retrieve_futures": True}))
    server.on(POLL, lambda received: Answer(body={"path": received.json()["request_id"]}))


def open_poller(server: ScriptedServer, **settings: Any) -> Iterator[Poller]:
    """Yield a poller and shut it down afterwards; for a fixture, or a one-pass `for` loop."""
    with open_resources(server, **settings) as resources:
        made = Poller(resources)
        yield made
        shut(made)


def shut(poller: Poller) -> None:
    """Close *poller* as a session does; no thread may be left."""
    poller._transport.closing.set()
    poller.close(ClientClosedError("the client was closed"))
    poller._resources.abort()
    poller.flush_acknowledgements(time.monotonic() + PATIENCE_S)
    assert poller.join(time.monotonic() + PATIENCE_S) == []


def done(*names: str, cursor: int, size: int = 10) -> Answer:
    """Answer a poll: the requests called *names* are done."""
    completions = [
        {"state": "finished", "request_id": name, "response_payload_uncompressed_size": size}
        for name in names
    ]
    return Answer(body={"completions": completions, "cursor": cursor})


def at_last(*answers: Any) -> Tuple[Any, ...]:
    """Return *answers* and, as the last step, "nothing new", for long polls and reports alike."""

    def nothing(received: Received) -> Answer:
        body = received.json()
        answer = done(cursor=body["prev_cursor"])
        return answer if "timeout" in body else dataclasses.replace(answer, hold=NEVER)

    return (*answers, nothing)


def sample(
    poller: Poller,
    name: str,
    before: Optional[threading.Event] = None,
    no_progress_s: Optional[float] = None,
    sampler: SamplerId = SAMPLER,
    sent: Optional[List[str]] = None,
) -> APIFuture[Any]:
    """Submit a sample that is accepted as *name* once *before* is set; append *name* to *sent*."""
    future: APIFuture[Any] = poller.new_future("sample")

    def send(channel: Any) -> UntypedFuture:
        if sent is not None:
            sent.append(name)
        if before is not None:
            assert before.wait(PATIENCE_S)
        return UntypedFuture(name)

    def decode(reply: Reply) -> str:
        return read(SaveWeightsResponse, reply, "sample").path

    poller.submit(
        ScriptedRequest(future, decode, send, sampler=sampler, no_progress_s=no_progress_s)
    )
    return future


def bodies(server: ScriptedServer, route: str) -> List[Dict[str, Any]]:
    """Return the decoded bodies of all requests to *route*."""
    return [received.json() for received in server.requests(route)]
