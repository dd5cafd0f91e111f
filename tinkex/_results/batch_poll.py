"""BatchPoll: the repeated long poll for one sampler (docs/protocol.md, "Batch polling").

For one thread, the batch poller's ``tinkex-batch-i``.
"""

from __future__ import annotations

import logging
import time
from typing import Callable, List

from tinkex._api.futures import read_completions, retrieve_futures
from tinkex._results.backoff import Backoff
from tinkex._results.completion_tracker import NextPoll
from tinkex._results.sampler_polls import Ready, SamplerPolls
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.server_flags import ABSENT
from tinkex._transport.transport import Reply, Request, Transport
from tinkex.errors import APIConnectionError, APIStatusError, TinkexError

logger = logging.getLogger(__name__)

ROUTE = "POST retrieve_futures"
_POLL = Request("POST", "/api/v1/retrieve_futures")

#: With nothing in flight, what was fetched is reported after this long, if no poll did it before.
REPORT_AFTER_S = 1.0
#: A poll that only reports may take so long.
REPORT_TIMEOUT_S = 5.0
#: No server holds a poll for so long (about 30 s are usual); the next one asks for the same.
READ_TIMEOUT_S = 60.0


class BatchPoll:
    """Polls for the samples of *watch*, and hands on what is done.

    Args:
        transport: everything goes through it; its ``closing`` event ends every wait.
        channel: what it is asked on.
        fetch: is given what is to be fetched, and tells how long the next news are not needed, in
            seconds.
        fail: settles a future with an error.
    """

    def __init__(
        self,
        transport: Transport,
        watch: SamplerPolls,
        channel: AnyChannel,
        fetch: Callable[[List[Ready]], float],
        fail: Callable[..., None],
    ) -> None:
        self._transport = transport
        self._config = transport.config
        self._server = transport.server
        self._watch = watch
        self._channel = channel
        self._fetch = fetch
        self._fail = fail
        self._backoff = Backoff(transport, _POLL)

    def run(self) -> None:
        """Poll until nothing is waited for and the server knows what was fetched.

        Raises:
            TinkexError: what ends the polling before that; what is waited for still is.
        """
        while not self._transport.closing.is_set():
            asked = self._watch.next_poll()
            if asked.waiting:
                for future, error in self._watch.overdue():
                    self._fail(future, error)
                pause_s = self._poll(asked)
                if pause_s > 0:
                    self._channel.stopped.wait(pause_s)
            elif not self._watch.rest(REPORT_AFTER_S) and self._report_or_stop():
                return

    def _poll(self, asked: NextPoll) -> float:
        """Poll once; return the pause before the next poll, or raise what ends the polling."""
        watch, began = self._watch, time.monotonic()
        limit_s = min(self._config.poll_timeout_s, READ_TIMEOUT_S, watch.read_timeout_s())
        try:
            reply = ask(self._transport, watch, asked, self._channel, max(0.05, limit_s))
        except APIConnectionError as silence:
            return self._backoff.after_failure(silence, began)
        except APIStatusError as refused:  # the server gives no token just now
            return self._backoff.after_failure(refused, began, {})
        watch.last_contact = now = time.monotonic()
        if reply.status >= 300:
            if reply.status == 408:
                return self._backoff.after_pending(now - began)
            error = self._transport.status_error(_POLL, reply)
            if error.status in ABSENT:
                self._server.note_missing(ROUTE, error.status or 404)
            return self._backoff.after_failure(error, began, {})
        done = read_completions(reply)
        self._server.note_present(ROUTE)
        pause_s = self._fetch(watch.told(asked, done))
        if done.sizes:
            self._backoff.after_news()
            return pause_s
        return max(pause_s, self._backoff.after_pending(now - began))

    def _report_or_stop(self) -> bool:
        """Say what was fetched, if that was not said; True if there is nothing to do any more."""
        watch = self._watch
        asked = watch.unreported()
        if asked is None:
            return watch.stop()
        try:
            reply = ask(self._transport, watch, asked, self._channel, REPORT_TIMEOUT_S)
            if reply.status < 300:
                self._fetch(watch.told(asked, read_completions(reply)))
                return False
            trouble = self._transport.status_error(_POLL, reply).message
        except TinkexError as error:
            trouble = error.message
        logger.debug("what was fetched could not be reported: %s", trouble)
        return watch.stop(unreported=True)  # the next poll tells, or the server drops it in time


def ask(
    transport: Transport,
    watch: SamplerPolls,
    asked: NextPoll,
    channel: AnyChannel,
    read_timeout_s: float,
) -> Reply:
    """Poll for *watch* once; without waiting, if there is nothing to wait for."""
    return retrieve_futures(
        transport,
        sampling_session_id=watch.sampler_id.sampling_session_id,
        clone=watch.sampler_id.clone,
        cursor=asked.cursor,
        retrieved=asked.retrieved,
        at_once=not asked.waiting,
        read_timeout_s=read_timeout_s,
        channel=channel,
    )
