"""How a run is made from a checkpoint: servers differ in whether one request is enough.

The hosted service takes one request for it (docs/protocol.md, "Loading weights", form 1).  Others
refuse that: there the run is made first, with what weights_info tells of the checkpoint, and the
checkpoint loaded by the run's first request (form 2).  What a server does is remembered.

Everything here blocks; it runs on a session's background threads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import Any, Dict, Mapping, Optional, Type, TypeVar

from tinkex._api import rest, training as api
from tinkex._api._call import read
from tinkex._results.pending import AcceptedRequest
from tinkex._sessions.runtime import Runtime
from tinkex._transport.server_state import state_of
from tinkex.errors import APIStatusError, RouteMissingError, TinkexError
from tinkex.futures import APIFuture
from tinkex.types import (
    CreateModelResponse,
    LoadWeightsResponse,
    LoraConfig,
    UntypedFuture,
    WeightsInfoResponse,
)
from tinkex.types._wire import Wire

logger = logging.getLogger(__name__)

W = TypeVar("W", bound=Wire)

#: Fields that only the one-stroke form has or lacks: a complaint about one is about the form.
_FORM_FIELDS = ("model_id", "session_id", "model_seq_id", "base_model", "user_metadata")

# A fault in the words of pydantic, whose text also repeats the body that was sent.
_FAULT_AT = re.compile(r'"loc":\s*\[[^\]]*"(\w+)"\s*\]')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a run is to be made from, and how.

    Attributes:
        number: the run's ``model_seq_id`` in its session.
        optimizer: also restore the optimizer's state.
    """

    number: int
    path: str
    optimizer: bool
    base_model: Optional[str] = None
    user_metadata: Optional[Mapping[str, str]] = None
    weights_access_token: Optional[str] = None
    optimizer_config: Optional[Mapping[str, Any]] = None


@dataclasses.dataclass(frozen=True)
class NewRun:
    """A run that was made; its next request has the number *next_seq_id*."""

    model_id: str
    base_model: Optional[str]
    next_seq_id: int = 1


def wait_for_result(runtime: Runtime, kind: str, accepted: UntypedFuture, answer: Type[W]) -> W:
    """Wait for the result of work that the server has accepted."""
    future: APIFuture[W] = runtime.poller.new_future(kind)
    decode = functools.partial(read, answer, name=kind)
    request = AcceptedRequest(future, decode, "a new run", accepted.request_id)
    runtime.poller.watch(f"create {accepted.request_id}", request)
    return future.result()


def make_run(runtime: Runtime, asked: Checkpoint) -> NewRun:
    """Make a run from a checkpoint, in the way that the server has.

    Raises:
        APIStatusError: the server refuses both ways, or cannot tell what the checkpoint was
            trained from and no base model was given.
        RequestFailedError: the checkpoint could not be loaded.
    """
    server = state_of(runtime.config)
    if server.creates_runs_by_loading is False:
        return _in_two_steps(runtime, asked)
    try:
        accepted = _load_as_run(runtime, asked)
    except APIStatusError as error:
        crashed = error.status == 500 and server.creates_runs_by_loading is None
        if not (crashed or _refuses_form(error)):
            raise
        logger.info("%s; making the run first", error.message)
        return _after_refusal(runtime, asked, error)
    server.note_creates_runs_by_loading(True)
    loaded = wait_for_result(runtime, "load_weights", accepted, LoadWeightsResponse)
    # The id a server does not send is the one all of them make (docs/protocol.md, "Training runs").
    model_id = loaded.model_id or accepted.model_id
    return NewRun(
        model_id or f"{runtime.session.session_id}:train:{asked.number}", asked.base_model
    )


def _load_as_run(runtime: Runtime, asked: Checkpoint) -> UntypedFuture:
    return api.create_model_from_weights(
        runtime.transport,
        session_id=runtime.session.session_id,
        model_seq_id=asked.number,
        path=asked.path,
        optimizer=asked.optimizer,
        base_model=asked.base_model,
        user_metadata=asked.user_metadata,
        weights_access_token=asked.weights_access_token,
        optimizer_config=asked.optimizer_config,
    )


def _refuses_form(error: APIStatusError) -> bool:
    """Tell whether *error* is about the form of the request, not about what it asks for."""
    if error.status not in (400, 422):
        return False
    fields = _FAULT_AT.findall(error.message)
    if fields:
        return any(name in _FORM_FIELDS for name in fields)
    return any(name in error.message for name in _FORM_FIELDS)


def _after_refusal(runtime: Runtime, asked: Checkpoint, refusal: APIStatusError) -> NewRun:
    try:
        made = _in_two_steps(runtime, asked)
    except APIStatusError as error:
        error.hint = error.hint or f"In one request, the answer was: {refusal.message}"
        raise error from refusal
    state_of(runtime.config).note_creates_runs_by_loading(False)
    return made


def _in_two_steps(runtime: Runtime, asked: Checkpoint) -> NewRun:
    """Make the run, then load the checkpoint by its first request."""
    info = _weights_info(runtime, asked)
    base_model = asked.base_model or info.base_model
    # Under the number of the request that was refused: should the server have made a run of that
    # after all, it will not make a second one.
    accepted = api.create_model(
        runtime.transport,
        session_id=runtime.session.session_id,
        model_seq_id=asked.number,
        base_model=base_model,
        lora_config=_lora_of(info),
        user_metadata=asked.user_metadata,
        optimizer_config=_optimizer_of(asked, info),
    )
    created = wait_for_result(runtime, "create_model", accepted, CreateModelResponse)
    try:
        accepted = api.load_weights(
            runtime.transport,
            model_id=created.model_id,
            seq_id=1,
            path=asked.path,
            optimizer=asked.optimizer,
            weights_access_token=asked.weights_access_token,
        )
        wait_for_result(runtime, "load_weights", accepted, LoadWeightsResponse)
    except TinkexError as error:
        if info.lora_rank is None:
            error.hint = error.hint or _name_the_rank(base_model, asked)
        _let_go(runtime, created.model_id)
        raise
    return NewRun(created.model_id, base_model, next_seq_id=2)


def _weights_info(runtime: Runtime, asked: Checkpoint) -> WeightsInfoResponse:
    try:
        return rest.get_weights_info(runtime.transport, asked.path)
    except RouteMissingError as error:
        if asked.base_model is None:
            error.hint = (
                "The server cannot tell what the checkpoint was trained from: give base_model=. "
                + _name_the_rank("<base model>", asked)
            )
            raise
    logger.info("the server does not tell the rank of %s; taking 32", asked.path)
    return WeightsInfoResponse(asked.base_model, is_lora=True)


def _lora_of(info: WeightsInfoResponse) -> LoraConfig:
    known: Dict[str, Any] = {
        "rank": info.lora_rank,
        "train_unembed": info.train_unembed,
        "train_mlp": info.train_mlp,
        "train_attn": info.train_attn,
    }
    return LoraConfig(**{name: value for name, value in known.items() if value is not None})


def _optimizer_of(asked: Checkpoint, info: WeightsInfoResponse) -> Optional[Mapping[str, Any]]:
    """The optimizer asked for; else the checkpoint's own, if it is not everybody's default."""
    if asked.optimizer_config is not None:
        return asked.optimizer_config
    own = info.optimizer_config or {}
    return own if asked.optimizer and own.get("type", "adamw") != "adamw" else None


def _name_the_rank(base_model: str, asked: Checkpoint) -> str:
    load = "load_state_with_optimizer" if asked.optimizer else "load_state"
    return (
        "For a rank other than 32, first make the run with "
        f"create_lora_training_client({base_model!r}, rank=...), then {load}({asked.path!r})."
    )


def _let_go(runtime: Runtime, model_id: str) -> None:
    """Have the server drop a run that is of no use, where it can."""
    try:
        api.unload_model(runtime.transport, model_id)
    except TinkexError as error:
        logger.debug("run %s stays on the server: %s", model_id, error)
