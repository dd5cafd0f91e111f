"""Runs and checkpoints (docs/protocol.md, "Checkpoints" and "REST lists")."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Any, Dict, List, Optional

from tinkex.types._wire import Wire, bulk, instant, json_string_map


@dataclasses.dataclass(frozen=True)
class Checkpoint(Wire):
    """A saved checkpoint.  ``checkpoint_type`` is training, sampler or external."""

    checkpoint_id: str
    checkpoint_type: str
    time: datetime = instant(dataclasses.MISSING)
    tinker_path: str = ""
    size_bytes: Optional[int] = None
    public: bool = False
    user_metadata: Optional[Dict[str, Any]] = bulk(None)
    expires_at: Optional[datetime] = instant()


@dataclasses.dataclass(frozen=True)
class TrainingRun(Wire):
    """A training run (called a model in its session), active or not."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: datetime = instant(dataclasses.MISSING)
    corrupted: bool = False
    lora_rank: Optional[int] = None
    last_checkpoint: Optional[Checkpoint] = None
    last_sampler_checkpoint: Optional[Checkpoint] = None
    user_metadata: Optional[Dict[str, Any]] = bulk(None)


@dataclasses.dataclass(frozen=True)
class Cursor(Wire):
    """The position of a page in a list, and the length of the list."""

    offset: int = 0
    limit: int = 0
    total_count: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingRunsResponse(Wire):
    """One page of training runs."""

    training_runs: List[TrainingRun]
    cursor: Optional[Cursor] = None


@dataclasses.dataclass(frozen=True)
class CheckpointsListResponse(Wire):
    """Checkpoints, newest first."""

    checkpoints: List[Checkpoint]
    cursor: Optional[Cursor] = None


@dataclasses.dataclass(frozen=True)
class WeightsInfoResponse(Wire):
    """A checkpoint's base model, and the settings that its adapter was trained with."""

    base_model: str
    is_lora: bool
    lora_rank: Optional[int] = None
    train_unembed: Optional[bool] = None
    train_mlp: Optional[bool] = None
    train_attn: Optional[bool] = None
    optimizer_config: Optional[Dict[str, Any]] = bulk(None)


@dataclasses.dataclass(frozen=True)
class ExternalWeightsUrlsResponse(Wire):
    """Signed URLs of exported weights, valid without a key until ``expires``.

    ``urls`` maps each file's path within the checkpoint to its URL.
    """

    urls: Dict[str, str] = bulk(read=json_string_map)
    expires: Optional[datetime] = instant()


@dataclasses.dataclass(frozen=True)
class CheckpointArchiveUrlResponse(Wire):
    """The signed URL of a checkpoint's archive, valid without a key until ``expires``."""

    url: str
    expires: Optional[datetime] = instant()


@dataclasses.dataclass(frozen=True)
class CopyWeightsResponse(Wire):
    """The path of the copy."""

    tinker_path: str
