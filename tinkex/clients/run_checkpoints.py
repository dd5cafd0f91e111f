"""RunCheckpoints: the checkpoints of one training run, and samplers of its weights.

The half of TrainingClient that saves and loads; it queues requests in the order of the run.
"""

from __future__ import annotations

from typing import Callable, Mapping, Optional, Sequence, Type, TypeVar

from tinkex._api import training as api
from tinkex._api._call import read
from tinkex._runtime.numeric import as_flag
from tinkex._sessions.runtime import Runtime
from tinkex._training.batch_checks import (
    check_metadata,
    check_name,
    check_recipients,
    check_token,
    check_ttl,
)
from tinkex._training.run import TrainingRun
from tinkex._transport.transport import Reply
from tinkex.clients.base import ChildClient
from tinkex.clients.sampling import SamplingClient
from tinkex.errors import InvalidInputError, ResponseDecodeError
from tinkex.futures import APIFuture
from tinkex.retry_config import RetryConfig, check_retry_config
from tinkex.types import (
    LoadWeightsResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    UntypedFuture,
)
from tinkex.types._wire import Wire
from tinkex.types.checkpoint_path import check_tinker_path

T = TypeVar("T")
W = TypeVar("W", bound=Wire)


class RunCheckpoints(ChildClient):
    """Saves and loads the weights of one run.  See TrainingClient.

    Attributes:
        model_id: the server's id of the run.
    """

    def __init__(
        self, runtime: Runtime, model_id: str, base_model: Optional[str], first_seq_id: int
    ) -> None:
        super().__init__(runtime)
        self.model_id = model_id
        self._base_model = base_model
        self._run = TrainingRun(runtime, model_id, first_seq_id)

    def save_state(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        overwrite: bool = False,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Queue saving weights and optimizer state under *name*; the result has the ``path``.

        Args:
            name: a bare name, unique in the run unless *overwrite*.
            ttl_seconds: how long the server keeps it; None is for ever.
            overwrite: replace a checkpoint of that name, and its metadata.
            user_metadata: to be kept with it.
        """
        name, ttl_seconds = check_name(name), check_ttl(ttl_seconds)
        overwrite = as_flag("overwrite", overwrite)
        metadata = check_metadata(user_metadata)

        def send(seq_id: int) -> UntypedFuture:
            return api.save_weights(
                self._run.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                path=name,
                ttl_seconds=ttl_seconds,
                overwrite=overwrite,
                user_metadata=metadata,
            )

        def decode(reply: Reply) -> SaveWeightsResponse:
            saved = read(SaveWeightsResponse, reply, "save_state")
            self._runtime.session.last_checkpoint = saved.path
            return saved

        return self._submit("save_state", send, decode)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        user_metadata: Optional[Mapping[str, str]] = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Queue saving weights for sampling under *name*; the result has the ``path``.

        Arguments as for `save_state`.
        """
        name, ttl_seconds = check_name(name), check_ttl(ttl_seconds)
        metadata = check_metadata(user_metadata)

        def send(seq_id: int) -> UntypedFuture:
            return api.save_weights_for_sampler(
                self._run.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                path=name,
                ttl_seconds=ttl_seconds,
                user_metadata=metadata,
            )

        return self._submit("save_weights_for_sampler", send, _sampler_reader("path"))

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: Optional[int] = None,
        age_encryption_recipients: Optional[Sequence[str]] = None,
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Queue saving weights for download under *name*; the result has the ``path``.

        Args:
            name, ttl_seconds: as for `save_state`.
            age_encryption_recipients: public keys of age; the files are encrypted for them.

        The future raises RouteMissingError where the server has no such route.
        """
        name, ttl_seconds = check_name(name), check_ttl(ttl_seconds)
        recipients = check_recipients(age_encryption_recipients)

        def send(seq_id: int) -> UntypedFuture:
            return api.save_weights_external(
                self._run.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                path=name,
                ttl_seconds=ttl_seconds,
                age_encryption_recipients=recipients,
            )

        return self._submit("save_weights_external", send, reader(SaveWeightsExternalResponse))

    def load_state(
        self, path: str, weights_access_token: Optional[str] = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Queue loading the weights at *path* into this run, with a fresh optimizer."""
        return self._load("load_state", path, False, weights_access_token)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: Optional[str] = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Queue loading weights and optimizer state at *path* into this run."""
        return self._load("load_state_with_optimizer", path, True, weights_access_token)

    def save_weights_and_get_sampling_client(
        self,
        name: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> SamplingClient:
        """Save the present weights for this session only, and return a client that samples them.

        Blocks.

        Args:
            name: has no effect; it is there for scripts of the official SDK.
            retry_config: limits and retries of the new client.
            record_stability_info: have the server record, with each sample, what later training
                may refer to by its sequence_id.
            kind: ``"snapshot"``: the client samples these weights for ever.  ``"inflight"``:
                it samples the newest weights saved so, never older ones than these; generations
                may span an update.
        """
        return self.save_weights_and_get_sampling_client_future(
            name, retry_config, record_stability_info, kind
        ).result()

    def save_weights_and_get_sampling_client_future(
        self,
        name: Optional[str] = None,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> APIFuture[SamplingClient]:
        """Like `save_weights_and_get_sampling_client`; returns at once."""
        if kind not in ("snapshot", "inflight"):
            raise InvalidInputError(f"kind is {kind!r}; it must be 'snapshot' or 'inflight'")
        check_retry_config(retry_config)
        runtime = self._runtime

        def send(seq_id: int) -> UntypedFuture:
            return api.save_weights_for_sampler(
                self._run.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                sampling_session_seq_id=runtime.session.next_sampler_seq_id(),
                kind=kind,
            )

        def decode(reply: Reply) -> SamplingClient:
            saved = _sampler_reader("sampling_session_id")(reply)
            return SamplingClient(
                runtime,
                str(saved.sampling_session_id),
                self._base_model,
                retry_config=retry_config,
                record_stability_info=record_stability_info,
            )

        return self._submit("save_weights_and_get_sampling_client", send, decode)

    def create_sampling_client(
        self,
        model_path: str,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """Return a client that samples the checkpoint at *model_path*.  Blocks.

        Further arguments as for `save_weights_and_get_sampling_client`.
        """
        return self.create_sampling_client_future(
            model_path, retry_config, record_stability_info
        ).result()

    def create_sampling_client_future(
        self,
        model_path: str,
        retry_config: Optional[RetryConfig] = None,
        record_stability_info: bool = False,
    ) -> APIFuture[SamplingClient]:
        """Like `create_sampling_client`; returns at once."""
        self._ensure_open("create_sampling_client")
        own = isinstance(model_path, str) and model_path.startswith(f"tinker://{self.model_id}/")
        return SamplingClient.create_future(
            self._runtime,
            model_path=model_path,
            known_base_model=self._base_model if own else None,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    def _load(
        self, kind: str, path: str, optimizer: bool, token: Optional[str]
    ) -> APIFuture[LoadWeightsResponse]:
        path, token = check_tinker_path(path), check_token(token)

        def send(seq_id: int) -> UntypedFuture:
            return api.load_weights(
                self._run.transport,
                model_id=self.model_id,
                seq_id=seq_id,
                path=path,
                optimizer=optimizer,
                weights_access_token=token,
            )

        return self._submit(kind, send, reader(LoadWeightsResponse))

    def _submit(
        self, kind: str, send: Callable[[int], UntypedFuture], decode: Callable[[Reply], T]
    ) -> APIFuture[T]:
        """Queue one request."""
        self._ensure_open(kind)
        return self._run.submit(kind, send, decode)


def reader(answer: Type[W]) -> Callable[[Reply], W]:
    """Return what reads an *answer*."""
    return lambda reply: read(answer, reply, answer.__name__)


def _sampler_reader(field: str) -> Callable[[Reply], SaveWeightsForSamplerResponse]:
    """A reader that insists on one of the two optional fields."""

    def decode(reply: Reply) -> SaveWeightsForSamplerResponse:
        saved = read(SaveWeightsForSamplerResponse, reply, "save_weights_for_sampler")
        if not getattr(saved, field):
            raise ResponseDecodeError(f"save_weights_for_sampler: the answer has no {field}")
        return saved

    return decode
