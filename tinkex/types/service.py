"""Sessions, capabilities, runs and checkpoints (reference, sections 1.5.1 and 1.5.5)."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Dict, List, Optional

from dataclasses_json import config

from tinkex.types._wire import Wire, bulk, instant


def _required_instant() -> Any:
    return instant(dataclasses.MISSING)


@dataclasses.dataclass(frozen=True)
class CreateSessionResponse(Wire):
    """A session lives; the messages are for the user."""

    session_id: str
    info_message: Optional[str] = None
    warning_message: Optional[str] = None
    error_message: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class CreateSamplingSessionResponse(Wire):
    """A sampling session lives."""

    sampling_session_id: str


@dataclasses.dataclass(frozen=True)
class GetSamplerResponse(Wire):
    """What a sampler samples from.  ``tokenizer_id`` is sent by the embedded server only."""

    sampler_id: str
    base_model: str
    model_path: Optional[str] = None
    tokenizer_id: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class SupportedModel(Wire):
    """A base model the server offers; None means the server did not say."""

    model_name: Optional[str] = None
    max_context_length: Optional[int] = None
    trainable: Optional[bool] = None
    sampleable: Optional[bool] = None


@dataclasses.dataclass(frozen=True)
class GetServerCapabilitiesResponse(Wire):
    """The base models the server offers."""

    supported_models: List[SupportedModel]


@dataclasses.dataclass(frozen=True)
class Checkpoint(Wire):
    """A saved checkpoint.  ``checkpoint_type`` is training, sampler or external."""

    checkpoint_id: str
    checkpoint_type: str
    time: datetime = _required_instant()
    tinker_path: str = ""
    size_bytes: Optional[int] = None
    public: bool = False
    user_metadata: Optional[Dict[str, Any]] = bulk(None)
    expires_at: Optional[datetime] = instant()


@dataclasses.dataclass(frozen=True)
class TrainingRun(Wire):
    """A training run (a model of some session), living or not."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: datetime = _required_instant()
    corrupted: bool = False
    lora_rank: Optional[int] = None
    last_checkpoint: Optional[Checkpoint] = None
    last_sampler_checkpoint: Optional[Checkpoint] = None
    user_metadata: Optional[Dict[str, Any]] = bulk(None)


@dataclasses.dataclass(frozen=True)
class Cursor(Wire):
    """Where a page stands in a list."""

    offset: int = 0
    limit: int = 0
    total_count: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingRunsResponse(Wire):
    """A page of training runs."""

    training_runs: List[TrainingRun]
    cursor: Optional[Cursor] = None


@dataclasses.dataclass(frozen=True)
class CheckpointsListResponse(Wire):
    """Checkpoints, newest first."""

    checkpoints: List[Checkpoint]
    cursor: Optional[Cursor] = None


@dataclasses.dataclass(frozen=True)
class WeightsInfoResponse(Wire):
    """What a checkpoint was trained from, and how."""

    base_model: str
    is_lora: bool
    lora_rank: Optional[int] = None
    train_unembed: Optional[bool] = None
    train_mlp: Optional[bool] = None
    train_attn: Optional[bool] = None
    optimizer_config: Optional[Dict[str, Any]] = bulk(None)


@dataclasses.dataclass(frozen=True)
class ListSessionsResponse(Wire):
    """Ids of sessions, newest first."""

    sessions: List[str] = dataclasses.field(metadata=config(encoder=list, decoder=list))


@dataclasses.dataclass(frozen=True)
class GetSessionResponse(Wire):
    """What a session has made."""

    training_run_ids: List[str]
    sampler_ids: List[str]
    user_metadata: Optional[Dict[str, Any]] = bulk(None)
    display_name: Optional[str] = None
