"""RestClient: runs, checkpoints and sessions on the server."""

from __future__ import annotations

from typing import Callable, Optional, TypeVar

from tinkex.api import rest as api, sampling as sampling_api, sessions as sessions_api
from tinkex.batch_checks import check_ttl
from tinkex.child_client import ChildClient
from tinkex.errors import InvalidInputError
from tinkex.futures import APIFuture
from tinkex.transport import Transport
from tinkex.types import (
    CheckpointsListResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from tinkex.types.checkpoint_path import check_tinker_path

T = TypeVar("T")


class RestClient(ChildClient):
    """Lists and manages what is on the server.  Thread-safe.

    Made by ServiceClient.  Every method returns a future at once; futures raise NotFoundError for
    what does not exist and APIError otherwise.  Paths are ``tinker://<run>/<kind>/<name>``.
    """

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        """The base models the server offers."""
        return self._run("get_server_capabilities", sessions_api.get_server_capabilities)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: str = "owned",
        project_id: Optional[str] = None,
    ) -> APIFuture[TrainingRunsResponse]:
        """A page of training runs, the last used first."""
        _check_page(limit, offset)
        return self._run(
            "list_training_runs",
            lambda transport: api.list_training_runs(
                transport,
                limit=limit,
                offset=offset,
                access_scope=access_scope,
                project_id=project_id,
            ),
        )

    def get_training_run(
        self, training_run_id: str, access_scope: str = "owned"
    ) -> APIFuture[TrainingRun]:
        """One training run."""
        return self._run(
            "get_training_run",
            lambda transport: api.get_training_run(
                transport, training_run_id, access_scope=access_scope
            ),
        )

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> APIFuture[TrainingRun]:
        """The training run that a checkpoint came from."""
        run_id = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path).training_run_id
        return self.get_training_run(run_id, access_scope)

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """All checkpoints of one run."""
        return self._run(
            "list_checkpoints", lambda transport: api.list_checkpoints(transport, training_run_id)
        )

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> APIFuture[CheckpointsListResponse]:
        """A page of all checkpoints, newest first."""
        _check_page(limit, offset)
        return self._run(
            "list_user_checkpoints",
            lambda transport: api.list_user_checkpoints(transport, limit=limit, offset=offset),
        )

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """What a checkpoint was trained from, and how."""
        check_tinker_path(tinker_path)
        return self._run(
            "get_weights_info", lambda transport: api.get_weights_info(transport, tinker_path)
        )

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Delete a checkpoint for good; *checkpoint_id* is ``<kind>/<name>``."""
        return self._run(
            "delete_checkpoint",
            lambda transport: api.delete_checkpoint(transport, training_run_id, checkpoint_id),
        )

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Delete a checkpoint for good."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self.delete_checkpoint(parsed.training_run_id, parsed.checkpoint_id)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Let everybody read a checkpoint.  ConflictError if it is public already."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self._run(
            "publish_checkpoint",
            lambda transport: api.publish_checkpoint(
                transport, parsed.training_run_id, parsed.checkpoint_id
            ),
        )

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Make a checkpoint private again.  ConflictError if it is."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self._run(
            "unpublish_checkpoint",
            lambda transport: api.unpublish_checkpoint(
                transport, parsed.training_run_id, parsed.checkpoint_id
            ),
        )

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: Optional[int]
    ) -> APIFuture[None]:
        """Have the server delete a checkpoint after *ttl_seconds*; None keeps it for ever."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        check_ttl(ttl_seconds)
        return self._run(
            "set_checkpoint_ttl",
            lambda transport: api.set_checkpoint_ttl(
                transport, parsed.training_run_id, parsed.checkpoint_id, ttl_seconds
            ),
        )

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """A page of session ids, newest first; sessions that ended are among them."""
        _check_page(limit, offset)
        return self._run(
            "list_sessions",
            lambda transport: api.list_sessions(
                transport, limit=limit, offset=offset, access_scope=access_scope
            ),
        )

    def get_session(
        self, session_id: str, access_scope: str = "owned"
    ) -> APIFuture[GetSessionResponse]:
        """The runs and samplers of one session."""
        return self._run(
            "get_session",
            lambda transport: api.get_session(transport, session_id, access_scope=access_scope),
        )

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        """What a sampler samples from."""
        return self._run(
            "get_sampler", lambda transport: sampling_api.get_sampler(transport, sampler_id)
        )

    def _run(self, kind: str, call: Callable[[Transport], T]) -> APIFuture[T]:
        self._ensure_open(kind)
        return self._session.run(kind, lambda: call(self._session.transport))


def _check_page(limit: int, offset: int) -> None:
    if not (type(limit) is type(offset) is int and limit >= 1 and offset >= 0):
        raise InvalidInputError(
            f"limit is {limit!r} and offset {offset!r}; need limit >= 1, offset >= 0"
        )
