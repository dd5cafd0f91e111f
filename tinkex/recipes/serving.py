"""Reaches the server of a run folder, and the newest weights that the run has there."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Optional, Tuple, Union

from tinkex.clients.service import ServiceClient
from tinkex.errors import RunFolderError
from tinkex.runs import RunRecord, read_run
from tinkex.runs.run import save_for_sampler

logger = logging.getLogger(__name__)

#: What a run's config has as ``server`` for an embedded server with its data in the run folder.
EMBEDDED = "embedded"

#: How long weights are kept that are saved only to be sampled now, in seconds.
_TTL_S = 86400


def open_service(
    folder: Union[str, os.PathLike[str]], base_url: Optional[str] = None, **settings: Any
) -> Tuple[ServiceClient, RunRecord]:
    """Open a session on the server that the run in *folder* was trained on.  Blocks.

    That is the one which ``config["server"]`` of the run names.  Without it, it is an embedded
    server if its data are in the run folder, and otherwise the one of the environment.

    Args:
        folder: a run folder.
        base_url: of another server that has the run's checkpoints; by default it is found.
        settings: of the client, as for `ServiceClient`; for an embedded server, also those of
            `ServiceClient.local`.

    Returns:
        The client, which the caller closes, and what the run's journal says.

    Raises:
        RunFolderError: there is no run in *folder*.
        TinkexError: the server cannot be started or reached.
    """
    record = read_run(os.fspath(folder))
    if not record.spec:
        raise RunFolderError(f"the run in {os.fspath(folder)} has not begun yet")
    server = base_url or server_of(folder, record)
    if server == EMBEDDED:
        model, data_dir = record.spec["base_model"], str(server_folder(folder))
        return ServiceClient.local(model, data_dir=data_dir, **settings), record
    return ServiceClient(base_url=server, **settings), record


def server_of(
    folder: Union[str, os.PathLike[str]], record: Optional[RunRecord] = None
) -> Optional[str]:
    """Return the base URL of the server that the run in *folder* was trained on.

    `EMBEDDED` is an embedded server with its data in the folder; None if the run names none.

    Args:
        record: what the journal says; by default it is read.

    Raises:
        RunFolderError: the journal cannot be read.
    """
    record = record or read_run(os.fspath(folder))
    server: Optional[str] = record.config.get("server")
    return EMBEDDED if server is None and server_folder(folder).is_dir() else server


def server_folder(folder: Union[str, os.PathLike[str]]) -> Path:
    """Return the folder for the data of a run's own embedded server."""
    return Path(folder) / "server"


def find_sampler(service: ServiceClient, record: RunRecord) -> str:
    """Return the ``tinker://`` path of the newest weights of a run that can be sampled.  Blocks.

    A run that was not finished has saved only checkpoints to train on; then the newest one is
    loaded and saved for sampling, for a day.

    Raises:
        RunFolderError: nothing was saved yet.
        TinkexError: the server does not have it any more, or has failed.
    """
    newest = record.newest_weights()
    if newest is record.sampler:
        return newest.path
    logger.info("loading the checkpoint of %d steps", newest.steps)
    trainer = service.create_training_client_from_state(newest.path, record.spec["base_model"])
    try:
        return save_for_sampler(trainer, f"sampler-{newest.steps}", _TTL_S)
    finally:
        trainer.close()
