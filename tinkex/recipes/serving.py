"""Opens the server of a run folder, and finds the run's newest weights there."""

from __future__ import annotations

import logging
import os
from typing import Any, Optional, Tuple, Union

from tinkex.clients.service import ServiceClient
from tinkex.errors import LocalServerError, RunFolderError
from tinkex.runs import RunRecord, read_run
from tinkex.runs.journal import WRITABLE
from tinkex.runs.records import EMBEDDED, server_folder
from tinkex.runs.saver import save_for_sampler

logger = logging.getLogger(__name__)

#: Time to live of weights that are saved only to be sampled now, in seconds.
_TTL_S = 86400


def open_service(
    folder: Union[str, os.PathLike[str]], base_url: Optional[str] = None, **settings: Any
) -> Tuple[ServiceClient, RunRecord]:
    """Open a session on the server that the run in *folder* was trained on.  Blocks.

    That server is ``read_run(folder).server``: an embedded server if its data are in the run
    folder, otherwise the server named by ``config["server"]`` of the run, or by its journal.

    Args:
        folder: a run folder.
        base_url: URL of another server that has the run's checkpoints.
        settings: settings of the client, as for `ServiceClient`; for an embedded server, also those
            of `ServiceClient.local`.

    Returns:
        The client, which the caller closes, and the record of the run.

    Raises:
        RunFolderError: there is no run in *folder*; or its server is an embedded one, whose data
            are in use or gone.
        TinkexError: the server cannot be started or reached.
    """
    record = read_run(os.fspath(folder))
    if not record.spec:
        raise RunFolderError(f"the run in {os.fspath(folder)} has not begun yet")
    server = record.server
    if base_url is not None or server is None:
        return ServiceClient(base_url=base_url, **settings), record
    if server.base_url is not None:
        return ServiceClient(base_url=server.base_url, **settings), record
    if server.data_dir is None or not os.path.isdir(server.data_dir):
        reason = (
            "was started without a data_dir, so its data was removed when it stopped"
            if server.data_dir is None
            else f"kept its data in {server.data_dir}, which is gone"
        )
        raise RunFolderError(
            f"the weights of the run in {os.fspath(folder)} are not available: it was trained on "
            f"an embedded server that {reason}",
            hint="Train it again, with ServiceClient.local(model, data_dir=...).",
        )
    own = server.data_dir == os.path.abspath(server_folder(folder))
    # None stands for the run's own data folder, so that errors name the run folder instead.
    data_dir, model = None if own else server.data_dir, server.model or record.spec["base_model"]
    return start_server(folder, model, data_dir=data_dir, **settings), record


def start_server(
    folder: Union[str, os.PathLike[str]],
    model: str,
    *,
    data_dir: Optional[str] = None,
    **settings: Any,
) -> ServiceClient:
    """Start the embedded server of the run in *folder*, with its data in `server_folder`.  Blocks.

    Args:
        data_dir: another folder for the data.
        model, settings: as for `ServiceClient.local`.

    Raises:
        RunFolderError: the run is in use, or its folder cannot be written.
        LocalServerError: the server cannot be started; the error names *data_dir* if it is in use.
    """
    if data_dir is not None:  # other runs may share it, so errors should name it
        return ServiceClient.local(model, data_dir=data_dir, **settings)
    data = server_folder(folder)
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        return ServiceClient.local(model, data_dir=str(data), **settings)
    except LocalServerError as error:
        if error.data_dir is None:
            raise
        # Another server holds the lock of the data folder.
        if isinstance(error.__cause__, BlockingIOError):
            raise RunFolderError(
                f"the run folder {os.fspath(folder)} is in use: its embedded server is running",
                hint="Wait until the `tinkex train`, `chat`, `sample` or `export` that uses it has "
                "ended, or stop it; a client in a notebook is closed by service.close().",
            ) from error
        raise _unusable(folder, error.__cause__) from error


def _unusable(
    folder: Union[str, os.PathLike[str]], cause: Optional[BaseException]
) -> RunFolderError:
    reason = getattr(cause, "strerror", None) or cause
    return RunFolderError(f"cannot use the run folder {os.fspath(folder)}: {reason}", hint=WRITABLE)


def server_of(
    folder: Union[str, os.PathLike[str]], record: Optional[RunRecord] = None
) -> Optional[str]:
    """Return the base URL of the server that the run in *folder* was trained on.

    Returns `EMBEDDED` for an embedded server, and None if the run does not name a server.

    Args:
        record: the result of `read_run`, if the caller has it; by default the journal is read.

    Raises:
        RunFolderError: the journal cannot be read.
    """
    server = (record or read_run(os.fspath(folder))).server
    return None if server is None else server.base_url or EMBEDDED


def find_sampler(service: ServiceClient, record: RunRecord) -> str:
    """Return the ``tinker://`` path of a run's newest weights, saved for sampling.  Blocks.

    If the newest weights are a checkpoint for training, as in an unfinished run, load that
    checkpoint and save it for sampling, for a day.

    Raises:
        RunFolderError: nothing was saved yet.
        TinkexError: the server no longer has the checkpoint, or a request failed.
    """
    newest = record.newest_weights()
    if newest is record.sampler:
        return newest.path
    logger.info("loading the checkpoint of %d steps", newest.steps)
    # Without the optimizer's state, which sampling does not need.
    trainer = service.create_training_client_from_state(newest.path, record.spec["base_model"])
    try:
        return save_for_sampler(trainer, f"sampler-{newest.steps}", _TTL_S)
    finally:
        trainer.close()
