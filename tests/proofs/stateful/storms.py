"""The faults of the machine, in three groups by their permitted outcomes."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List

from tinkex.testing import Injection, faults

_HTML = "<html><h1>Bad gateway</h1></html>"
#: A plain 500 is final after this many in a row.
_BELIEVED = 4

#: Temporary faults, in spite of which every call must succeed.
PASSING: Dict[str, Any] = {
    "latency": faults.Latency(0.03),
    "hold": faults.Hold(),
    "hold after work": faults.Hold(after_work=True),
    "drop": faults.Drop(),
    "drop after work": faults.Drop(after_work=True),
    "cut": faults.Cut(),
    "lost response": faults.LoseResponse(),
    "trickle": faults.Trickle(0.002),
    "408": faults.Status(408),
    "429": faults.Status(429, retry_after=0.02),
    "500": faults.Status(500),
    "500 after work": faults.Status(500, after_work=True),
    "502 of a gateway": faults.Status(502, _HTML),
    "503": faults.Status(503, retry_after=0.01),
    "504 after work": faults.Status(504, _HTML, after_work=True),
}

#: Those that last until the client gives up waiting.
WAITING = ("hold", "hold after work", "lost response")

#: Faults that fail the call they strike, and no other.
FAILING: Dict[str, Any] = {
    **{str(code): faults.Status(code) for code in (400, 401, 403, 404, 409, 410, 422)},
    "500 for good": faults.Status(500),
    "500 after work for good": faults.Status(500, after_work=True),
    "truncated": faults.Truncate(),
    "garbled": faults.Garble(),
    "expired result": faults.ExpireResult(),
}

#: Faults that end all sessions.
ENDING: Dict[str, Any] = {
    "expiry": faults.ExpireSessions(),
    "restart": faults.Restart(),
    "restart after work": faults.Restart(after_work=True),
    "restart without state": faults.Restart(keep_state=False),
}

_SUBMISSIONS = [
    f"POST /api/v1/{name}"
    for name in (
        "forward_backward",
        "optim_step",
        "save_weights",
        "save_weights_for_sampler",
        "load_weights",
        "asample",
    )
]
POLL = "POST /api/v1/retrieve_future"
_POLLS = [POLL, "POST /api/v1/retrieve_futures"]
_OTHERS = [
    "POST /api/v1/create_model",
    "POST /api/v1/create_sampling_session",
    "POST /api/v1/get_info",
    "POST /api/v1/cancel_future*",
]
_WORK = [*_SUBMISSIONS, POLL]
ROUTES = {
    "passing": [
        *_SUBMISSIONS,
        *_POLLS,
        *_OTHERS,
        "POST /api/v1/session_heartbeat",
        "POST /api/v1/create_session",
        "*",
    ],
    "failing": _WORK,
    "ending": [*_WORK, "POST /api/v1/create_model", "POST /api/v1/session_heartbeat"],
}
GROUPS = {"passing": PASSING, "failing": FAILING, "ending": ENDING}


@dataclasses.dataclass(eq=False)
class Storm:
    """An injected fault."""

    name: str
    group: str
    injection: Injection

    @property
    def strikes(self) -> int:
        return len(self.injection.struck)

    @property
    def status(self) -> int:
        """The status of the fault's response; 0 if there is no response."""
        return getattr(self.injection.fault, "code", 0)

    @property
    def refuses(self) -> bool:
        """Whether clients may assume that the work was not done: a 4xx before any work."""
        return 400 <= self.status < 500


def times_of(name: str, times: int) -> int:
    """Return how often the fault *name* strikes if *times* is requested."""
    if name.endswith("for good"):
        return _BELIEVED
    return times if name in PASSING else 1


def by_name(storms: List[Storm], *names: str) -> int:
    """Count the strikes of the faults *names*."""
    return sum(storm.strikes for storm in storms if storm.name in names)
