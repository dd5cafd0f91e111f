"""The values that travel between a program, this client and a server.  No I/O, no threads.

Names are loaded when first used: most programs need a few of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List

from tinkex._runtime.late_import import import_late

if TYPE_CHECKING:
    from tinkex.types._union import (
        UnknownVariant as UnknownVariant,
    )
    from tinkex.types.admin import (
        AuditLogEntry as AuditLogEntry,
        AuditLogResponse as AuditLogResponse,
        BillingEventInfo as BillingEventInfo,
        BillingSession as BillingSession,
        BillingUsageEvent as BillingUsageEvent,
        BillingUsageResponse as BillingUsageResponse,
        CheckpointStorageUsage as CheckpointStorageUsage,
        CheckpointUsage as CheckpointUsage,
        CurrentCheckpointStorageUsageResponse as CurrentCheckpointStorageUsageResponse,
        SamplingPrefillUsage as SamplingPrefillUsage,
        SamplingSampleUsage as SamplingSampleUsage,
        StorageUsage as StorageUsage,
        TrainingUsage as TrainingUsage,
    )
    from tinkex.types.checkpoint_path import (
        ParsedCheckpointTinkerPath as ParsedCheckpointTinkerPath,
    )
    from tinkex.types.chunks import (
        DmelChunk as DmelChunk,
        EncodedTextChunk as EncodedTextChunk,
        ImageAssetPointerChunk as ImageAssetPointerChunk,
        ImageChunk as ImageChunk,
        ModelInputChunk as ModelInputChunk,
    )
    from tinkex.types.datum import (
        Datum as Datum,
        ForwardBackwardRequest as ForwardBackwardRequest,
    )
    from tinkex.types.model_input import (
        ModelInput as ModelInput,
    )
    from tinkex.types.names import (
        CheckpointType as CheckpointType,
        ModelID as ModelID,
        RequestErrorCategory as RequestErrorCategory,
        StopReason as StopReason,
        TensorDtype as TensorDtype,
    )
    from tinkex.types.official_names import (
        AccessibleSearchOwner as AccessibleSearchOwner,
        ActiveSessionStatusQuery as ActiveSessionStatusQuery,
        BillingUsageSession as BillingUsageSession,
        CancelledSessionStatusQuery as CancelledSessionStatusQuery,
        CheckpointBillingEvent as CheckpointBillingEvent,
        ClientFinishedSessionStatusQuery as ClientFinishedSessionStatusQuery,
        ClientSessionFinished as ClientSessionFinished,
        CurrentCheckpointStorageUsageItem as CurrentCheckpointStorageUsageItem,
        CustomLossInputRank as CustomLossInputRank,
        FailedSessionStatusQuery as FailedSessionStatusQuery,
        LossFnInputs as LossFnInputs,
        LossFnOutput as LossFnOutput,
        LossFnType as LossFnType,
        OwnSearchOwner as OwnSearchOwner,
        RequestID as RequestID,
        SamplingClientKind as SamplingClientKind,
        SamplingPrefillBillingEvent as SamplingPrefillBillingEvent,
        SamplingSampleBillingEvent as SamplingSampleBillingEvent,
        SearchOwner as SearchOwner,
        SessionFailedReason as SessionFailedReason,
        SessionFailedRequestReason as SessionFailedRequestReason,
        SessionFailedSamplingSessionReason as SessionFailedSamplingSessionReason,
        SessionFailedTrainingRunReason as SessionFailedTrainingRunReason,
        SessionStatusQuery as SessionStatusQuery,
        StorageBillingEvent as StorageBillingEvent,
        TrainingBillingEvent as TrainingBillingEvent,
        UserSearchOwner as UserSearchOwner,
    )
    from tinkex.types.optimizer import (
        AdamOptimizerConfig as AdamOptimizerConfig,
        AdamParams as AdamParams,
        DimuonOptimizerConfig as DimuonOptimizerConfig,
        DimuonParams as DimuonParams,
        OptimizerConfig as OptimizerConfig,
        OptimParams as OptimParams,
    )
    from tinkex.types.provenance import (
        PromptProvenanceSpan as PromptProvenanceSpan,
        ProvenanceSpan as ProvenanceSpan,
        SampledProvenanceSpan as SampledProvenanceSpan,
    )
    from tinkex.types.rest import (
        Checkpoint as Checkpoint,
        CheckpointArchiveUrlResponse as CheckpointArchiveUrlResponse,
        CheckpointsListResponse as CheckpointsListResponse,
        CopyWeightsResponse as CopyWeightsResponse,
        Cursor as Cursor,
        ExternalWeightsUrlsResponse as ExternalWeightsUrlsResponse,
        TrainingRun as TrainingRun,
        TrainingRunsResponse as TrainingRunsResponse,
        WeightsInfoResponse as WeightsInfoResponse,
    )
    from tinkex.types.sampling import (
        PromptAltTokens as PromptAltTokens,
        SampledSequence as SampledSequence,
        SampleRequest as SampleRequest,
        SampleResponse as SampleResponse,
        SamplingParams as SamplingParams,
        TopkLogprobs as TopkLogprobs,
    )
    from tinkex.types.service import (
        ApiKeyInfo as ApiKeyInfo,
        CreateSamplingSessionResponse as CreateSamplingSessionResponse,
        CreateSessionResponse as CreateSessionResponse,
        GetSamplerResponse as GetSamplerResponse,
        GetServerCapabilitiesResponse as GetServerCapabilitiesResponse,
        JoinSamplingSessionResponse as JoinSamplingSessionResponse,
        SupportedModel as SupportedModel,
        UntypedFuture as UntypedFuture,
        WhoamiResponse as WhoamiResponse,
    )
    from tinkex.types.session_search import (
        AccessibleSessions as AccessibleSessions,
        GetSessionResponse as GetSessionResponse,
        ListSessionsResponse as ListSessionsResponse,
        OwnSessions as OwnSessions,
        RequestFailure as RequestFailure,
        SamplingSessionFailure as SamplingSessionFailure,
        SessionActive as SessionActive,
        SessionCancelled as SessionCancelled,
        SessionClientFinished as SessionClientFinished,
        SessionFailed as SessionFailed,
        SessionFailureReason as SessionFailureReason,
        SessionFinishReason as SessionFinishReason,
        SessionOwnerFilter as SessionOwnerFilter,
        SessionSearchCursor as SessionSearchCursor,
        SessionSearchRequest as SessionSearchRequest,
        SessionSearchResponse as SessionSearchResponse,
        SessionsOfUsers as SessionsOfUsers,
        SessionStatus as SessionStatus,
        SessionStatusFilter as SessionStatusFilter,
        SessionSummary as SessionSummary,
        SessionTraceExport as SessionTraceExport,
        TrainingRunFailure as TrainingRunFailure,
    )
    from tinkex.types.tensor_data import (
        TensorData as TensorData,
    )
    from tinkex.types.training import (
        CreateCustomLossResponse as CreateCustomLossResponse,
        CreateModelResponse as CreateModelResponse,
        ForwardBackwardOutput as ForwardBackwardOutput,
        GetInfoResponse as GetInfoResponse,
        LoadWeightsResponse as LoadWeightsResponse,
        LoraConfig as LoraConfig,
        ModelData as ModelData,
        OptimStepResponse as OptimStepResponse,
        SaveWeightsExternalResponse as SaveWeightsExternalResponse,
        SaveWeightsForSamplerResponse as SaveWeightsForSamplerResponse,
        SaveWeightsResponse as SaveWeightsResponse,
        UnloadModelResponse as UnloadModelResponse,
    )

_MODULES = {
    "_union": [
        "UnknownVariant",
    ],
    "admin": [
        "AuditLogEntry",
        "AuditLogResponse",
        "BillingEventInfo",
        "BillingSession",
        "BillingUsageEvent",
        "BillingUsageResponse",
        "CheckpointStorageUsage",
        "CheckpointUsage",
        "CurrentCheckpointStorageUsageResponse",
        "SamplingPrefillUsage",
        "SamplingSampleUsage",
        "StorageUsage",
        "TrainingUsage",
    ],
    "checkpoint_path": [
        "ParsedCheckpointTinkerPath",
    ],
    "chunks": [
        "DmelChunk",
        "EncodedTextChunk",
        "ImageAssetPointerChunk",
        "ImageChunk",
        "ModelInputChunk",
    ],
    "datum": [
        "Datum",
        "ForwardBackwardRequest",
    ],
    "model_input": [
        "ModelInput",
    ],
    "names": [
        "CheckpointType",
        "ModelID",
        "RequestErrorCategory",
        "StopReason",
        "TensorDtype",
    ],
    "official_names": [
        "AccessibleSearchOwner",
        "ActiveSessionStatusQuery",
        "BillingUsageSession",
        "CancelledSessionStatusQuery",
        "CheckpointBillingEvent",
        "ClientFinishedSessionStatusQuery",
        "ClientSessionFinished",
        "CurrentCheckpointStorageUsageItem",
        "CustomLossInputRank",
        "FailedSessionStatusQuery",
        "LossFnInputs",
        "LossFnOutput",
        "LossFnType",
        "OwnSearchOwner",
        "RequestID",
        "SamplingClientKind",
        "SamplingPrefillBillingEvent",
        "SamplingSampleBillingEvent",
        "SearchOwner",
        "SessionFailedReason",
        "SessionFailedRequestReason",
        "SessionFailedSamplingSessionReason",
        "SessionFailedTrainingRunReason",
        "SessionStatusQuery",
        "StorageBillingEvent",
        "TrainingBillingEvent",
        "UserSearchOwner",
    ],
    "optimizer": [
        "AdamOptimizerConfig",
        "AdamParams",
        "DimuonOptimizerConfig",
        "DimuonParams",
        "OptimizerConfig",
        "OptimParams",
    ],
    "provenance": [
        "PromptProvenanceSpan",
        "ProvenanceSpan",
        "SampledProvenanceSpan",
    ],
    "rest": [
        "Checkpoint",
        "CheckpointArchiveUrlResponse",
        "CheckpointsListResponse",
        "CopyWeightsResponse",
        "Cursor",
        "ExternalWeightsUrlsResponse",
        "TrainingRun",
        "TrainingRunsResponse",
        "WeightsInfoResponse",
    ],
    "sampling": [
        "PromptAltTokens",
        "SampledSequence",
        "SampleRequest",
        "SampleResponse",
        "SamplingParams",
        "TopkLogprobs",
    ],
    "service": [
        "ApiKeyInfo",
        "CreateSamplingSessionResponse",
        "CreateSessionResponse",
        "GetSamplerResponse",
        "GetServerCapabilitiesResponse",
        "JoinSamplingSessionResponse",
        "SupportedModel",
        "UntypedFuture",
        "WhoamiResponse",
    ],
    "session_search": [
        "AccessibleSessions",
        "GetSessionResponse",
        "ListSessionsResponse",
        "OwnSessions",
        "RequestFailure",
        "SamplingSessionFailure",
        "SessionActive",
        "SessionCancelled",
        "SessionClientFinished",
        "SessionFailed",
        "SessionFailureReason",
        "SessionFinishReason",
        "SessionOwnerFilter",
        "SessionSearchCursor",
        "SessionSearchRequest",
        "SessionSearchResponse",
        "SessionsOfUsers",
        "SessionStatus",
        "SessionStatusFilter",
        "SessionSummary",
        "SessionTraceExport",
        "TrainingRunFailure",
    ],
    "tensor_data": [
        "TensorData",
    ],
    "training": [
        "CreateCustomLossResponse",
        "CreateModelResponse",
        "ForwardBackwardOutput",
        "GetInfoResponse",
        "LoadWeightsResponse",
        "LoraConfig",
        "ModelData",
        "OptimStepResponse",
        "SaveWeightsExternalResponse",
        "SaveWeightsForSamplerResponse",
        "SaveWeightsResponse",
        "UnloadModelResponse",
    ],
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tinkex.types' has no attribute {name!r}")
    value = getattr(import_late(f"tinkex.types.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
