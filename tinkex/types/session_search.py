"""Lists, search and status of sessions (docs/protocol.md, "REST lists")."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from tinkex._runtime.numeric import convert_fields
from tinkex.types._wire import UnknownVariant, Wire, bulk, instant, json_strings, variant


@dataclasses.dataclass(frozen=True)
class ListSessionsResponse(Wire):
    """One page of session ids, newest first."""

    sessions: List[str] = bulk(read=json_strings)


@dataclasses.dataclass(frozen=True)
class GetSessionResponse(Wire):
    """The training runs and samplers of a session."""

    training_run_ids: List[str]
    sampler_ids: List[str]
    user_metadata: Optional[Dict[str, Any]] = bulk(None)
    display_name: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class SessionTraceExport(Wire):
    """The state of a trace export: ``pending``, ``ready`` with a ``url``, or ``failed``."""

    status: str
    url: Optional[str] = None
    error: Optional[str] = None


# Status of a session


@dataclasses.dataclass(frozen=True)
class SessionActive(Wire):
    """The session is active."""

    type: str = "active"


@dataclasses.dataclass(frozen=True)
class SessionCancelled(Wire):
    """The session was cancelled."""

    detail: Optional[str] = None
    type: str = "cancelled"


@dataclasses.dataclass(frozen=True)
class SessionFinishReason(Wire):
    """Why the client ended the session: ``success``, ``errored`` or ``interrupted``."""

    type: str


@dataclasses.dataclass(frozen=True)
class SessionClientFinished(Wire):
    """The client ended the session."""

    reason: SessionFinishReason
    detail: Optional[str] = None
    type: str = "client_finished"


@dataclasses.dataclass(frozen=True)
class RequestFailure(Wire):
    """The session failed because of a request."""

    request_id: str
    request_type: Optional[str] = None
    type: str = "request"


@dataclasses.dataclass(frozen=True)
class TrainingRunFailure(Wire):
    """The session failed because of a training run."""

    training_run_id: str
    type: str = "training_run"


@dataclasses.dataclass(frozen=True)
class SamplingSessionFailure(Wire):
    """The session failed because of a sampler."""

    sampling_session_id: str
    type: str = "sampling_session"


SessionFailureReason = Union[
    RequestFailure, TrainingRunFailure, SamplingSessionFailure, UnknownVariant
]


@dataclasses.dataclass(frozen=True)
class SessionFailed(Wire):
    """The session failed; ``category`` is ``user`` or ``internal``."""

    category: str
    message: str
    reason: Optional[SessionFailureReason] = variant(
        RequestFailure, TrainingRunFailure, SamplingSessionFailure, default=None
    )
    type: str = "failed"


SessionStatus = Union[
    SessionActive, SessionCancelled, SessionClientFinished, SessionFailed, UnknownVariant
]

# Search


@dataclasses.dataclass(frozen=True)
class OwnSessions(Wire):
    """The caller's own sessions."""

    type: str = "own"


@dataclasses.dataclass(frozen=True)
class AccessibleSessions(Wire):
    """All sessions that the caller may see."""

    type: str = "accessible"


@dataclasses.dataclass(frozen=True)
class SessionsOfUsers(Wire):
    """The sessions of 1 to 10 users, named by their URNs."""

    owner_urns: List[str]
    type: str = "user"


SessionOwnerFilter = Union[OwnSessions, AccessibleSessions, SessionsOfUsers]


@dataclasses.dataclass(frozen=True)
class SessionStatusFilter(Wire):
    """Sessions with one status.

    Args:
        type: ``active``, ``cancelled``, ``failed`` or ``client_finished``.
        reasons: only with ``client_finished``: ``success``, ``errored`` or ``interrupted``.
    """

    type: str
    reasons: Optional[List[str]] = None


@dataclasses.dataclass(frozen=True)
class ActiveSessionStatusQuery(SessionStatusFilter):
    """Active sessions.  The names of this class and the next three are the official SDK's."""

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
    """Sessions that were ended by their client, optionally for one of *reasons*."""

    type: str = "client_finished"


@dataclasses.dataclass(frozen=True)
class SessionSearchCursor(Wire):
    """Where the next page begins; pass it back unchanged."""

    last_created_at: str
    last_session_id: str


@dataclasses.dataclass(frozen=True)
class SessionSearchRequest:
    """A search for sessions; fields that are None match any session.

    Attributes:
        session_id: match the session with this id.
        project_ids: match sessions in one of these projects.
        user_metadata: match sessions with all of these values.
        display_name: match sessions with this name, at least one character.
        owner: match sessions of these owners; by default the caller's own.  May be a mapping with a
            ``type``.
        statuses: match sessions with one of these statuses.  May be mappings with a ``type``.
        limit: the number of sessions per page, 1 to 200.
        cursor: the ``next_cursor`` of the previous page.
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
    """A session found by a search."""

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
    """One page of sessions; ``next_cursor`` is None on the last page."""

    sessions: List[SessionSummary]
    next_cursor: Optional[SessionSearchCursor] = None
