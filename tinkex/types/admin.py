"""Audit, billing and storage (docs/protocol.md, "Administration")."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Dict, List, Optional, Union

from tinkex.types._wire import UnknownVariant, Wire, bulk, instant, variant


@dataclasses.dataclass(frozen=True)
class AuditLogEntry(Wire):
    """One event in the audit log."""

    timestamp: datetime = instant(dataclasses.MISSING)
    event: str = ""
    event_details: Dict[str, Any] = bulk({})
    model_id: Optional[str] = None
    tinker_path: Optional[str] = None
    purpose: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class AuditLogResponse(Wire):
    """The audit log of one day."""

    entries: List[AuditLogEntry]


@dataclasses.dataclass(frozen=True)
class TrainingUsage(Wire):
    """Tokens trained on."""

    token_count: int
    type: str = "training"


@dataclasses.dataclass(frozen=True)
class SamplingPrefillUsage(Wire):
    """Prompt tokens processed; ``cached`` if they were in the prompt cache."""

    token_count: int
    cached: bool = False
    type: str = "sampling_prefill"


@dataclasses.dataclass(frozen=True)
class SamplingSampleUsage(Wire):
    """Tokens sampled."""

    token_count: int
    type: str = "sampling_sample"


@dataclasses.dataclass(frozen=True)
class CheckpointUsage(Wire):
    """Checkpoints written."""

    count: int
    type: str = "checkpoint"


@dataclasses.dataclass(frozen=True)
class StorageUsage(Wire):
    """Checkpoints stored."""

    gigabyte_hours: float
    free: bool = False
    type: str = "storage"


BillingEventInfo = Union[
    TrainingUsage,
    SamplingPrefillUsage,
    SamplingSampleUsage,
    CheckpointUsage,
    StorageUsage,
    UnknownVariant,
]


@dataclasses.dataclass(frozen=True)
class BillingUsageEvent(Wire):
    """Usage of one kind within one time bucket."""

    bucket_start: datetime = instant(dataclasses.MISSING)
    bucket_end: datetime = instant(dataclasses.MISSING)
    event_info: BillingEventInfo = variant(
        TrainingUsage, SamplingPrefillUsage, SamplingSampleUsage, CheckpointUsage, StorageUsage
    )
    base_model: Optional[str] = None
    user_id: Optional[str] = None
    user_name: Optional[str] = None
    session_id: Optional[str] = None
    project_id: Optional[str] = None
    estimated_cost_usd: Optional[float] = None
    effective_rate_usd_per_million_tokens: Optional[float] = None
    effective_rate_usd_per_gigabyte_month: Optional[float] = None


@dataclasses.dataclass(frozen=True)
class BillingSession(Wire):
    """A session that the usage belongs to."""

    user_metadata: Optional[Dict[str, Any]] = bulk(None)


@dataclasses.dataclass(frozen=True)
class BillingUsageResponse(Wire):
    """Usage within a period; ``sessions`` maps session ids to the sessions."""

    data: List[BillingUsageEvent]
    sessions: Dict[str, BillingSession] = dataclasses.field(default_factory=dict)
    cost_data_through: Optional[datetime] = instant()


@dataclasses.dataclass(frozen=True)
class CheckpointStorageUsage(Wire):
    """Size and cost of one user's checkpoints in one project."""

    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    project_id: Optional[str] = None
    org_user_urn: Optional[str] = None
    user_email: Optional[str] = None
    user_name: Optional[str] = None
    estimated_monthly_cost_usd: Optional[float] = None


@dataclasses.dataclass(frozen=True)
class CurrentCheckpointStorageUsageResponse(Wire):
    """Size and cost of the checkpoints that are currently stored."""

    data: List[CheckpointStorageUsage]
    effective_rate_usd_per_gigabyte_month: Optional[float] = None
