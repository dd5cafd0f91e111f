"""Sessions: lists, search, and how they ended (docs/protocol.md, "REST lists")."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from tinkex._runtime.numeric import convert_fields
from tinkex.types._wire import UnknownVariant, Wire, bulk, instant, json_strings, variant


@dataclasses.dataclass(frozen=True)
class ListSessionsResponse(Wire):
    """Ids of sessions, newest first."""

    sessions: List[str] = bulk(read=json_strings)


@dataclasses.dataclass(frozen=True)
class GetSessionResponse(Wire):
    """What a session has made."""

    training_run_ids: List[str]
    sampler_ids: List[str]
    user_metadata: Optional[Dict[str, Any]] = bulk(None)
    display_name: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class SessionTraceExport(Wire):
    """The state of a trace export: ``pending``, ``ready`` with a *url*, or ``failed``."""

    status: str
    url: Optional[str] = None
    error: Optional[str] = None


# How a session stands


@dataclasses.dataclass(frozen=True)
class SessionActive(Wire):
    """It lives."""

    type: str = "active"


@dataclasses.dataclass(frozen=True)
class SessionCancelled(Wire):
    """It was cancelled."""

    detail: Optional[str] = None
    type: str = "cancelled"


@dataclasses.dataclass(frozen=True)
class SessionFinishReason(Wire):
    """Why the client ended it: ``success``, ``errored`` or ``interrupted``."""

    type: str


@dataclasses.dataclass(frozen=True)
class SessionClientFinished(Wire):
    """Its client ended it."""

    reason: SessionFinishReason
    detail: Optional[str] = None
    type: str = "client_finished"


@dataclasses.dataclass(frozen=True)
class RequestFailure(Wire):
    """A request made the session fail."""

    request_id: str
    request_type: Optional[str] = None
    type: str = "request"


@dataclasses.dataclass(frozen=True)
class TrainingRunFailure(Wire):
    """A training run made the session fail."""

    training_run_id: str
    type: str = "training_run"


@dataclasses.dataclass(frozen=True)
class SamplingSessionFailure(Wire):
    """A sampler made the session fail."""

    sampling_session_id: str
    type: str = "sampling_session"


SessionFailureReason = Union[
    RequestFailure, TrainingRunFailure, SamplingSessionFailure, UnknownVariant
]


@dataclasses.dataclass(frozen=True)
class SessionFailed(Wire):
    """It failed; ``category`` is ``user`` or ``internal``."""

    category: str
    message: str
    reason: Optional[SessionFailureReason] = variant(
        RequestFailure, TrainingRunFailure, SamplingSessionFailure, default=None
    )
    type: str = "failed"


SessionStatus = Union[
    SessionActive, SessionCancelled, SessionClientFinished, SessionFailed, UnknownVariant
]

# The question


@dataclasses.dataclass(frozen=True)
class OwnSessions(Wire):
    """Sessions of the caller."""

    type: str = "own"


@dataclasses.dataclass(frozen=True)
class AccessibleSessions(Wire):
    """Sessions that the caller may see."""

    type: str = "accessible"


@dataclasses.dataclass(frozen=True)
class SessionsOfUsers(Wire):
    """Sessions of 1 to 10 users, named by their URNs."""

    owner_urns: List[str]
    type: str = "user"


SessionOwnerFilter = Union[OwnSessions, AccessibleSessions, SessionsOfUsers]


@dataclasses.dataclass(frozen=True)
class SessionStatusFilter(Wire):
    """Sessions that stand so: *type* is ``active``, ``cancelled``, ``failed`` or
    ``client_finished``; the last may name its *reasons* (``success``, ``errored``,
    ``interrupted``).
    """

    type: str
    reasons: Optional[List[str]] = None


@dataclasses.dataclass(frozen=True)
class ActiveSessionStatusQuery(SessionStatusFilter):
    """Active sessions; this and the three below are the official SDK's names."""

    type: str = "active"


@dataclasses.dataclass(frozen=True)
class CancelledSessionStatusQuery(SessionStatusFilter):
    """Cancelled sessions."""

    type: str = "cancelled"


@dataclasses.dataclass(frozen=True)
class FailedSessionStatusQuery(SessionStatusFilter):
    """Failed sessions."""

    type: str = "failed"


@dataclasses.dataclass(frozen=True)
class ClientFinishedSessionStatusQuery(SessionStatusFilter):
    """Sessions that their client ended, optionally for one of *reasons*."""

    type: str = "client_finished"


@dataclasses.dataclass(frozen=True)
class SessionSearchCursor(Wire):
    """Where the next page begins; hand it back unchanged."""

    last_created_at: str
    last_session_id: str


@dataclasses.dataclass(frozen=True)
class SessionSearchRequest:
    """What to look for among sessions; what is None does not matter.

    Attributes:
        session_id: exactly this one.
        project_ids: in one of these projects.
        user_metadata: with all of these values.
        display_name: of this name, at least one character.
        owner: whose; the caller's own by default.  A mapping with a ``type`` will do.
        statuses: standing in one of these ways.  Mappings with a ``type`` will do.
        limit: sessions in a page, 1 to 200.
        cursor: ``next_cursor`` of the page before.
    """

    session_id: Optional[str] = None
    project_ids: Optional[Sequence[str]] = None
    user_metadata: Dict[str, str] = dataclasses.field(default_factory=dict)
    display_name: Optional[str] = None
    owner: Union[SessionOwnerFilter, Mapping[str, Any]] = OwnSessions()
    statuses: Optional[Sequence[Union[SessionStatusFilter, Mapping[str, Any]]]] = None
    limit: int = 50
    cursor: Optional[SessionSearchCursor] = None

    def __post_init__(self) -> None:
        convert_fields(self, ints=("limit",))


@dataclasses.dataclass(frozen=True)
class SessionSummary(Wire):
    """A session, as a search finds it."""

    session_id: str
    created_at: datetime = instant(dataclasses.MISSING)
    owner: Optional[str] = None
    project_id: Optional[str] = None
    status: Optional[SessionStatus] = variant(
        SessionActive, SessionCancelled, SessionClientFinished, SessionFailed, default=None
    )
    checkpoints_count: int = 0
    display_name: Optional[str] = None
    user_metadata: Optional[Dict[str, Any]] = bulk(None)
    checkpoint_storage_bytes: Optional[int] = None


@dataclasses.dataclass(frozen=True)
class SessionSearchResponse(Wire):
    """A page of sessions; ``next_cursor`` is None on the last."""

    sessions: List[SessionSummary]
    next_cursor: Optional[SessionSearchCursor] = None
