"""Downloads the files of checkpoints.

A server offers either an archive of a checkpoint, or a signed URL for each file of exported
weights.  Either way, the files are collected in a hidden folder and checked; nothing else at the
destination is touched until all files have arrived.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from threading import Event
from typing import Callable, Optional, TypeVar, Union

from tinkex._api import archives, rest as api
from tinkex._downloads.download_folder import DownloadFolder, check_free
from tinkex._downloads.downloads import Downloader, Report
from tinkex._downloads.extraction import extract
from tinkex._downloads.part_file import Source
from tinkex._runtime.numeric import as_flag
from tinkex._transport.transport import Transport
from tinkex.errors import (
    DownloadCancelledError,
    InvalidInputError,
    ResponseDecodeError,
    RouteMissingError,
    TinkexError,
)
from tinkex.futures import APIFuture
from tinkex.types import ExternalWeightsUrlsResponse, ParsedCheckpointTinkerPath
from tinkex.types.checkpoint_path import locate_checkpoint

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Called with the number of bytes that have arrived, and the total, or None if it is unknown.
Progress = Callable[[int, Optional[int]], None]

#: The embedded server puts this file into checkpoints that PEFT alone must not merge.
MERGING_NOTE = "MERGING.md"

#: The server deletes a temporary export after this many seconds, if this process does not.
EXPORT_TTL_S = 3600


def fetch_checkpoint(
    transport: Transport,
    tinker_path: str,
    dest: Union[str, Path],
    *,
    progress: Optional[Progress] = None,
    overwrite: bool = False,
    cancel: Optional[Event] = None,
) -> Path:
    """Download the files of a checkpoint; see `RestClient.download_checkpoint`."""
    parsed = locate_checkpoint(tinker_path)
    if not isinstance(dest, (str, os.PathLike)):
        raise InvalidInputError(f"dest is of type {type(dest).__name__}; it must be a path")
    overwrite = as_flag("overwrite", overwrite)
    target = Path(os.path.abspath(os.path.expanduser(os.fspath(dest))))
    # Checked before any request: the server may take minutes to build an archive (docs/protocol.md,
    # "Archives").
    check_free(target, overwrite)
    config = transport.config
    work = DownloadFolder(target, {"server": config.base_url, "tinker_path": parsed.tinker_path})
    try:
        with Downloader(config, closing=transport.closing, cancel=cancel) as downloader:
            _Download(transport, parsed, work, downloader, progress or _silent).run()
            work.check(tinker_path)
            # Checking the files takes time.  If the download was cancelled during the check, it
            # must not appear at *dest*.
            downloader.check()
    # Including Ctrl-C: the fetched data stays for the next call.
    except BaseException as error:
        if not work.drop_if_empty() and isinstance(error, DownloadCancelledError):
            error.hint = f"The fetched data is in {work.folder}; the same call resumes from there."
        raise
    work.finish()
    return target


def warn_about_merging(folder: Path) -> None:
    """Log a warning if *folder* holds a note that PEFT alone must not merge the adapter."""
    if (folder / MERGING_NOTE).is_file():
        logger.warning(
            "read %s before you merge this adapter into its base model", folder / MERGING_NOTE
        )


def _silent(done: int, total: Optional[int]) -> None:
    """Report no progress."""


class _Download:
    """One download: locates the files, and fetches them."""

    def __init__(
        self,
        transport: Transport,
        parsed: ParsedCheckpointTinkerPath,
        work: DownloadFolder,
        downloader: Downloader,
        progress: Progress,
    ) -> None:
        self._transport = transport
        self._parsed = parsed
        self._work = work
        self._downloader = downloader
        self._progress = progress

    def run(self) -> None:
        """Fetch all files, in whichever way the server offers."""
        if self._parsed.checkpoint_type == "external":
            self.fetch_files(self._parsed)
            return
        try:
            self.fetch_archive()
        except RouteMissingError as missing:
            if self._parsed.checkpoint_type == "sampler":
                missing.hint = (
                    "There is no other way to download a sampler checkpoint; save_state makes a "
                    "training checkpoint of the same weights, which the server may export."
                )
            if self._parsed.checkpoint_type != "training":
                raise
            # The hosted service has no archives, but it exports training checkpoints
            # (docs/protocol.md, "Archives").
            self.fetch_through_export(missing)

    def fetch_archive(self) -> None:
        """Fetch the archive and unpack it; raise RouteMissingError if the server makes none."""
        parsed, transport = self._parsed, self._transport
        # A separate channel, because cancelling aborts everything on it, and must not affect other
        # requests.
        channel = self._downloader.adopt(transport.open_channel())

        def sign(again: bool) -> Source:
            archive = archives.get_checkpoint_archive_url(
                transport,
                parsed.training_run_id,
                parsed.checkpoint_id,
                pause=self._downloader.pause,
                channel=channel,
            )
            return Source(archive.url, archive.expires)

        part = self._work.archive_part(parsed.tinker_path)
        try:
            self._downloader.fetch(part, sign, self._progress)
        finally:
            channel.close()
        logger.info("unpacking %s", parsed.tinker_path)
        shutil.rmtree(self._work.files, ignore_errors=True)  # left by a process that was killed
        try:
            extract(part.file, self._work.files, check=self._downloader.check)
        except ResponseDecodeError:
            part.discard()  # otherwise the next attempt would fail in the same way
            raise

    def fetch_files(self, parsed: ParsedCheckpointTinkerPath) -> None:
        """Fetch each file of exported weights."""
        urls = _Urls(self._transport, parsed)
        parts = [self._work.part(name) for name in urls.names]
        arrived = 0
        for part in parts:
            report = self._reporting(arrived, alone=len(parts) == 1)
            arrived += self._downloader.fetch(part, urls.signer(part.name), report)
        expected = {part.file for part in parts}
        for file in self._work.files.rglob("*"):  # left from an earlier export with other files
            if file.is_file() and file not in expected:
                file.unlink()

    def fetch_through_export(self, missing: RouteMissingError) -> None:
        """Export a training checkpoint, fetch the export, and delete it again."""
        # Imported here, because few downloads need a session.
        from tinkex._sessions.manager import default_manager
        from tinkex._sessions.runtime import Runtime
        from tinkex._training.create_run import FromCheckpoint, prepare_run
        from tinkex._training.requests import SaveExternal
        from tinkex._training.run import TrainingRun

        logger.info("exporting %s, since its server makes no archives", self._parsed.tinker_path)
        with Runtime(self._transport.config, default_manager()) as runtime:
            # The export holds only weights, so the optimizer's state need not be loaded.
            source = FromCheckpoint(self._parsed.tinker_path, optimizer=False)
            new_run = self._wait(runtime.run(source.kind, prepare_run(runtime, source)))
            run = TrainingRun(runtime, new_run.model_id, new_run.next_seq_id)
            # A new name each time, because an existing name is refused with 409 (docs/protocol.md,
            # "Saving weights").
            fields = {"path": f"download-{uuid.uuid4().hex[:12]}", "ttl_seconds": EXPORT_TTL_S}
            try:
                saved = self._wait(run.submit("save_weights_external", SaveExternal, fields))
            except RouteMissingError as also:
                raise missing from also
            try:
                self.fetch_files(locate_checkpoint(saved.path))
            finally:
                self._delete_export(saved.path)

    def _delete_export(self, path: str) -> None:
        """Delete a temporary export; otherwise the server deletes it after an hour."""
        parsed = locate_checkpoint(path)
        try:
            api.delete_checkpoint(self._transport, parsed.training_run_id, parsed.checkpoint_id)
        except TinkexError as error:
            logger.warning("the temporary export %s was not deleted: %s", path, error)

    def _wait(self, future: APIFuture[T]) -> T:
        """Wait for *future*; raise as soon as the download must stop."""
        while True:
            try:
                # In short waits, because cancelling the download does not settle the future.
                return future.result(0.2)
            except FutureTimeoutError:
                if future.done():  # settled just now, or the work itself failed with a timeout
                    return future.result()
                self._downloader.check()

    def _reporting(self, arrived: int, alone: bool) -> Report:
        """Return a function that reports a file's progress after *arrived* bytes of others."""
        # With several files the total is unknown, because the size of a file is not known before it
        # is fetched.

        def report(done: int, total: Optional[int]) -> None:
            self._progress(arrived + done, total if alone else None)

        return report


class _Urls:
    """The URLs of exported weights; requested again when a signature has expired."""

    def __init__(self, transport: Transport, parsed: ParsedCheckpointTinkerPath) -> None:
        self._transport = transport
        self._parsed = parsed
        self._latest = self._ask()
        self.names = sorted(self._latest.urls)
        if not self.names:
            raise ResponseDecodeError(f"{parsed.tinker_path} has no files")

    def _ask(self) -> ExternalWeightsUrlsResponse:
        return api.get_external_weights_urls(
            self._transport, self._parsed.training_run_id, self._parsed.checkpoint_id
        )

    def signer(self, name: str) -> Callable[[bool], Source]:
        """Return a function that returns the current location of the file *name*."""

        def source() -> Source:
            url = self._latest.urls.get(name)
            if not isinstance(url, str):  # the checkpoint was replaced during the download
                raise ResponseDecodeError(f"{self._parsed.tinker_path} no longer has {name!r}")
            return Source(url, self._latest.expires)

        def sign(again: bool) -> Source:
            if again or source().is_stale(self._transport.clock.wall()):
                # One response signs all files, so later files get new URLs, too.
                self._latest = self._ask()
            return source()

        return sign
