"""How a run is created: with a new adapter, or from a checkpoint.

The hosted service creates a run from a checkpoint with one request (docs/protocol.md, "Loading
weights", form 1).  Servers that refuse this form take two: the first creates the run with the
settings that weights_info reports about the checkpoint, and the run's first request loads the
checkpoint (form 2).  The client remembers which form the server accepts.

Everything here blocks; it runs on a session's background threads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Dict,
    Mapping,
    Optional,
    Type,
    TypeVar,
    Union,
)

from tinkex._api import rest, training as api
from tinkex._api._call import read
from tinkex._results.pending import AcceptedRequest
from tinkex._training.checks import check_metadata, check_token
from tinkex.errors import APIStatusError, RouteMissingError, TinkexError
from tinkex.futures import APIFuture
from tinkex.types import (
    CreateModelResponse,
    LoadWeightsResponse,
    LoraConfig,
    OptimizerConfig,
    UntypedFuture,
    WeightsInfoResponse,
)
from tinkex.types._wire import Wire
from tinkex.types.checkpoint_path import check_model_name, check_tinker_path
from tinkex.types.optimizer import optimizer_config_to_wire

if TYPE_CHECKING:
    from tinkex._sessions.runtime import Runtime

logger = logging.getLogger(__name__)

W = TypeVar("W", bound=Wire)

#: Fields that only one of the two forms has: an error about one of them concerns the form.
_FORM_FIELDS = ("model_id", "session_id", "model_seq_id", "base_model", "user_metadata")

# The field at fault in an error of pydantic, whose text repeats the body with all field names.
_FAULT_AT = re.compile(r'"loc":\s*\[[^\]]*"(\w+)"\s*\]')


@dataclasses.dataclass(frozen=True)
class NewRun:
    """A newly created run; its next request has the ``seq_id`` *next_seq_id*."""

    model_id: str
    base_model: Optional[str]
    next_seq_id: int = 1


def prepare_run(
    runtime: Runtime, source: Union[NewAdapter, FromCheckpoint]
) -> Callable[[], NewRun]:
    """Return a function that creates the run, for a background thread.

    The run's ``model_seq_id`` is taken now, so that runs are numbered in call order.
    """
    runtime.ensure_open(source.kind)
    return functools.partial(source.create, runtime, runtime.session.next_model_seq_id())


@dataclasses.dataclass(frozen=True)
class NewAdapter:
    """A run to be created with a new adapter.

    Raises:
        InvalidInputError: a field is invalid.
    """

    kind: ClassVar[str] = "create_lora_training_client"

    base_model: str
    lora_config: LoraConfig
    user_metadata: Optional[Mapping[str, str]] = None
    optimizer_config: Optional[OptimizerConfig] = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "base_model", check_model_name(self.base_model))
        self.lora_config.check()
        set_field(self, "user_metadata", check_metadata(self.user_metadata))
        set_field(self, "optimizer_config", optimizer_config_to_wire(self.optimizer_config))

    def create(self, runtime: Runtime, model_seq_id: int) -> NewRun:
        """Create the run, number *model_seq_id* of its session.

        Raises APIError or RequestFailedError.
        """
        accepted = api.submit(
            runtime.transport,
            "create_model",
            session_id=runtime.session.session_id,
            model_seq_id=model_seq_id,
            **{**vars(self), "lora_config": self.lora_config.to_wire()},
        )
        created = wait_for_result(runtime, "create_model", accepted, CreateModelResponse)
        return NewRun(created.model_id, self.base_model)


@dataclasses.dataclass(frozen=True)
class FromCheckpoint:
    """A run to be created from the checkpoint at *path*.

    Attributes:
        optimizer: also restore the optimizer's state.

    Raises:
        InvalidInputError: a field is invalid.
    """

    kind: ClassVar[str] = "create_training_client_from_state"

    path: str
    optimizer: bool
    base_model: Optional[str] = None
    user_metadata: Optional[Mapping[str, str]] = None
    weights_access_token: Optional[str] = None
    optimizer_config: Optional[OptimizerConfig] = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "path", check_tinker_path(self.path))
        set_field(self, "weights_access_token", check_token(self.weights_access_token))
        if self.base_model is not None:
            set_field(self, "base_model", check_model_name(self.base_model))
        set_field(self, "user_metadata", check_metadata(self.user_metadata))
        set_field(self, "optimizer_config", optimizer_config_to_wire(self.optimizer_config))

    def create(self, runtime: Runtime, model_seq_id: int) -> NewRun:
        """Create the run, number *model_seq_id* of its session, in the form the server accepts.

        Raises:
            APIStatusError: the server refuses both forms; or it cannot report the checkpoint's base
                model, and none was given.
            RequestFailedError: the checkpoint could not be loaded.
        """
        server, session_id = runtime.transport.server, runtime.session.session_id
        if server.creates_runs_by_loading is False:
            return self._in_two_requests(runtime, model_seq_id)
        try:
            accepted = api.submit(
                runtime.transport,
                "load_weights",
                session_id=session_id,
                model_seq_id=model_seq_id,
                **vars(self),
            )
        except APIStatusError as error:
            # Some servers respond with a plain 500 to a form that they do not know.  If a server
            # has accepted the form before, a 500 is a failure like any other.
            crashed = error.status == 500 and server.creates_runs_by_loading is None
            if not (crashed or _refuses_form(error)):
                raise
            logger.info("%s; falling back to create_model + load_weights", error.message)
            created = self._after_refusal(runtime, model_seq_id, error)
            # Noted only now: had the other form failed, too, the refusal may have been about the
            # checkpoint.
            server.creates_runs_by_loading = False
            return created
        # Noted before the result: an accepted request has the right form, even if loading fails.
        server.creates_runs_by_loading = True
        loaded = wait_for_result(runtime, "load_weights", accepted, LoadWeightsResponse)
        # All servers form the id like this, even those that do not send it (docs/protocol.md,
        # "Training runs").
        model_id = loaded.model_id or accepted.model_id
        return NewRun(model_id or f"{session_id}:train:{model_seq_id}", self.base_model)

    def _after_refusal(
        self, runtime: Runtime, model_seq_id: int, refusal: APIStatusError
    ) -> NewRun:
        try:
            return self._in_two_requests(runtime, model_seq_id)
        except APIStatusError as error:
            error.hint = error.hint or f"In one request, the response was: {refusal.message}"
            raise error from refusal

    def _in_two_requests(self, runtime: Runtime, model_seq_id: int) -> NewRun:
        """Create the run, then load the checkpoint with its first request."""
        info = self._weights_info(runtime)
        base_model = self.base_model or info.base_model
        # Under the model_seq_id of the refused request: if that request has created a run after
        # all, the server will not create a second one.
        adapter = NewAdapter(
            base_model, _lora_of(info), self.user_metadata, self._optimizer_config(info)
        )
        created = adapter.create(runtime, model_seq_id)
        try:
            # The run has no queue yet to number its requests; the queue will begin at 2.
            accepted = api.submit(
                runtime.transport,
                "load_weights",
                model_id=created.model_id,
                seq_id=1,
                path=self.path,
                optimizer=self.optimizer,
                weights_access_token=self.weights_access_token,
            )
            wait_for_result(runtime, "load_weights", accepted, LoadWeightsResponse)
        except TinkexError as error:
            if info.lora_rank is None:
                error.hint = error.hint or self._name_the_rank(base_model)
            # No client refers to the run, which would use the server's memory until the session
            # ends.
            _unload(runtime, created.model_id)
            raise
        return dataclasses.replace(created, next_seq_id=2)

    def _weights_info(self, runtime: Runtime) -> WeightsInfoResponse:
        try:
            return rest.get_weights_info(runtime.transport, self.path)
        except RouteMissingError as error:
            if self.base_model is None:
                error.hint = (
                    "The server does not report what the checkpoint was trained from: give "
                    f"base_model=. {self._name_the_rank('<base model>')}"
                )
                raise
        # With a base model the run can still be created, with the default rank of `LoraConfig`.
        logger.info("the server does not report the rank of %s; using 32", self.path)
        return WeightsInfoResponse(self.base_model, is_lora=True)

    def _optimizer_config(self, info: WeightsInfoResponse) -> Optional[OptimizerConfig]:
        """Return the given optimizer, or else the checkpoint's own unless it is the default."""
        if self.optimizer_config is not None:
            return self.optimizer_config
        # The default is omitted because some servers reject fields that they do not know
        # (docs/protocol.md, "Bodies").
        own = info.optimizer_config or {}
        return own if self.optimizer and own.get("type", "adamw") != "adamw" else None

    def _name_the_rank(self, base_model: str) -> str:
        load = "load_state_with_optimizer" if self.optimizer else "load_state"
        return (
            "For a rank other than 32, first make the run with "
            f"create_lora_training_client({base_model!r}, rank=...), then {load}({self.path!r})."
        )


def wait_for_result(
    runtime: Runtime, kind: str, accepted: UntypedFuture, response_type: Type[W]
) -> W:
    """Wait for the result of work that the server has accepted."""
    future: APIFuture[W] = runtime.poller.new_future(kind)
    decode = functools.partial(read, response_type, name=kind)
    request = AcceptedRequest(future, decode, "a new run", accepted.request_id)
    # A lane of its own, because no other result has to come first.
    runtime.poller.watch(f"create {accepted.request_id}", request)
    return future.result()


def _refuses_form(error: APIStatusError) -> bool:
    """Whether *error* is about the form of the request rather than its contents."""
    if error.status not in (400, 422):
        return False
    fields = _FAULT_AT.findall(error.message)
    if fields:
        return any(name in _FORM_FIELDS for name in fields)
    return any(name in error.message for name in _FORM_FIELDS)


def _lora_of(info: WeightsInfoResponse) -> LoraConfig:
    known: Dict[str, Any] = {
        "rank": info.lora_rank,
        "train_unembed": info.train_unembed,
        "train_mlp": info.train_mlp,
        "train_attn": info.train_attn,
    }
    return LoraConfig(**{name: value for name, value in known.items() if value is not None})


def _unload(runtime: Runtime, model_id: str) -> None:
    """Have the server drop a run that cannot be used, if it supports that."""
    try:
        api.unload_model(runtime.transport, model_id)
    except TinkexError as error:
        # Not raised: the caller is about to raise the reason why the checkpoint was not loaded.
        logger.debug("run %s stays on the server: %s", model_id, error)
