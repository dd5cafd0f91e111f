"""tinkex: a threaded, synchronous SDK for the Tinker API.

Fine-tune open-weight language models with LoRA adapters, and sample from them, on someone
else's GPUs.  Names are loaded when first used; importing the package starts nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from tinkex._version import __version__

if TYPE_CHECKING:
    from tinkex import types as types
    from tinkex.config import Config as Config
    from tinkex.errors import (
        APIConnectionError as APIConnectionError,
        APIError as APIError,
        APIResponseValidationError as APIResponseValidationError,
        APIStatusError as APIStatusError,
        APITimeoutError as APITimeoutError,
        AuthenticationError as AuthenticationError,
        BadRequestError as BadRequestError,
        BillingError as BillingError,
        ClientClosedError as ClientClosedError,
        ConfigError as ConfigError,
        ConflictError as ConflictError,
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
        SessionLostError as SessionLostError,
        TinkerError as TinkerError,
        TinkexError as TinkexError,
        UnprocessableEntityError as UnprocessableEntityError,
    )
    from tinkex.futures import APIFuture as APIFuture, FutureStatus as FutureStatus
    from tinkex.rest_client import RestClient as RestClient
    from tinkex.sampling_client import SamplingClient as SamplingClient
    from tinkex.service_client import ServiceClient as ServiceClient
    from tinkex.session_manager import SessionManager as SessionManager
    from tinkex.training_client import TrainingClient as TrainingClient, TrainStep as TrainStep
    from tinkex.types import (
        AdamParams as AdamParams,
        Checkpoint as Checkpoint,
        Datum as Datum,
        DmelChunk as DmelChunk,
        EncodedTextChunk as EncodedTextChunk,
        ForwardBackwardOutput as ForwardBackwardOutput,
        ImageAssetPointerChunk as ImageAssetPointerChunk,
        ImageChunk as ImageChunk,
        LoraConfig as LoraConfig,
        ModelInput as ModelInput,
        ModelInputChunk as ModelInputChunk,
        OptimStepResponse as OptimStepResponse,
        ParsedCheckpointTinkerPath as ParsedCheckpointTinkerPath,
        SampledSequence as SampledSequence,
        SampleRequest as SampleRequest,
        SampleResponse as SampleResponse,
        SamplingParams as SamplingParams,
        TensorData as TensorData,
        TrainingRun as TrainingRun,
    )

_MODULES = {
    "config": ["Config"],
    "errors": [
        "APIConnectionError",
        "APIError",
        "APIResponseValidationError",
        "APIStatusError",
        "APITimeoutError",
        "AuthenticationError",
        "BadRequestError",
        "BillingError",
        "ClientClosedError",
        "ConfigError",
        "ConflictError",
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
        "SessionLostError",
        "TinkerError",
        "TinkexError",
        "UnprocessableEntityError",
    ],
    "futures": ["APIFuture", "FutureStatus"],
    "rest_client": ["RestClient"],
    "sampling_client": ["SamplingClient"],
    "service_client": ["ServiceClient"],
    "session_manager": ["SessionManager"],
    "training_client": ["TrainStep", "TrainingClient"],
    "types": [
        "AdamParams",
        "Checkpoint",
        "Datum",
        "DmelChunk",
        "EncodedTextChunk",
        "ForwardBackwardOutput",
        "ImageAssetPointerChunk",
        "ImageChunk",
        "LoraConfig",
        "ModelInput",
        "ModelInputChunk",
        "OptimStepResponse",
        "ParsedCheckpointTinkerPath",
        "SampleRequest",
        "SampleResponse",
        "SampledSequence",
        "SamplingParams",
        "TensorData",
        "TrainingRun",
    ],
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", "types", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name == "types":
        return importlib.import_module("tinkex.types")
    if name not in _WHERE:
        raise AttributeError(f"module 'tinkex' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tinkex.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(__all__)
