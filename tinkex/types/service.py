"""Sessions, samplers, capabilities and untyped futures (docs/protocol.md, "Sessions")."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional, Type, TypeVar

from tinkex.types._wire import Wire, bulk, json_strings

G = TypeVar("G", bound="GetServerCapabilitiesResponse")


@dataclasses.dataclass(frozen=True)
class CreateSessionResponse(Wire):
    """A session was created; the messages are meant for the user."""

    session_id: str
    info_message: Optional[str] = None
    warning_message: Optional[str] = None
    error_message: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class UntypedFuture(Wire):
    """The response to a submission: poll ``request_id`` for the result."""

    request_id: str
    model_id: Optional[str] = None
    sample_sequence_ids: Optional[List[str]] = bulk(None, read=json_strings)

    @classmethod
    def from_wire(cls, payload: Any) -> UntypedFuture:
        """Read a decoded JSON value; by hand for speed, because every submission returns one."""
        if isinstance(payload, dict):
            request_id, model_id = payload.get("request_id"), payload.get("model_id")
            ids = payload.get("sample_sequence_ids")
            listed = ids is None or (isinstance(ids, list) and all(type(i) is str for i in ids))
            if isinstance(request_id, str) and isinstance(model_id, (str, type(None))) and listed:
                return cls(request_id, model_id, ids)
        return super().from_wire(payload)  # raises the right error


@dataclasses.dataclass(frozen=True)
class CreateSamplingSessionResponse(Wire):
    """A sampling session was created."""

    sampling_session_id: str


@dataclasses.dataclass(frozen=True)
class JoinSamplingSessionResponse(Wire):
    """A clone of a sampling client was registered; the original client has counter 0."""

    client_counter: int


@dataclasses.dataclass(frozen=True)
class GetSamplerResponse(Wire):
    """What a sampler samples from.  Only the embedded server sends ``tokenizer_id``."""

    sampler_id: str
    base_model: str
    model_path: Optional[str] = None
    tokenizer_id: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class SupportedModel(Wire):
    """A base model that the server offers; fields that it did not report are None."""

    model_name: Optional[str] = None
    max_context_length: Optional[int] = None
    trainable: Optional[bool] = None
    sampleable: Optional[bool] = None


@dataclasses.dataclass(frozen=True)
class GetServerCapabilitiesResponse(Wire):
    """The base models that the server offers."""

    supported_models: List[SupportedModel]

    @classmethod
    def from_wire(cls: Type[G], payload: Any) -> G:
        """Read a decoded JSON value; one server calls a model's name ``model_id``."""
        models = payload.get("supported_models") if isinstance(payload, dict) else None
        if isinstance(models, list):
            payload = {**payload, "supported_models": [_named(model) for model in models]}
        return super().from_wire(payload)


@dataclasses.dataclass(frozen=True)
class WhoamiResponse(Wire):
    """The owner of a key.  ``org_urn`` is empty if the server does not report it."""

    user_urn: str
    org_urn: str
    email: Optional[str] = None


def _named(model: Any) -> Any:
    if not isinstance(model, dict) or model.get("model_name") is not None:
        return model
    return {**model, "model_name": model.get("model_id")}


@dataclasses.dataclass(frozen=True)
class ApiKeyInfo(Wire):
    """Information about a key; ``details`` names its organization and its user."""

    key_id: int
    name: str = ""
    note: Optional[str] = None
    details: Optional[Dict[str, Any]] = bulk(None)
