"""The faults of the matrix, and which outcomes are right for each."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

from tinkex import errors
from tinkex.testing import faults

#: Statuses after which a request is sent again.
PASSING = (408, 429, 500, 502, 503, 504)
#: Statuses that are final, unless they look like a gateway's.
REFUSALS = (400, 401, 402, 403, 404, 405, 409, 410, 413, 415, 422, 501)
#: Rarer statuses of both kinds, tried with one body only.
RARE = (302, 406, 451, 505, 520, 529)
BODIES: Dict[str, Any] = {"JSON": None, "HTML": "<html><h1>Error</h1></html>", "empty": b""}

_UNREADABLE = (errors.ResponseDecodeError,)


@dataclasses.dataclass(frozen=True)
class FaultCase:
    """A fault and its permitted outcomes.

    Attributes:
        times: how often it strikes; None means forever.
        status: errors with this status are right ...
        errors: ... and errors of these types; without either, only success is right.
        file_errors: like *errors*, if the fault strikes the download of a file.
        route: the only route that it strikes; None means every request of the operation.
        ends_session: the session is lost, and later work needs a new one.
        forgets: the server has lost everything, so lists are empty.
        repeats: work whose result was lost (a sample) may be done again.
        settings: of the client.
    """

    name: str
    fault: Any
    times: Optional[int] = 1
    status: Optional[int] = None
    errors: Tuple[Type[Exception], ...] = ()
    file_errors: Tuple[Type[Exception], ...] = ()
    route: Optional[str] = None
    ends_session: bool = False
    forgets: bool = False
    repeats: bool = False
    settings: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def is_right(self, error: Optional[BaseException], route: str) -> bool:
        """Return whether an operation may end with *error*, or with success if that is None.

        *route* is the route that the fault struck.
        """
        files = self.file_errors if route.startswith("GET /signed/") else ()
        if error is None or isinstance(error, (*self.errors, *files)):
            return True
        own: Optional[BaseException] = error
        if isinstance(error, errors.IncompleteGradientError):  # a batch of several requests
            return error.__cause__ is not None and self.is_right(error.__cause__, route)
        while own is not None:
            if self.status is not None and getattr(own, "status", None) == self.status:
                return isinstance(error, errors.TinkexError)
            own = own.__cause__
        return False


def _statuses() -> List[FaultCase]:
    cases = []
    for name, body in BODIES.items():
        for code in (*PASSING, *REFUSALS, *(RARE if name == "JSON" else ())):
            status = code if code in REFUSALS or (code in RARE and code < 500) else None
            extra: Tuple[Type[Exception], ...] = ()
            if code in (404, 410):  # the session or the result may be gone
                extra = (errors.SessionLostError, errors.ResultExpiredError)
            cases.append(
                FaultCase(
                    f"{code} {name}",
                    faults.Status(code, body),
                    status=status,
                    errors=extra,
                    repeats=code in (404, 410),
                )
            )
            if name == "JSON" and code in (*PASSING, 401, 404, 409, 501):  # with a header, too
                fault = faults.Status(code, retry_after=0.02)
                cases.append(
                    dataclasses.replace(cases[-1], name=f"{code} Retry-After", fault=fault)
                )
    for code in (500, 502, 504):
        cases.append(FaultCase(f"{code} after work", faults.Status(code, after_work=True)))
    for name in ("HTML", "empty"):  # a gateway, or a sign-on page
        page = faults.Status(200, BODIES[name])
        cases.append(FaultCase(f"200 {name}", page, file_errors=_UNREADABLE))
        lost = faults.Status(200, BODIES[name], after_work=True)
        cases.append(FaultCase(f"200 {name} after work", lost, file_errors=_UNREADABLE))
    return cases


_DOWN = (errors.APIConnectionError, errors.InternalServerError, errors.ResponseDecodeError)
_IMPATIENT = {"startup_timeout_s": 2.0, "max_outage_s": 2.0}
_LOST = (errors.SessionLostError,)

CASES: Dict[str, FaultCase] = {
    case.name: case
    for case in [
        FaultCase("latency", faults.Latency(0.05)),
        FaultCase("hold", faults.Hold()),
        FaultCase("hold after work", faults.Hold(after_work=True)),
        FaultCase("drop before work", faults.Drop()),
        FaultCase("drop after work", faults.Drop(after_work=True)),
        FaultCase("drop twice", faults.Drop(), times=2),
        FaultCase("cut in mid-response", faults.Cut()),
        FaultCase(
            "lost response",
            faults.LoseResponse(),
            settings={"read_timeout_s": 1.0, "poll_timeout_s": 1.5},
        ),
        FaultCase("trickle", faults.Trickle(0.005)),
        FaultCase("truncated", faults.Truncate(), file_errors=_UNREADABLE),
        FaultCase("garbled", faults.Garble(), file_errors=_UNREADABLE),
        FaultCase("truncated for ever", faults.Truncate(), times=None, errors=_UNREADABLE),
        FaultCase("garbled for ever", faults.Garble(), times=None, errors=_UNREADABLE),
        FaultCase("down for ever", faults.Drop(), times=None, errors=_DOWN, settings=_IMPATIENT),
        FaultCase(
            "503 for ever",
            faults.Status(503),
            times=None,
            status=503,
            errors=_DOWN,
            settings=_IMPATIENT,
        ),
        FaultCase(
            "expired result",
            faults.ExpireResult(),
            errors=(errors.ResultExpiredError,),
            route="POST /api/v1/retrieve_future",
            repeats=True,
        ),
        FaultCase(
            "dead heartbeats",
            faults.Drop(),
            times=None,
            route="heartbeat",
            settings={"heartbeat_interval_s": 0.05},
        ),
        FaultCase("session expiry", faults.ExpireSessions(), errors=_LOST, ends_session=True),
        FaultCase("restart", faults.Restart(), errors=_LOST, ends_session=True),
        FaultCase(
            "restart after work", faults.Restart(after_work=True), errors=_LOST, ends_session=True
        ),
        FaultCase(
            "restart without state",
            faults.Restart(keep_state=False),
            errors=(*_LOST, errors.NotFoundError),
            ends_session=True,
            forgets=True,
        ),
        *_statuses(),
    ]
}
