"""tinkex: a threaded, synchronous SDK for the Tinker API.

Fine-tune open-weight language models with LoRA adapters, and sample from them, on someone
else's GPUs.  Names are loaded when first used; importing the package starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List

from tinkex._runtime.late_import import import_late
from tinkex._version import __version__

if TYPE_CHECKING:
    from tinkex import auth as auth, types as types
    from tinkex._sessions.manager import SessionManager as SessionManager
    from tinkex._training.custom_loss import (
        LossHandle as LossHandle,
        PerDatumLossFn as PerDatumLossFn,
    )
    from tinkex._transport.server_state import ServerDialect as ServerDialect
    from tinkex.clients.admin import AdminClient as AdminClient
    from tinkex.clients.pipeline import Pipeline as Pipeline, PipelineStep as PipelineStep
    from tinkex.clients.rest import RestClient as RestClient
    from tinkex.clients.sample_stream import Sampled as Sampled, SampleStream as SampleStream
    from tinkex.clients.sampling import (
        BackcompatSamplingClientFuture as BackcompatSamplingClientFuture,
        SamplingClient as SamplingClient,
    )
    from tinkex.clients.service import ServiceClient as ServiceClient
    from tinkex.clients.training import (
        BackcompatTrainingClientFuture as BackcompatTrainingClientFuture,
        TrainingClient as TrainingClient,
        TrainStep as TrainStep,
    )
    from tinkex.config import Config as Config
    from tinkex.errors import (
        APIConnectionError as APIConnectionError,
        APIError as APIError,
        APIResponseValidationError as APIResponseValidationError,
        APIStatusError as APIStatusError,
        APITimeoutError as APITimeoutError,
        AuthenticationError as AuthenticationError,
        BackpressureError as BackpressureError,
        BadRequestError as BadRequestError,
        BillingError as BillingError,
        BudgetExceededError as BudgetExceededError,
        ClientClosedError as ClientClosedError,
        ConfigError as ConfigError,
        ConflictError as ConflictError,
        CredentialError as CredentialError,
        DownloadCancelledError as DownloadCancelledError,
        ExperimentalWarning as ExperimentalWarning,
        IncompleteGradientError as IncompleteGradientError,
        InternalServerError as InternalServerError,
        InvalidInputError as InvalidInputError,
        LocalServerError as LocalServerError,
        NoProgressError as NoProgressError,
        NotFoundError as NotFoundError,
        OperationTimeoutError as OperationTimeoutError,
        PermissionDeniedError as PermissionDeniedError,
        RateLimitError as RateLimitError,
        RequestFailedError as RequestFailedError,
        ResponseDecodeError as ResponseDecodeError,
        ResultExpiredError as ResultExpiredError,
        RouteMissingError as RouteMissingError,
        SequenceLostError as SequenceLostError,
        SessionLostError as SessionLostError,
        TinkerError as TinkerError,
        TinkexError as TinkexError,
        UnprocessableEntityError as UnprocessableEntityError,
        UnsupportedError as UnsupportedError,
    )
    from tinkex.futures import APIFuture as APIFuture, FutureStatus as FutureStatus
    from tinkex.metrics import Latency as Latency, Metrics as Metrics
    from tinkex.retry_config import RetryConfig as RetryConfig
    from tinkex.types import (
        AdamOptimizerConfig as AdamOptimizerConfig,
        AdamParams as AdamParams,
        Checkpoint as Checkpoint,
        CheckpointType as CheckpointType,
        Datum as Datum,
        DimuonOptimizerConfig as DimuonOptimizerConfig,
        DimuonParams as DimuonParams,
        DmelChunk as DmelChunk,
        EncodedTextChunk as EncodedTextChunk,
        ForwardBackwardOutput as ForwardBackwardOutput,
        ImageAssetPointerChunk as ImageAssetPointerChunk,
        ImageChunk as ImageChunk,
        LoraConfig as LoraConfig,
        ModelID as ModelID,
        ModelInput as ModelInput,
        ModelInputChunk as ModelInputChunk,
        OptimParams as OptimParams,
        OptimStepResponse as OptimStepResponse,
        ParsedCheckpointTinkerPath as ParsedCheckpointTinkerPath,
        PromptProvenanceSpan as PromptProvenanceSpan,
        SampledProvenanceSpan as SampledProvenanceSpan,
        SampledSequence as SampledSequence,
        SampleRequest as SampleRequest,
        SampleResponse as SampleResponse,
        SamplingParams as SamplingParams,
        StopReason as StopReason,
        TensorData as TensorData,
        TensorDtype as TensorDtype,
        TrainingRun as TrainingRun,
    )
    from tinkex.usage import Budget as Budget, Price as Price, Usage as Usage

_MODULES = {
    "clients.admin": ["AdminClient"],
    "config": ["Config"],
    "_training.custom_loss": ["LossHandle", "PerDatumLossFn"],
    "errors": [
        "APIConnectionError",
        "APIError",
        "APIResponseValidationError",
        "APIStatusError",
        "APITimeoutError",
        "AuthenticationError",
        "BackpressureError",
        "BadRequestError",
        "BillingError",
        "BudgetExceededError",
        "ClientClosedError",
        "ConfigError",
        "ConflictError",
        "CredentialError",
        "DownloadCancelledError",
        "ExperimentalWarning",
        "IncompleteGradientError",
        "InternalServerError",
        "InvalidInputError",
        "LocalServerError",
        "NoProgressError",
        "NotFoundError",
        "OperationTimeoutError",
        "PermissionDeniedError",
        "RateLimitError",
        "RequestFailedError",
        "ResponseDecodeError",
        "ResultExpiredError",
        "RouteMissingError",
        "SequenceLostError",
        "SessionLostError",
        "TinkerError",
        "TinkexError",
        "UnprocessableEntityError",
        "UnsupportedError",
    ],
    "futures": ["APIFuture", "FutureStatus"],
    "metrics": ["Latency", "Metrics"],
    "clients.pipeline": ["Pipeline", "PipelineStep"],
    "clients.rest": ["RestClient"],
    "retry_config": ["RetryConfig"],
    "clients.sample_stream": ["Sampled", "SampleStream"],
    "clients.sampling": ["BackcompatSamplingClientFuture", "SamplingClient"],
    "usage": ["Budget", "Price", "Usage"],
    "_transport.server_state": ["ServerDialect"],
    "clients.service": ["ServiceClient"],
    "_sessions.manager": ["SessionManager"],
    "clients.training": ["BackcompatTrainingClientFuture", "TrainStep", "TrainingClient"],
    "types": [
        "AdamOptimizerConfig",
        "AdamParams",
        "Checkpoint",
        "CheckpointType",
        "Datum",
        "DimuonOptimizerConfig",
        "DimuonParams",
        "DmelChunk",
        "EncodedTextChunk",
        "ForwardBackwardOutput",
        "ImageAssetPointerChunk",
        "ImageChunk",
        "LoraConfig",
        "ModelID",
        "ModelInput",
        "ModelInputChunk",
        "OptimParams",
        "OptimStepResponse",
        "ParsedCheckpointTinkerPath",
        "PromptProvenanceSpan",
        "SampledProvenanceSpan",
        "SampleRequest",
        "SampleResponse",
        "SampledSequence",
        "SamplingParams",
        "StopReason",
        "TensorData",
        "TensorDtype",
        "TrainingRun",
    ],
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__title__ = "tinkex"
__all__ = ["__version__", "auth", "types", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in ("auth", "types"):
        return import_late(f"tinkex.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'tinkex' has no attribute {name!r}")
    value = getattr(import_late(f"tinkex.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(__all__)
