"""Downloader: fetches signed URLs into files, and resumes interrupted downloads.

This module knows no endpoints, and never sends a credential: a signed URL needs none, and its host
must not see one.  Signatures are secrets, too, so no error or log line contains a URL.

Thread: while a Downloader is open, ``tinkex-download`` checks whether the caller has cancelled.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import re
import threading
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple
from urllib.parse import urlsplit

import requests
import urllib3.exceptions

from tinkex._downloads.part_file import Note, Part, Source, sha256_of
from tinkex._runtime.base_url import proxy_for
from tinkex._runtime.clock import SYSTEM_CLOCK, Clock
from tinkex._transport import request_log
from tinkex._transport.channel import Channel
from tinkex._transport.request import MAX_HOPS, next_hop, same_origin
from tinkex._transport.request_errors import root_cause
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    ClientClosedError,
    DownloadCancelledError,
    InvalidInputError,
    ResponseDecodeError,
    status_error_type,
)
from tinkex.retry import RetryPolicy, RetryState, retry_after_s

logger = logging.getLogger(__name__)

#: A file fails when this many of its URLs in a row are refused, without a byte in between.
MAX_REFUSALS = 3

#: Statuses with which a host refuses a URL, perhaps because its signature has expired.
_REFUSALS = (401, 403, 404, 410)

_CHUNK = 1 << 16  # a read returns only once it is full, so a larger one would delay the progress
_CHECK_EVERY_S = 0.1

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")

#: Called with the number of a file's bytes that have arrived, and its size, or None if unknown.
Report = Callable[[int, Optional[int]], None]

#: Returns the location of a file; called with True if a new signature is needed.
Sign = Callable[[bool], Source]


class _StartOver(Exception):
    """The bytes fetched so far do not belong to the host's current version of the file."""


class Downloader:
    """Fetches files, one after the other.  Used by one thread, as a context manager; blocks.

    Args:
        config: time limits, proxy and CA bundle; its credential is not used.
        closing: set when the client closes; all methods then raise ClientClosedError.
        cancel: set by the caller to stop; all methods then raise DownloadCancelledError.
    """

    def __init__(
        self,
        config: Config,
        *,
        closing: threading.Event,
        cancel: Optional[threading.Event] = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._config = config
        self._closing = closing
        self._cancel = cancel
        self._clock = clock
        # Set by the watcher thread when there is a reason to stop.
        self._stop = threading.Event()
        # Set when the download is over; the watcher thread then ends.
        self._done = threading.Event()
        # Guards _channels.
        self._lock = threading.Lock()
        self._channels: List[Channel] = []
        self._by_proxy: Dict[Optional[str], Channel] = {}

    def __enter__(self) -> Downloader:
        threading.Thread(target=self._watch, name="tinkex-download", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        # Except adopted channels, which their owners close.
        for channel in self._by_proxy.values():
            channel.close()

    def adopt(self, channel: Channel) -> Channel:
        """Have *channel* aborted, too, when the download must stop; return it."""
        with self._lock:
            self._channels.append(channel)
        # The watcher may have aborted the other channels just before this one was added.
        if self._stop.is_set():
            channel.abort()
        return channel

    def check(self) -> None:
        """Raise if the download must stop."""
        if self._cancel is not None and self._cancel.is_set():
            raise DownloadCancelledError("the download was cancelled")
        if self._closing.is_set():
            raise ClientClosedError("the client was closed during the download")

    def pause(self, seconds: float) -> None:
        """Sleep, but raise as soon as the download must stop."""
        self.check()
        # A thread can wait for only one event, so the watcher sets this one for both causes.
        self._stop.wait(seconds)
        self.check()

    def fetch(self, part: Part, sign: Sign, report: Report) -> int:
        """Download the file of *part*; return its size.

        Bytes fetched earlier are kept if they belong to the same version of the file.  Failures are
        retried until ``max_outage_s`` seconds have passed without a byte; an expired or refused URL
        is signed again.

        Args:
            part: the file; its folder must exist.
            sign: returns the location of the file; may raise.
            report: called after each piece; may raise to stop the download.

        Raises:
            APIError: the download failed.
            DownloadCancelledError, ClientClosedError: see the constructor; the fetched bytes stay,
                and a later call resumes from there.
        """
        source: Optional[Source] = None
        signed = False
        reached, refusals, starts = part.size, 0, 0
        retries, began = self._new_retries()
        while True:
            self.check()
            if source is None or source.is_stale(self._clock.wall()):
                # True from the second time on: the last URL was refused or is stale, so a cached
                # URL is useless.
                source = sign(signed)
                signed = True
            try:
                return self._attempt(part, source, report)
            except _StartOver:
                starts += 1
                if starts >= MAX_REFUSALS:
                    raise ResponseDecodeError(
                        f"{part.name} changes during the download, or its host sends wrong ranges"
                    ) from None
                part.discard()
            except APIError as error:
                self.check()
                # Some hosts cut every connection after a while.  As long as bytes arrive, that is
                # no outage, so this failure counts as the first.
                if part.size > reached:
                    reached, refusals = part.size, 0
                    retries, began = self._new_retries()
                if error.status in _REFUSALS:
                    refusals += 1
                    if refusals >= MAX_REFUSALS:
                        raise
                    logger.info("%s; asking for a new URL", error.message)
                    source = None
                    continue
                now = self._clock.monotonic()
                delay_s = retries.decide(error, now, random.random()).delay_s
                if delay_s is None:
                    error.attempts, error.elapsed_s = retries.attempts, now - began
                    raise
                message = "%s; %d bytes have arrived, next attempt in %.1f s"
                logger.info(message, error.message, part.size, delay_s)
                self.pause(delay_s)

    def _new_retries(self) -> Tuple[RetryState, float]:
        """Return a new retry state that begins now, and the time now."""
        began = self._clock.monotonic()
        return RetryState(RetryPolicy(max_elapsed_s=self._config.max_outage_s), began), began

    def _attempt(self, part: Part, source: Source, report: Report) -> int:
        note = Note.load(part.note)
        # Without a validator, nothing shows that the bytes belong to the host's current version.
        offset = part.size if note.validator else 0
        # No compression: ranges count the bytes as sent, which would then not be the file's bytes.
        headers = {"Accept-Encoding": "identity", "Accept": "*/*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            headers["If-Range"] = note.validator or ""
        url = source.url
        if urlsplit(url).scheme not in ("http", "https"):
            raise ResponseDecodeError(
                f"the server gave a URL of the scheme {urlsplit(url).scheme!r} for {part.name}",
                hint="Only http and https can be downloaded from.",
            )
        try:
            for _ in range(MAX_HOPS + 1):
                limits = (self._config.connect_timeout_s, self._config.read_timeout_s)
                channel = self._channel_for(url)
                began = self._clock.monotonic()
                with channel.stream(url, headers=headers, timeout=limits) as response:
                    took_s = self._clock.monotonic() - began
                    request_log.log_stream("GET", url, response.status_code, 0, took_s)
                    location = response.headers.get("Location")
                    target = next_hop("GET", url, response.status_code, location)
                    if target is not None:
                        url = target
                        continue
                    return self._take(part, note, offset, response, report)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            self.check()  # aborting the channel causes such errors, too
            # Not "from error": its text contains the URL with its signature.
            what = (
                f"the download of {part.name} from {_host(url)} was interrupted: "
                f"{root_cause(error)}"
            )
            retryable = not isinstance(error, requests.exceptions.SSLError)
            raise APIConnectionError(what, retryable=retryable) from None
        raise ResponseDecodeError(f"{part.name}: {_host(source.url)} redirects too often")

    def _take(
        self, part: Part, note: Note, offset: int, response: requests.Response, report: Report
    ) -> int:
        status = response.status_code
        # The range is empty, because all bytes had arrived when the connection broke.
        if status == 416 and offset and _total_of_range(response.headers) == offset:
            return self._finish(part, note, offset)
        if status == 416 and offset:
            raise _StartOver
        if status == 206 and offset:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            total = _total_of_range(response.headers)
            # Bytes of another range would silently damage the file.
            if found is None or found[1] is None or int(found[1]) != offset:
                raise _StartOver
            if total is not None and note.total is not None and total != note.total:
                raise _StartOver
            note.total = note.total if total is None else total
        elif status == 200:  # the whole file: a new version (If-Range), or ranges not supported
            offset = 0
            length = response.headers.get("Content-Length", "")
            note = Note.of(response.headers, int(length) if length.isdigit() else None)
        else:
            raise self._failure(part.name, response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ResponseDecodeError(f"{part.name} was sent compressed, which was not requested")
        # The note is saved first: without one, bytes are never resumed from.
        note.save(part.note)
        return self._finish(part, note, self._copy(part.file, offset, note.total, response, report))

    def _copy(
        self,
        file: Path,
        offset: int,
        total: Optional[int],
        response: requests.Response,
        report: Report,
    ) -> int:
        with open(file, "r+b" if offset else "wb") as out:
            out.seek(offset)
            report(offset, total)
            for piece in response.raw.stream(_CHUNK, decode_content=False):
                out.write(piece)
                offset += len(piece)
                report(offset, total)
                self.check()
            self.check()  # an aborted connection can look like the end of the file
            out.flush()
            # Synced before the file gets its final name: a power failure must not leave the name
            # without the bytes.
            os.fsync(out.fileno())
        return offset

    def _finish(self, part: Part, note: Note, size: int) -> int:
        """Check the complete file; return its size."""
        if note.total is not None and size < note.total:  # urllib3 before 2 does not check this
            raise APIConnectionError(f"{part.name} ended after {size} of {note.total} bytes")
        if note.total is not None and size > note.total:
            raise _StartOver
        if note.digest is not None and sha256_of(part.file, self.check) != note.digest:
            # Otherwise every later attempt would resume from the damaged bytes.
            part.discard()
            raise ResponseDecodeError(
                f"{part.name}: the SHA-256 of its {size} bytes is not the one that was announced",
                hint="It was damaged in transit and has been deleted: download it again.",
            )
        return size

    def _failure(self, name: str, response: requests.Response) -> APIError:
        status = response.status_code
        headers = {key.lower(): value for key, value in response.headers.items()}
        return status_error_type(status)(
            f"{_host(response.url)} responded {status} to the download of {name}",
            status=status,
            retry_after_s=retry_after_s(headers, self._clock.wall()),
            retryable=status in (408, 429) or (status >= 500 and status != 501),
        )

    def _channel_for(self, url: str) -> Channel:
        """Return the channel to the host of *url*, through the right proxy."""
        # The proxy setting is for the server's own URL; other hosts of signed URLs may need another
        # proxy, which the environment names.
        own = same_origin(url, self._config.base_url)
        proxy = self._config.proxy if own else proxy_for(url)
        if proxy not in self._by_proxy:
            config = dataclasses.replace(self._config, proxy=proxy)
            self._by_proxy[proxy] = self.adopt(Channel(config, pool_size=1))
        return self._by_proxy[proxy]

    def _watch(self) -> None:
        """Abort all requests as soon as the download is cancelled or the client is closed."""
        # In a separate thread, because a thread that reads from a socket cannot check anything.
        while not self._done.wait(_CHECK_EVERY_S):
            if self._closing.is_set() or (self._cancel is not None and self._cancel.is_set()):
                self._stop.set()
                with self._lock:
                    channels = list(self._channels)
                # Without the lock, which `adopt` needs in the downloading thread.
                for channel in channels:
                    channel.abort()
                return


def fetch_file(
    downloader: Downloader, name: str, target: Path, sign: Sign, report: Report, *, overwrite: bool
) -> int:
    """Download one file to *target*, which appears only when it is complete; return its size.

    An interrupted download leaves what it has fetched in a hidden file beside *target*.

    Raises:
        InvalidInputError: *target* exists, and *overwrite* is false.
        Also everything that `Downloader.fetch` raises.
    """
    if target.exists() and not overwrite:
        raise InvalidInputError(f"{target} exists already", hint="Choose another name.")
    hidden = target.with_name(f".{target.name}.part")
    part = Part(name, hidden, hidden.with_name(f"{hidden.name}.json"))
    target.parent.mkdir(parents=True, exist_ok=True)
    size = downloader.fetch(part, sign, report)
    os.replace(part.file, target)
    # The file has its final name; this deletes the note.
    part.discard()
    return size


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the host"


def _total_of_range(headers: Mapping[str, str]) -> Optional[int]:
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    return int(found[3]) if found is not None and found[3].isdigit() else None
