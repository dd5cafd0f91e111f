"""The public names of tinkex, and where they live: ``__init__.py`` reads this file."""

from tinkex import auth as auth, types as types
from tinkex._sessions.manager import SessionManager as SessionManager
from tinkex._training.custom_loss import (
    LossHandle as LossHandle,
    PerDatumLossFn as PerDatumLossFn,
)
from tinkex._transport.server_state import ServerDialect as ServerDialect
from tinkex._version import __version__ as __version__
from tinkex.as_tinker import install_as_tinker as install_as_tinker
from tinkex.clients.admin import AdminClient as AdminClient
from tinkex.clients.pipeline import Pipeline as Pipeline, PipelineStep as PipelineStep
from tinkex.clients.rest import RestClient as RestClient
from tinkex.clients.sample_stream import Sampled as Sampled, SampleStream as SampleStream
from tinkex.clients.sampling import SamplingClient as SamplingClient
from tinkex.clients.service import ServiceClient as ServiceClient
from tinkex.clients.training import (
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
    RunFolderError as RunFolderError,
    SequenceLostError as SequenceLostError,
    SessionLostError as SessionLostError,
    TinkerError as TinkerError,
    TinkexError as TinkexError,
    UnprocessableEntityError as UnprocessableEntityError,
    UnsupportedError as UnsupportedError,
)
from tinkex.futures import APIFuture as APIFuture, FutureStatus as FutureStatus
from tinkex.metrics import Latency as Latency, Metrics as Metrics
from tinkex.retry import RetryConfig as RetryConfig
from tinkex.runs.records import read_run as read_run
from tinkex.runs.run import Run as Run
from tinkex.runs.step import RunStep as RunStep
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

# The official SDK's names for the return types of creators, which here return the client itself.
BackcompatTrainingClientFuture = TrainingClient
BackcompatSamplingClientFuture = SamplingClient

__title__: str
