"""BatchPoller: one long poll waits for all samples of a sampler (protocol reference, section 2.8).

For servers that say so in their flags.  A sample that waits costs no thread: few threads submit,
one per sampler polls, and few fetch what is done.  How few depends on how long the server takes
to answer: one for each millisecond, so that a thousand requests can be made in a second.

Whatever goes wrong with the poll, nothing that waits is lost: samples go back to being polled one
by one, which also finds the right error for each, or fail together once the server has been silent
for ``max_outage_s``.

Threads, all lazy: ``tinkex-submit-i`` and ``tinkex-fetch-i`` (2 to 64), ``tinkex-batch-i`` (one
for each sampler with samples in flight, up to a cap; a sampler beyond it is polled the other way).
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Set

from tinkex.api.futures import Completions, read_completions, retrieve_futures
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ClientClosedError,
    ResultExpiredError,
    TinkexError,
)
from tinkex.flow.crew import Crew
from tinkex.flow.scheduler import WorkerPool
from tinkex.futures import APIFuture
from tinkex.http.channel import Channel
from tinkex.http.private_channel import AnyChannel
from tinkex.polling.batch_ledger import Ledger, NextPoll
from tinkex.polling.batch_patience import Patience
from tinkex.polling.cancel_queue import CancelQueue
from tinkex.polling.pause_notices import PauseNotices
from tinkex.polling.poll_loop import PollLoop, overdue
from tinkex.sampling.sample_gate import SampleGate
from tinkex.sampling.sample_work import OwnChannels, SampleWork, Stint, Target
from tinkex.server_flags import ABSENT, ServerFlags
from tinkex.server_memory import memory_of
from tinkex.transport import Request, Transport

logger = logging.getLogger(__name__)

ROUTE = "POST retrieve_futures"
_POLL = Request("POST", "/api/v1/retrieve_futures")

#: Most samplers polled for at once.
POLL_CAP = 64
#: With nothing in flight, what was fetched is reported after this long, if no poll did it before.
REPORT_AFTER_S = 1.0
#: A poll that only reports may take so long, and the one at close.
REPORT_TIMEOUT_S = 5.0
LAST_REPORT_S = 0.5
#: No server holds a poll for so long (reference, section 8); the next one asks for the same.
READ_TIMEOUT_S = 60.0

_IDLE_S = 5.0


class BatchPoller:
    """Submits samples and fetches their results when the server says that they are there.

    Thread-safe; nothing blocks but `say_goodbye` and `join`.

    Args:
        transport: everything goes through it; its ``closing`` event ends every wait.
        poll_alone: takes over a sample that is to be polled for on its own; must not block.
        fail: settles a future with an error.
        cancels: is told of samples that nobody waits for.
        pauses: as for PollLoop.
    """

    def __init__(
        self,
        transport: Transport,
        poll_alone: Callable[[SampleWork], None],
        fail: Callable[[APIFuture[Any], BaseException], None],
        cancels: CancelQueue,
        pauses: PauseNotices,
    ) -> None:
        self._transport = transport
        self._config = transport.config
        self._poll_alone = poll_alone
        self._fail = fail
        self._cancels = cancels
        self._pauses = pauses
        self._server = memory_of(transport.config.base_url)
        self._channels = OwnChannels(transport)
        self._gate = SampleGate(transport.config.max_unanswered_samples)
        self._submits = Crew("tinkex-submit")
        self._fetches = Crew("tinkex-fetch")
        self._polls = WorkerPool("tinkex-batch", POLL_CAP, _IDLE_S)
        self._begun = itertools.count(1)
        # Guards what follows and every watch's fields.  Never held during I/O, or while a future is
        # settled.
        self._lock = threading.Lock()
        self._watches: Dict[Target, _Watch] = {}
        self._under_way: Set[int] = set()  # submissions, by number
        self._last_begun = 0
        self._polled = 0  # samplers

    def usable(self, flags: ServerFlags) -> bool:
        """True if the server wants its samples waited for like this."""
        return flags.sample_use_retrieve_futures and not self._server.lacks(ROUTE)

    def submit(self, work: SampleWork) -> None:
        """Have *work* submitted, in its turn, and its future settled."""

        def start() -> None:
            try:
                self._submits.submit(lambda: self._submit(work))
            except ClientClosedError as error:
                self._fail(work.operation.future, error)

        self._gate.enter(work.operation.future, start)

    # Submitting, by tinkex-submit-i

    def _submit(self, work: SampleWork) -> None:
        future = work.operation.future
        if future.done():  # cancelled while it waited its turn
            return
        with self._lock:
            number = self._last_begun = next(self._begun)
            self._under_way.add(number)
        try:
            with Stint(future, self._channels.get()) as stint:
                work.submit(stint)
            self._expect(work)
        except Exception as error:
            self._fail(future, error)
        finally:
            with self._lock:
                self._under_way.discard(number)

    def _expect(self, work: SampleWork) -> None:
        """Wait for the result of *work*, which was accepted."""
        future = work.operation.future
        request_id = future.request_id or ""
        assert work.target is not None
        target = work.target()
        size: Optional[int] = None
        start = False
        with self._lock:
            watch = self._watches.get(target)
            if watch is None:
                watch = self._watches[target] = _Watch(target)
            alone = watch.given_up or (not watch.polled and self._polled >= POLL_CAP)
            if not alone:
                size = watch.expect(request_id, work, self._config)
                start = not watch.polled
                if start:
                    watch.polled = True
                    self._polled += 1
        if alone:
            self._poll_alone(work)
            return
        if size is not None:
            self._fetch_soon(watch, work, size)
        else:
            future.on_settled(lambda settled: self._withdraw(watch, request_id, settled))
        if start:
            try:
                self._polls.submit(lambda: self._poll_for(watch))
            except ClientClosedError as error:
                self._give_up(watch, error)
        else:
            watch.wake()

    def _withdraw(self, watch: _Watch, request_id: str, future: Any) -> None:
        """In the thread that settles the future: if it was cancelled, tell the server."""
        with self._lock:
            waited = watch.ledger.withdraw(request_id) is not None
        if waited and future.cancelled():
            self._cancels.put(request_id)

    # Polling, by tinkex-batch-i

    def _poll_for(self, watch: _Watch) -> None:
        """Poll until nothing is waited for and the server knows what was fetched."""
        channel = self._channels.get()
        patience = Patience(self._transport)
        try:
            while not self._transport.closing.is_set():
                with self._lock:
                    asked = watch.ledger.next_poll()
                    watch.resting = not asked.waiting
                if not asked.waiting:
                    if watch.rest(REPORT_AFTER_S):
                        continue
                    if self._report(watch, channel):
                        return
                    continue
                self._fail_overdue(watch)
                pause_s = self._poll(watch, asked, channel, patience)
                if pause_s > 0:
                    channel.stopped.wait(pause_s)
            with self._lock:
                self._stop_locked(watch)
        except Exception as error:
            self._give_up(watch, error)

    def _poll(
        self, watch: _Watch, asked: NextPoll, channel: AnyChannel, patience: Patience
    ) -> float:
        """Poll once; return the pause before the next poll, or raise what ends the polling."""
        began = time.monotonic()
        try:
            reply = self._ask(watch, asked, channel, self._read_timeout_s(watch, began))
        except APIConnectionError as silence:
            return patience.after_silence(silence, began, watch.last_contact)
        except APIStatusError as refused:  # the server gives no token just now
            return patience.after_error(refused)
        watch.last_contact = now = time.monotonic()
        if reply.status >= 300:
            if reply.status == 408:
                return patience.after_answer(now - began, False)
            error = self._transport.status_error(_POLL, reply)
            if error.status in ABSENT:
                self._server.note_missing(ROUTE, error.status or 404)
            return patience.after_error(error)
        done = read_completions(reply)
        self._server.note_present(ROUTE)
        self._take(watch, asked, done)
        return patience.after_answer(now - began, bool(done.sizes))

    def _ask(
        self, watch: _Watch, asked: NextPoll, channel: AnyChannel, read_timeout_s: float
    ) -> Any:
        return retrieve_futures(
            self._transport,
            sampling_session_id=watch.target.sampling_session_id,
            clone=watch.target.clone,
            cursor=asked.cursor,
            retrieved=asked.retrieved,
            at_once=not asked.waiting,
            read_timeout_s=read_timeout_s,
            channel=channel,
        )

    def _take(self, watch: _Watch, asked: NextPoll, done: Completions) -> None:
        with self._lock:
            ready = watch.ledger.told(asked, done.sizes, done.cursor, self._last_begun)
            self._drop_unwanted_locked(watch)
        for work, size in ready:
            self._fetch_soon(watch, work, size)

    def _drop_unwanted_locked(self, watch: _Watch) -> None:
        watch.ledger.drop_unwanted(min(self._under_way, default=self._last_begun + 1))

    def _report(self, watch: _Watch, channel: AnyChannel) -> bool:
        """Say what was fetched, if that was not said; True once there is nothing to do at all."""
        with self._lock:
            self._drop_unwanted_locked(watch)
            if watch.ledger.at_rest:
                self._stop_locked(watch)
                return True
            asked = watch.ledger.next_poll()
            if asked.waiting or not watch.ledger.unreported:
                return False
        try:
            reply = self._ask(watch, asked, channel, REPORT_TIMEOUT_S)
            if reply.status < 300:
                self._take(watch, asked, read_completions(reply))
                return False
            trouble: TinkexError = self._transport.status_error(_POLL, reply)
        except TinkexError as error:
            trouble = error
        logger.debug("what was fetched could not be reported: %s", trouble)
        with self._lock:  # the next poll tells, or nobody: the server drops it in time
            if watch.ledger.waiting:
                return False
            self._stop_locked(watch)
            return True

    def _stop_locked(self, watch: _Watch) -> None:
        if watch.polled:
            watch.polled = watch.resting = False
            self._polled -= 1

    def _read_timeout_s(self, watch: _Watch, now: float) -> float:
        """Wait for an answer no longer than the limits of what is waited for allow."""
        with self._lock:
            limit_s = watch.limit_s(self._config, now)
        return max(0.05, min(self._config.poll_timeout_s, READ_TIMEOUT_S, limit_s))

    def _fail_overdue(self, watch: _Watch) -> None:
        now = time.monotonic()
        with self._lock:
            late = watch.limit_s(self._config, now) <= 0
            waiting = list(watch.ledger.waiting.values()) if late else []
        for work in waiting:
            future = work.operation.future
            error = overdue(
                work.operation,
                self._config,
                waited_s=future.status().since_s,
                silent_s=now - watch.last_contact,
            )
            if error is not None:
                self._fail(future, error)

    def _give_up(self, watch: _Watch, error: Exception) -> None:
        """The poll cannot go on: nothing that waits may be forgotten."""
        together = isinstance(error, (APIConnectionError, ClientClosedError)) or (
            isinstance(error, APIError) and error.status == 402
        )
        with self._lock:
            self._stop_locked(watch)
            watch.given_up = watch.given_up or not together
            left = list(watch.ledger.take_all())
        if together:
            for work in left:
                self._fail(work.operation.future, copy.copy(error))
            return
        logger.warning(
            "samples of %s are polled for one by one from now on: %s",
            watch.target.sampling_session_id,
            error,
            exc_info=None if isinstance(error, TinkexError) else error,
        )
        for work in left:
            self._poll_alone(work)

    # Fetching, by tinkex-fetch-i

    def _fetch_soon(self, watch: _Watch, work: SampleWork, size: int) -> None:
        try:
            self._fetches.submit(lambda: self._fetch(watch, work, size))
        except ClientClosedError as error:
            self._fail(work.operation.future, error)

    def _fetch(self, watch: _Watch, work: SampleWork, size: int) -> None:
        operation = work.operation
        future = operation.future
        request_id = future.request_id or ""
        try:
            if not future.done():
                with Stint(future, self._channels.get()) as stint:
                    PollLoop(
                        self._transport, operation, stint.channel, self._pauses, announced=size
                    ).run()
        except ResultExpiredError as lost:
            work.note_lost(lost)
            self._poll_alone(work)
        except Exception as error:
            self._fail(future, error)
        finally:
            with self._lock:
                watch.ledger.fetched(request_id)

    # The end

    def close(self) -> None:
        """Let the threads end; returns at once.  The owner of the futures settles them."""
        for pool in self._pools:
            pool.close()
        with self._lock:
            watches = list(self._watches.values())
        for watch in watches:
            watch.wake()

    def say_goodbye(self, deadline: float) -> None:
        """After `close`: report what was fetched and not reported, once, as far as time allows."""
        deadline = min(deadline, time.monotonic() + LAST_REPORT_S)
        with self._lock:
            watches = [w for w in self._watches.values() if w.ledger.unreported and not w.given_up]
        if not watches:
            return
        channel = Channel(self._config, pool_size=1)  # the transport's own are broken off
        try:
            for watch in watches:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                with self._lock:
                    asked = watch.ledger.next_poll()._replace(waiting=False)
                self._ask(watch, asked, channel, left_s)
        except TinkexError as error:
            logger.debug("what was fetched could not be reported: %s", error)
        finally:
            channel.abort()

    def join(self, deadline: float) -> List[str]:
        """Wait until *deadline* (monotonic) for the threads; return the names of those left."""
        return [name for pool in self._pools for name in pool.join(deadline)]

    @property
    def stoppers(self) -> List[Callable[[], None]]:
        """Functions that stop the threads from a finalizer."""
        return [pool.stopper for pool in self._pools]

    @property
    def _pools(self) -> List[WorkerPool]:
        return [self._submits.pool, self._fetches.pool, self._polls]


class _Watch:
    """What is known of one sampler.  The batch poller's lock guards it, but for `rest`."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.ledger = Ledger()
        self.polled = False  # a thread polls for it
        self.given_up = False  # its samples are polled for on their own
        self.resting = False  # its thread waits for something to wait for
        self.last_contact = 0.0
        self._no_progress_s = math.inf  # the shortest of all its samples
        self._news = threading.Event()

    def expect(self, request_id: str, work: SampleWork, config: Config) -> Optional[int]:
        """See Ledger.expect."""
        if not self.ledger.waiting:
            self.last_contact = time.monotonic()
        limit_s = work.operation.no_progress_timeout_s or config.no_progress_timeout_s
        self._no_progress_s = min(self._no_progress_s, limit_s or math.inf)
        return self.ledger.expect(request_id, work)

    def limit_s(self, config: Config, now: float) -> float:
        """Seconds until something that is waited for has taken too long, or less."""
        limit_s = self.last_contact + self._no_progress_s - now
        oldest = next(iter(self.ledger.waiting.values()), None)
        if oldest is not None and config.operation_timeout_s is not None:
            waited_s = oldest.operation.future.status().since_s
            limit_s = min(limit_s, config.operation_timeout_s - waited_s)
        return limit_s

    def wake(self) -> None:
        """End a `rest`, if there is one."""
        if self.resting:
            self._news.set()

    def rest(self, seconds: float) -> bool:
        """Wait; True if there are news."""
        woken = self._news.wait(seconds)
        self._news.clear()
        return woken
