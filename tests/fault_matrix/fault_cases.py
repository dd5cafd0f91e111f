"""The faults of the matrix, and which outcomes are right for each."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

from tinkex import errors
from tinkex.testing import faults

#: Statuses after which a request is sent again.
PASSING = (408, 429, 500, 502, 503, 504)
#: Statuses that are believed, unless they look like a gateway's.
REFUSALS = (400, 401, 402, 403, 404, 405, 409, 410, 413, 415, 422, 501)
BODIES: Dict[str, Any] = {"JSON": None, "HTML": "<html><h1>Error</h1></html>", "empty": b""}


@dataclasses.dataclass(frozen=True)
class FaultCase:
    """A fault and what may come of it.

    Attributes:
        times: it strikes this often; None strikes for ever.
        status: errors with this status are right ...
        errors: ... and errors of these types; without either, only success is.
        route: it strikes only this route; None strikes whatever the operation requests.
        ends_session: the session is lost; what follows needs a new one.
        repeats: what the server has lost (a sample) may be done again.
        settings: of the client.
    """

    name: str
    fault: Any
    times: Optional[int] = 1
    status: Optional[int] = None
    errors: Tuple[Type[Exception], ...] = ()
    route: Optional[str] = None
    ends_session: bool = False
    repeats: bool = False
    settings: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def is_right(self, error: Optional[BaseException]) -> bool:
        """True if an operation may end with *error*, or with success if that is None."""
        if error is None or isinstance(error, self.errors):
            return True
        own: Optional[BaseException] = error
        if isinstance(error, errors.IncompleteGradientError):  # of a batch in several requests
            return error.__cause__ is not None and self.is_right(error.__cause__)
        while own is not None:
            if self.status is not None and getattr(own, "status", None) == self.status:
                return isinstance(error, errors.TinkexError)
            own = own.__cause__
        return False


def _statuses() -> List[FaultCase]:
    cases = []
    for code in (*PASSING, *REFUSALS):
        for name, body in BODIES.items():
            status = code if code in REFUSALS else None
            extra: Tuple[Type[Exception], ...] = ()
            if code in (404, 410):  # may mean that the session, or the result, is gone
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
    for code in PASSING:
        cases.append(FaultCase(f"{code} Retry-After", faults.Status(code, retry_after=0.02)))
    for code in (500, 502, 504):
        cases.append(FaultCase(f"{code} after work", faults.Status(code, after_work=True)))
    return cases


_UNREADABLE = (errors.ResponseDecodeError,)
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
        FaultCase("truncated", faults.Truncate(), errors=_UNREADABLE),
        FaultCase("garbled", faults.Garble(), errors=_UNREADABLE),
        *_statuses(),
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
        ),
    ]
}
