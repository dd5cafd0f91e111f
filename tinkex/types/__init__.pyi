"""The public names of tinkex.types, and where they live: ``__init__.py`` reads this file."""

from tinkex.types._wire import UnknownVariant as UnknownVariant
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
from tinkex.types.checkpoint_path import ParsedCheckpointTinkerPath as ParsedCheckpointTinkerPath
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
    LossFnInputs as LossFnInputs,
    PromptProvenanceSpan as PromptProvenanceSpan,
    ProvenanceSpan as ProvenanceSpan,
    SampledProvenanceSpan as SampledProvenanceSpan,
)
from tinkex.types.model_input import ModelInput as ModelInput
from tinkex.types.names import (
    CheckpointType as CheckpointType,
    CustomLossInputRank as CustomLossInputRank,
    LossFnType as LossFnType,
    ModelID as ModelID,
    RequestErrorCategory as RequestErrorCategory,
    RequestID as RequestID,
    SamplingClientKind as SamplingClientKind,
    StopReason as StopReason,
    TensorDtype as TensorDtype,
)
from tinkex.types.optimizer import (
    AdamOptimizerConfig as AdamOptimizerConfig,
    AdamParams as AdamParams,
    DimuonOptimizerConfig as DimuonOptimizerConfig,
    DimuonParams as DimuonParams,
    OptimizerConfig as OptimizerConfig,
    OptimParams as OptimParams,
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
    ActiveSessionStatusQuery as ActiveSessionStatusQuery,
    CancelledSessionStatusQuery as CancelledSessionStatusQuery,
    ClientFinishedSessionStatusQuery as ClientFinishedSessionStatusQuery,
    FailedSessionStatusQuery as FailedSessionStatusQuery,
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
from tinkex.types.tensor_data import TensorData as TensorData
from tinkex.types.training import (
    CreateCustomLossResponse as CreateCustomLossResponse,
    CreateModelResponse as CreateModelResponse,
    ForwardBackwardOutput as ForwardBackwardOutput,
    GetInfoResponse as GetInfoResponse,
    LoadWeightsResponse as LoadWeightsResponse,
    LoraConfig as LoraConfig,
    LossFnOutput as LossFnOutput,
    ModelData as ModelData,
    OptimStepResponse as OptimStepResponse,
    SaveWeightsExternalResponse as SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse as SaveWeightsForSamplerResponse,
    SaveWeightsResponse as SaveWeightsResponse,
    UnloadModelResponse as UnloadModelResponse,
)

# The official SDK's names for types with another name here, for programs that create them, compare
# with them or use them in annotations (docs/compatibility.md).
OwnSearchOwner = OwnSessions
AccessibleSearchOwner = AccessibleSessions
UserSearchOwner = SessionsOfUsers
SearchOwner = SessionOwnerFilter
SessionStatusQuery = SessionStatusFilter
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
