"""The official SDK's names of what is called otherwise here, for scripts that use them.

Only what a script builds, compares with, or annotates by; see docs/compatibility.md.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Literal

from tinkex.types.admin import (
    BillingSession,
    CheckpointStorageUsage,
    CheckpointUsage,
    SamplingPrefillUsage,
    SamplingSampleUsage,
    StorageUsage,
    TrainingUsage,
)
from tinkex.types.session_search import (
    AccessibleSessions,
    OwnSessions,
    RequestFailure,
    SamplingSessionFailure,
    SessionClientFinished,
    SessionFailureReason,
    SessionOwnerFilter,
    SessionsOfUsers,
    SessionStatusFilter,
    TrainingRunFailure,
)
from tinkex.types.tensor_data import TensorData

# What to search sessions for

OwnSearchOwner = OwnSessions
AccessibleSearchOwner = AccessibleSessions
UserSearchOwner = SessionsOfUsers
SearchOwner = SessionOwnerFilter
SessionStatusQuery = SessionStatusFilter


@dataclasses.dataclass(frozen=True)
class ActiveSessionStatusQuery(SessionStatusFilter):
    """Sessions that live."""

    type: str = "active"


@dataclasses.dataclass(frozen=True)
class CancelledSessionStatusQuery(SessionStatusFilter):
    """Sessions that were cancelled."""

    type: str = "cancelled"


@dataclasses.dataclass(frozen=True)
class FailedSessionStatusQuery(SessionStatusFilter):
    """Sessions that failed."""

    type: str = "failed"


@dataclasses.dataclass(frozen=True)
class ClientFinishedSessionStatusQuery(SessionStatusFilter):
    """Sessions that their client ended, for one of *reasons* if there are any."""

    type: str = "client_finished"


# What is found

ClientSessionFinished = SessionClientFinished
SessionFailedReason = SessionFailureReason
SessionFailedRequestReason = RequestFailure
SessionFailedTrainingRunReason = TrainingRunFailure
SessionFailedSamplingSessionReason = SamplingSessionFailure
TrainingBillingEvent = TrainingUsage
SamplingPrefillBillingEvent = SamplingPrefillUsage
SamplingSampleBillingEvent = SamplingSampleUsage
CheckpointBillingEvent = CheckpointUsage
StorageBillingEvent = StorageUsage
BillingUsageSession = BillingSession
CurrentCheckpointStorageUsageItem = CheckpointStorageUsage

# Annotations

#: Id of accepted work.
RequestID = str
#: Name of a loss; servers may have others.
LossFnType = str
#: What a pass returns of one datum, and is given with it.
LossFnOutput = Dict[str, TensorData]
LossFnInputs = Dict[str, TensorData]
SamplingClientKind = Literal["snapshot", "inflight"]
CustomLossInputRank = Literal[0, 1, 2]
