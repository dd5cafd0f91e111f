"""BatchPoll: the repeated long poll for one sampler (docs/protocol.md, "Batch polling").

For one thread, the batch poller's ``tinkex-batch-i``.
"""

from __future__ import annotations

import logging
import time
from typing import Callable, List

from tinkex._api.futures import read_completions, retrieve_futures
from tinkex._results.backoff import Backoff
from tinkex._results.sampler_polls import NextPoll, Ready, SamplerPolls
from tinkex._transport.fast_connection import AnyChannel
from tinkex._transport.resources import ClientResources
from tinkex._transport.server_flags import ABSENT
from tinkex._transport.transport import Reply, Request, Transport
from tinkex.errors import APIConnectionError, APIStatusError, TinkexError

logger = logging.getLogger(__name__)

ROUTE = "POST retrieve_futures"
_POLL = Request("POST", "/api/v1/retrieve_futures")

#: With nothing in flight, results are acknowledged after this long, if no poll did it before.
ACKNOWLEDGE_AFTER_S = 1.0
#: A poll that only acknowledges may take this long.
ACKNOWLEDGE_TIMEOUT_S = 5.0
#: No server holds a poll this long (about 30 s are usual); the next one asks for the same.
READ_TIMEOUT_S = 60.0


class BatchPoll:
    """Polls for the samples of one sampler, and passes on what is done.

    Args:
        resources: everything goes through its transport, whose ``closing`` event ends every wait.
        polls: the samples.
        channel: the connection to poll on.
        fetch: has results fetched; returns the seconds for which no more would be of use.
        fail: settles a future with an error.
    """

    def __init__(
        self,
        resources: ClientResources,
        polls: SamplerPolls,
        channel: AnyChannel,
        fetch: Callable[[List[Ready]], float],
        fail: Callable[..., None],
    ) -> None:
        self._transport = resources.transport
        self._config = self._transport.config
        self._server = self._transport.server
        self._polls = polls
        self._channel = channel
        self._fetch = fetch
        self._fail = fail
        self._backoff = Backoff(resources, _POLL)

    def run(self) -> None:
        """Poll until nothing is waited for and the server knows what was fetched.

        Raises:
            TinkexError: what ends the polling before that; samples may still be waited for.
        """
        while not self._transport.closing.is_set():
            poll = self._polls.next_poll()
            if poll.waiting:
                for future, error in self._polls.overdue():
                    self._fail(future, error)
                pause_s = self._send(poll)
                if pause_s > 0:
                    self._channel.stopped.wait(pause_s)
            elif (
                not self._polls.wait_for_samples(ACKNOWLEDGE_AFTER_S)
                and self._acknowledge_or_stop()
            ):
                return

    def _send(self, poll: NextPoll) -> float:
        """Poll once; return the pause before the next poll, or raise what ends the polling."""
        polls, began = self._polls, time.monotonic()
        limit_s = min(self._config.poll_timeout_s, READ_TIMEOUT_S, polls.read_timeout_s())
        try:
            reply = send_poll(self._transport, polls, poll, self._channel, max(0.05, limit_s))
        except APIConnectionError as silence:
            return self._backoff.after_failure(silence, began)
        except APIStatusError as refused:  # the server issues no token at present
            return self._backoff.after_failure(refused, began, {})
        polls.last_contact = now = time.monotonic()
        if reply.status >= 300:
            if reply.status == 408:
                return self._backoff.after_pending(now - began)
            error = self._transport.status_error(_POLL, reply)
            if error.status in ABSENT:
                self._server.note_missing(ROUTE, error.status or 404)
            return self._backoff.after_failure(error, began, {})
        completions = read_completions(reply)
        self._server.note_present(ROUTE)
        pause_s = self._fetch(polls.note_completions(poll, completions))
        if completions.sizes:
            self._backoff.after_news()
            return pause_s
        return max(pause_s, self._backoff.after_pending(now - began))

    def _acknowledge_or_stop(self) -> bool:
        """Acknowledge what was fetched; True if there was nothing left to do and polling stops."""
        polls = self._polls
        poll = polls.unacknowledged()
        if poll is None:
            return polls.stop()
        try:
            reply = send_poll(self._transport, polls, poll, self._channel, ACKNOWLEDGE_TIMEOUT_S)
            if reply.status < 300:
                self._fetch(polls.note_completions(poll, read_completions(reply)))
                return False
            trouble = self._transport.status_error(_POLL, reply).message
        except TinkexError as error:
            trouble = error.message
        logger.debug("could not acknowledge results: %s", trouble)
        return polls.stop(acknowledge=False)  # the next poll does it, or the server drops them


def send_poll(
    transport: Transport,
    polls: SamplerPolls,
    poll: NextPoll,
    channel: AnyChannel,
    read_timeout_s: float,
) -> Reply:
    """Send *poll* once.  It is not held if nothing is waited for."""
    return retrieve_futures(
        transport,
        sampling_session_id=polls.sampler_id.sampling_session_id,
        clone=polls.sampler_id.clone,
        cursor=poll.cursor,
        retrieved=poll.retrieved,
        immediate=not poll.waiting,
        read_timeout_s=read_timeout_s,
        channel=channel,
    )
