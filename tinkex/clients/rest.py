"""RestClient: manages runs, checkpoints and sessions on the server."""

from __future__ import annotations

import threading
import warnings
from datetime import date
from pathlib import Path
from typing import Any, Mapping, Optional, Tuple, Union

from tinkex import auth
from tinkex._api import (
    archives as archives_api,
    rest as api,
    sampling as sampling_api,
    sessions as sessions_api,
)
from tinkex._downloads import checkpoints, hub
from tinkex._downloads.checkpoints import Progress
from tinkex._runtime.awaiting import result_of
from tinkex._runtime.numeric import as_int, is_int, to_int
from tinkex._training.checks import check_token, check_ttl
from tinkex._transport.transport import Transport
from tinkex.clients.admin import AdminClient
from tinkex.clients.base import Instant, LookupClient
from tinkex.errors import ClientClosedError, InvalidInputError, RequestFailedError
from tinkex.futures import APIFuture
from tinkex.types import (
    AuditLogResponse,
    BillingUsageResponse,
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    CurrentCheckpointStorageUsageResponse,
    ExternalWeightsUrlsResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SessionSearchRequest,
    SessionSearchResponse,
    SessionsOfUsers,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)
from tinkex.types.checkpoint_path import check_tinker_path, locate_checkpoint

#: Seconds between two polls of a trace export.
TRACE_POLL_S = 5.0


class RestClient(LookupClient):
    """Lists and manages runs, checkpoints and sessions on the server.  Thread-safe.

    Get one from `ServiceClient.create_rest_client`, or create it directly, which creates nothing on
    the server.  Every method returns a future and does not block, unless its docstring says
    otherwise.  Futures raise NotFoundError if an object does not exist, RouteMissingError if the
    server does not support the operation, and APIError otherwise.  Paths are
    ``tinker://<run>/<kind>/<name>``, or any other form that the server uses.  The arguments are
    those of LookupClient.
    """

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        """Get the base models that the server offers."""
        return self._run(sessions_api.get_server_capabilities)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: str = "owned",
        project_id: Optional[str] = None,
    ) -> APIFuture[TrainingRunsResponse]:
        """List one page of training runs, most recently used first."""
        limit, offset = _page(limit, offset)
        return self._run(
            api.list_training_runs,
            limit=limit,
            offset=offset,
            access_scope=access_scope,
            project_id=project_id,
        )

    def get_training_run(
        self, training_run_id: str, access_scope: str = "owned"
    ) -> APIFuture[TrainingRun]:
        """Get one training run."""
        return self._run(api.get_training_run, training_run_id, access_scope=access_scope)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> APIFuture[TrainingRun]:
        """Get the training run that a checkpoint belongs to."""
        run_id = locate_checkpoint(tinker_path).training_run_id
        return self.get_training_run(run_id, access_scope)

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """List all checkpoints of one run."""
        return self._run(api.list_checkpoints, training_run_id)

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> APIFuture[CheckpointsListResponse]:
        """List one page of the checkpoints of all runs, newest first."""
        limit, offset = _page(limit, offset)
        return self._run(api.list_user_checkpoints, limit=limit, offset=offset)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """Get a checkpoint's base model and how its adapter was trained."""
        tinker_path = check_tinker_path(tinker_path)
        return self._run(api.get_weights_info, tinker_path)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Delete a checkpoint permanently; *checkpoint_id* is ``<kind>/<name>``."""
        return self._run(api.delete_checkpoint, training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Delete a checkpoint permanently."""
        parsed = locate_checkpoint(tinker_path)
        return self.delete_checkpoint(parsed.training_run_id, parsed.checkpoint_id)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Make a checkpoint public; the future raises ConflictError if it already is."""
        parsed = locate_checkpoint(tinker_path)
        return self._run(api.publish_checkpoint, parsed.training_run_id, parsed.checkpoint_id)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Make a checkpoint private again; the future raises ConflictError if it already is."""
        parsed = locate_checkpoint(tinker_path)
        return self._run(api.unpublish_checkpoint, parsed.training_run_id, parsed.checkpoint_id)

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: Optional[int]
    ) -> APIFuture[None]:
        """Have the server delete a checkpoint after *ttl_seconds*; None keeps it for ever."""
        parsed = locate_checkpoint(tinker_path)
        ttl_seconds = check_ttl(ttl_seconds)
        return self._run(
            api.set_checkpoint_ttl, parsed.training_run_id, parsed.checkpoint_id, ttl_seconds
        )

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """List one page of session ids, newest first, including sessions that have ended."""
        limit, offset = _page(limit, offset)
        return self._run(api.list_sessions, limit=limit, offset=offset, access_scope=access_scope)

    def get_session(
        self, session_id: str, access_scope: str = "owned"
    ) -> APIFuture[GetSessionResponse]:
        """Get the runs and samplers of one session."""
        return self._run(api.get_session, session_id, access_scope=access_scope)

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        """Get the base model and checkpoint that a sampler samples from."""
        return self._run(sampling_api.get_sampler, sampler_id)

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrlsResponse]:
        """Get signed URLs of the files of exported weights.

        Raises:
            InvalidInputError: *tinker_path* is not a ``tinker://<run>/external_weights/...``.
        """
        parsed = locate_checkpoint(tinker_path)
        if parsed.checkpoint_type != "external":
            raise InvalidInputError(
                f"{tinker_path} is a {parsed.checkpoint_type} checkpoint, not an exported one",
                hint="save_weights_external exports weights; download_checkpoint takes any kind.",
            )
        return self._run(
            api.get_external_weights_urls, parsed.training_run_id, parsed.checkpoint_id
        )

    def get_checkpoint_archive_url(
        self, training_run_id: str, checkpoint_id: str
    ) -> APIFuture[CheckpointArchiveUrlResponse]:
        """Get a signed URL of an archive that contains all files of a checkpoint.

        The server may take minutes to build the archive; the future waits until it is ready.  The
        hosted service no longer offers archives; `download_checkpoint` works with or without them.
        """
        return self._run(archives_api.get_checkpoint_archive_url, training_run_id, checkpoint_id)

    def get_checkpoint_archive_url_from_tinker_path(
        self, tinker_path: str
    ) -> APIFuture[CheckpointArchiveUrlResponse]:
        """Like `get_checkpoint_archive_url`."""
        parsed = locate_checkpoint(tinker_path)
        return self.get_checkpoint_archive_url(parsed.training_run_id, parsed.checkpoint_id)

    def copy_weights(
        self,
        path: str,
        destination_project_id: Optional[str] = None,
        *,
        ttl_seconds: Optional[int] = None,
        weights_access_token: Optional[str] = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint into a project; the future's result is the path of the copy.

        Args:
            path: the path of the checkpoint.
            destination_project_id: the project; by default the client's own, as set by
                ``project_id`` or ``TINKER_PROJECT_ID``.
            ttl_seconds: how long the server keeps the copy; None means for ever.
            weights_access_token: gives access to another user's checkpoint.

        Raises:
            InvalidInputError: no project is known, or an argument is invalid.
        """
        project_id = destination_project_id or self.config.project_id
        if not project_id:
            raise InvalidInputError(
                "copy_weights needs a project to copy into",
                hint="Give destination_project_id, or set TINKER_PROJECT_ID.",
            )
        return self._copy_weights(path, project_id, ttl_seconds, weights_access_token)

    def _copy_weights(
        self, path: str, project_id: Optional[str], ttl_seconds: Optional[int], token: Optional[str]
    ) -> APIFuture[str]:
        return self._run(
            copy_weights,
            source_path=check_tinker_path(path),
            destination_project_id=project_id,
            ttl_seconds=check_ttl(ttl_seconds),
            weights_access_token=check_token(token),
        )

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        """Move a session to another project."""
        if not isinstance(project_id, str) or not project_id:
            raise InvalidInputError(f"project_id is {project_id!r}; give the id of a project")
        return self._run(api.assign_session_project, session_id, project_id)

    def export_session_trace(self, session_id: str) -> APIFuture[str]:
        """Have the server export a session's trace; the future's result is a signed URL of it.

        The future waits until the export is ready, and raises RequestFailedError if it fails.
        """
        return self._run(export_session_trace, session_id)

    def search_sessions(self, request: SessionSearchRequest) -> APIFuture[SessionSearchResponse]:
        """Find one page of the sessions that match *request*, newest first.

        For the next page, search again with ``cursor=response.next_cursor``.
        """
        _check_search(request)
        return self._run(api.search_sessions, request)

    def whoami(self) -> APIFuture[WhoamiResponse]:
        """Get the owner of the key.

        The future raises RouteMissingError or CredentialError if the server does not report it.
        """
        return self._run(auth.whoami)

    def download_checkpoint(
        self,
        tinker_path: str,
        dest: Union[str, Path],
        *,
        progress: Optional[Progress] = None,
        overwrite: bool = False,
        cancel: Optional[threading.Event] = None,
    ) -> Path:
        """Download the files of a checkpoint into the folder *dest*; return its path.  Blocks.

        An interrupted download leaves what it has fetched in a hidden folder (beside *dest*, or
        inside if *dest* exists); the next call with the same arguments resumes from there.  Only
        one download at a time may use that folder.  If the server has no archives, a training
        checkpoint is first exported: this opens a session, and the export is deleted afterwards.
        Checksums, the end of the archive and the length of the weights are verified.

        PEFT alone must not merge an adapter that was trained with ``train_unembed`` (the default)
        into a model whose output layer is tied to its embedding: see `tinkex.local.merge_adapter`.
        The embedded server puts a note into such a checkpoint.

        Args:
            tinker_path: any kind of checkpoint; a sampler checkpoint requires a server that makes
                archives.
            dest: the folder to write; it is created, with its parents.  Unless *overwrite*, it must
                be empty or not exist.  ``~`` is the home folder.
            progress: called as ``progress(bytes_done, total_or_None)``, in this thread, many times
                a second; if it raises, the download ends with that error.
            overwrite: allow *dest* to contain files.  Once everything has been fetched, adapters
                (``adapter_config.json``, ``adapter_model*``) and files with the names of new ones
                are replaced; other files stay.
            cancel: set it, from any thread, to end the download soon.

        Raises:
            InvalidInputError: *tinker_path* names no checkpoint, or *dest* is not empty.
            RouteMissingError: the server offers no way to download the checkpoint.
            DownloadCancelledError: *cancel* was set.
            ResponseDecodeError: the fetched data is damaged, incomplete or unsafe to unpack.
            APIError: the server refuses the download, or cannot be reached.
            OSError: the files cannot be written.
        """
        self._ensure_open("download_checkpoint")
        folder = checkpoints.fetch_checkpoint(
            self.transport, tinker_path, dest, progress=progress, overwrite=overwrite, cancel=cancel
        )
        checkpoints.warn_about_merging(folder)
        return folder

    def push_to_hub(self, tinker_path: str, repo_id: str, **options: Any) -> str:
        """Download a checkpoint and push it to the Hugging Face hub; return the commit's URL.

        Blocks.  Needs ``pip install "tinkex[hub]"`` and a login (``hf auth login`` or
        ``HF_TOKEN``).

        Args:
            tinker_path: as for `download_checkpoint`.
            repo_id: ``"<user or organization>/<name>"``; created if it does not exist.
            private: whether a newly created repository is private; True by default.
            revision: the branch to push to; created if it does not exist.
            commit_message: the message of the commit.
            create_pr: open a pull request instead of pushing.
            allow_patterns, ignore_patterns: which files to push; all of them by default.
            add_model_card: add a README.md that names the base model and the checkpoint, unless
                there is one; True by default.
            progress, cancel: as for `download_checkpoint`; an upload cannot be cancelled.
            hub: used in place of ``huggingface_hub.HfApi()``.

        Raises:
            ConfigError: huggingface_hub is not installed.
            Also everything that `download_checkpoint` and huggingface_hub raise.
        """
        self._ensure_open("push_to_hub")
        return hub.push_to_hub(self.transport, tinker_path, repo_id, **options)

    # Moved to AdminClient

    def get_audit_log(
        self, event_type: str = "all", day: Optional[date] = None
    ) -> APIFuture[AuditLogResponse]:
        """Deprecated; use the same method of AdminClient."""
        return self._admin("get_audit_log").get_audit_log(event_type, day)

    def get_billing_usage(
        self, starting_on: Instant, ending_before: Instant
    ) -> APIFuture[BillingUsageResponse]:
        """Deprecated; use the same method of AdminClient."""
        return self._admin("get_billing_usage").get_billing_usage(starting_on, ending_before)

    def get_current_checkpoint_storage_usage(
        self, project_id: Optional[str] = None
    ) -> APIFuture[CurrentCheckpointStorageUsageResponse]:
        """Deprecated; use the same method of AdminClient."""
        return self._admin(
            "get_current_checkpoint_storage_usage"
        ).get_current_checkpoint_storage_usage(project_id)

    def _admin(self, name: str) -> AdminClient:
        warnings.warn(
            f"RestClient.{name} has moved: use AdminClient().{name}",
            DeprecationWarning,
            stacklevel=3,
        )
        return AdminClient(self._runtime)

    # Awaitable variants, under the official SDK's names.
    get_server_capabilities_async = result_of(get_server_capabilities)
    list_training_runs_async = result_of(list_training_runs)
    get_training_run_async = result_of(get_training_run)
    get_training_run_by_tinker_path_async = result_of(get_training_run_by_tinker_path)
    list_checkpoints_async = result_of(list_checkpoints)
    list_user_checkpoints_async = result_of(list_user_checkpoints)
    get_weights_info_by_tinker_path_async = result_of(get_weights_info_by_tinker_path)
    delete_checkpoint_async = result_of(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = result_of(delete_checkpoint_from_tinker_path)
    publish_checkpoint_from_tinker_path_async = result_of(publish_checkpoint_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = result_of(unpublish_checkpoint_from_tinker_path)
    set_checkpoint_ttl_from_tinker_path_async = result_of(set_checkpoint_ttl_from_tinker_path)
    list_sessions_async = result_of(list_sessions)
    get_session_async = result_of(get_session)
    get_sampler_async = result_of(get_sampler)
    get_external_weights_urls_async = result_of(get_external_weights_urls)
    get_checkpoint_archive_url_async = result_of(get_checkpoint_archive_url)
    get_checkpoint_archive_url_from_tinker_path_async = result_of(
        get_checkpoint_archive_url_from_tinker_path
    )
    copy_weights_async = result_of(copy_weights)
    assign_session_project_async = result_of(assign_session_project)
    export_session_trace_async = result_of(export_session_trace)
    get_audit_log_async = result_of(get_audit_log)
    get_billing_usage_async = result_of(get_billing_usage)
    get_current_checkpoint_storage_usage_async = result_of(get_current_checkpoint_storage_usage)


def copy_weights(transport: Transport, **fields: Any) -> str:
    """Copy a checkpoint into a project; return the path of the copy.  Blocks."""
    return api.copy_weights(transport, **fields).tinker_path


def export_session_trace(transport: Transport, session_id: str) -> str:
    """Wait until the server has exported a session's trace; return a signed URL of it."""
    while True:
        state = api.get_trace_export(transport, session_id)
        if state.status == "ready" and state.url:
            return state.url
        if state.status != "pending":
            reason = state.error or f"its status is {state.status!r}"
            raise RequestFailedError(
                f"the trace of session {session_id} was not exported: {reason}",
                session_id=session_id,
            )
        if transport.closing.wait(TRACE_POLL_S):
            raise ClientClosedError(
                f"the client was closed before the trace of session {session_id} was ready"
            )


def _page(limit: int, offset: int) -> Tuple[int, int]:
    """Return both as ints; raise InvalidInputError if either is out of range."""
    size, start = to_int(limit, text=False), to_int(offset, text=False)
    if is_int(size, 1) and is_int(start, 0):
        return size, start
    raise InvalidInputError(
        f"limit is {limit!r} and offset {offset!r}; limit must be an integer, 1 or more, "
        "and offset an integer, 0 or more"
    )


def _check_search(request: SessionSearchRequest) -> None:
    if not isinstance(request, SessionSearchRequest):
        raise InvalidInputError(f"{request!r:.100} is not a SessionSearchRequest")
    as_int("limit", request.limit, 1, most=200)
    if request.display_name == "":
        raise InvalidInputError("display_name is empty; None finds every name")
    owner = request.owner
    if isinstance(owner, SessionsOfUsers) and not 1 <= len(owner.owner_urns) <= 10:
        raise InvalidInputError(f"owner names {len(owner.owner_urns)} users; it must be 1 to 10")
    for value in (owner, *(request.statuses or ())):
        kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
        if not isinstance(kind, str):
            raise InvalidInputError(f"{value!r:.100} in the search has no type")
