"""SampleStream: samples any number of prompts, a bounded number at a time, as an iterator.

Prompts are taken, and results returned, in the thread that iterates; there is no other.  Settled
futures put their index into a queue.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import queue
import sys
import threading
from concurrent.futures import CancelledError
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    Iterator,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

from tinkex._runtime.clock import LongWait
from tinkex._runtime.inbox import Inbox
from tinkex._runtime.lifecycle import call_from_finalizer
from tinkex.errors import (
    BackpressureError,
    BudgetExceededError,
    ClientClosedError,
    InvalidInputError,
    TinkexError,
    a_type,
)
from tinkex.futures import APIFuture, discard
from tinkex.types import ModelInput, SampleResponse

logger = logging.getLogger(__name__)

#: Called as ``progress(done, failed, total)``; *failed* of *done* failed, *total* may be None.
ProgressCallback = Callable[[int, int, Optional[int]], object]
Progress = Union[bool, ProgressCallback]

#: In input order, up to this many times max_in_flight prompts are begun ahead of the one due.
WINDOW = 4


class Sampled(NamedTuple):
    """What became of one prompt: a response, or the error that it failed with.

    Attributes:
        index: of the prompt in the iterable, from 0.
    """

    index: int  # type: ignore[assignment]  # tuple has a method of that name
    prompt: ModelInput
    response: Optional[SampleResponse]
    error: Optional[BaseException] = None


class SampleStream(Iterator[Sampled]):
    """The iterator that `SamplingClient.sample_many` returns, which describes the *options*.

    Several threads may share it: each result goes to one of them.  `close` may be called by any,
    and by the prompts or the progress function.

    Args:
        sample: submits one prompt.
    """

    def __init__(
        self,
        sample: Callable[[ModelInput], APIFuture[SampleResponse]],
        prompts: Iterable[ModelInput],
        **options: Any,
    ) -> None:
        self._run = run = _Run(sample, prompts, **options)
        # Guards the next two: one thread at a time takes prompts and waits.  Reentrant, because
        # the prompts and the progress function run inside, and may call `close`.
        self._lock = threading.RLock()
        self._running = False
        self._results = run.results()
        self._pid = os.getpid()

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> Sampled:
        if self._pid != os.getpid():  # locks may be dead, and nothing would wake us
            raise ClientClosedError("sample_many: this belongs to the parent process of a fork")
        # While a generator runs, nobody else may enter or close it: Python raises ValueError.
        with self._lock:
            self._running = True
            try:
                return next(self._results)
            finally:
                self._running = False

    def close(self) -> None:
        """Cancel what is in flight, and take no more prompts.  Idempotent.

        The iterator then ends, also for a thread that is waiting in it.  Blocks while another
        thread is in the iterable of prompts.
        """
        if self._pid != os.getpid():
            return
        self._run.stop()  # before the lock, which a thread that waits for a result holds
        with self._lock:
            if not self._running:  # else the prompts, or the progress function, called this
                self._results.close()

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Run:
    """The state of one stream.  Used by one thread at a time, except for `stop`."""

    def __init__(
        self,
        sample: Callable[[ModelInput], APIFuture[SampleResponse]],
        prompts: Iterable[ModelInput],
        *,
        max_in_flight: int,
        order: str,
        on_error: str,
        progress: Progress,
        notice_after_s: float,
    ) -> None:
        if order not in ("completion", "input"):
            raise InvalidInputError(f"order is {order!r}; it must be 'completion' or 'input'")
        if on_error not in ("raise", "yield", "skip"):
            raise InvalidInputError(
                f"on_error is {on_error!r}; it must be 'raise', 'yield' or 'skip'"
            )
        if not isinstance(progress, bool) and not callable(progress):
            raise InvalidInputError("progress must be True, False or a function")
        if isinstance(prompts, ModelInput) or not isinstance(prompts, Iterable):
            raise InvalidInputError(f"prompts is {a_type(prompts)}; give an iterable of ModelInput")
        self._sample = sample
        self._total = operator.length_hint(prompts, -1)
        self._prompts: Iterator[Tuple[int, ModelInput]] = enumerate(iter(prompts))
        self._max_in_flight = max_in_flight
        self._window = WINDOW * max_in_flight if order == "input" else None
        self._on_error = on_error
        self._progress = progress
        self._notice_after_s = notice_after_s
        self._settled: Inbox[Optional[int]] = Inbox()  # None: stop
        self._stopped = False
        self._in_flight: Dict[int, Tuple[ModelInput, APIFuture[SampleResponse]]] = {}
        # Finished, but not due yet in input order; by index.
        self._ready: Dict[int, Sampled] = {}
        self._due = 0
        # A prompt that was taken and could not be begun yet.
        self._next: Optional[Tuple[int, ModelInput]] = None

    def stop(self) -> None:
        """End the run; wakes the thread that waits.  From any thread."""
        # The flag is for a thread that submits prompts, the item for one that waits for a result.
        self._stopped = True
        self._settled.put(None)

    def results(self) -> Generator[Sampled, None, None]:
        """Yield what becomes of the prompts.  Closing it cancels what is in flight."""
        done = failed = 0
        first: Optional[Sampled] = None
        collected = False
        report = _reporter(self._progress, self._total)
        try:
            while not self._stopped:
                self._fill()
                if not self._in_flight:
                    break
                sampled = self._wait()
                if sampled is None:
                    break
                done += 1
                if sampled.error is not None:
                    failed += 1
                    first = first or sampled
                    if self._on_error == "raise":
                        _add_index(sampled.error, sampled.index)
                        raise sampled.error
                report(done, failed)
                self._ready[sampled.index] = sampled
                yield from self._hand_out(sampled.index)
            if first is not None and self._on_error == "skip":
                logger.warning(
                    "sample_many: %d of %d prompts failed and were skipped; the first was prompt "
                    "%d: %s",
                    failed,
                    done,
                    first.index,
                    first.error,
                )
        except GeneratorExit:
            # `close` sets the flag before it closes the generator; a finalizer does not.
            collected = not self._stopped
            raise
        finally:
            self._stopped = True
            futures = [future for _, future in self._in_flight.values()]
            if collected:
                # In a finalizer, at any point of any thread: cancelling takes locks, which this
                # thread may be holding.
                call_from_finalizer(discard, futures)
            else:
                discard(futures)
            self._in_flight.clear()
            report.close()

    def _fill(self) -> None:
        """Begin as many prompts as there is room for."""
        while len(self._in_flight) < self._max_in_flight and not self._stopped:
            if self._next is None:
                self._next = next(self._prompts, None)
                if self._next is None:
                    self._prompts = iter(())  # do not ask an iterator again that has ended
                    return
                continue  # the iterable of prompts may have closed the stream
            index, prompt = self._next
            # A slow prompt holds back the results after it; this bounds how many are kept.
            if self._window is not None and index >= self._due + self._window:
                return
            try:
                future = self._sample(prompt)
            except (BudgetExceededError, BackpressureError) as error:
                # None of ours is going to free any room, so a wait might never end.
                if not self._in_flight:
                    _add_index(error, index)
                    raise
                return  # there may be room once some of ours are done
            except InvalidInputError as error:
                future = APIFuture("sample")  # a failure like any other: on_error decides
                future.try_set_exception(error)
            self._in_flight[index] = (prompt, future)  # first: Ctrl-C may come at any call
            self._next = None
            future.on_settled(functools.partial(self._note_settled, index))

    def _note_settled(self, index: int, future: Any) -> None:
        """In the thread that settles the future."""
        self._settled.put(index)

    def _wait(self) -> Optional[Sampled]:
        """Wait until one of those in flight is settled; None if the run is stopped."""
        index: Optional[int] = None
        wait = LongWait(self._notice_after_s)
        while not self._stopped:
            try:
                index = self._settled.get(timeout=wait.slice_s())
                break
            except queue.Empty:
                if wait.notice_is_due():
                    self._explain_wait()
        if index is None:
            return None
        prompt, future = self._in_flight.pop(index)
        # Asked first, because `exception` would raise CancelledError rather than return it.
        if future.cancelled():
            return Sampled(index, prompt, None, CancelledError())
        error = future.exception()
        if isinstance(error, ClientClosedError):
            raise error  # whatever on_error is: every further prompt would fail with it
        if error is not None:
            return Sampled(index, prompt, None, error)
        return Sampled(index, prompt, future.result())

    def _explain_wait(self) -> None:
        # A dict keeps the order of insertion, in which the prompts were begun.
        _, oldest = next(iter(self._in_flight.values()))
        logger.info(
            "sample_many: still waiting for %d samples; the oldest is %s",
            len(self._in_flight),
            oldest.status(),
        )

    def _hand_out(self, index: int) -> Iterator[Sampled]:
        """Yield what is due now that *index* is ready; skipped failures are left out."""
        keep_failed = self._on_error == "yield"
        if self._window is None:
            sampled = self._ready.pop(index)
            if keep_failed or sampled.error is None:
                yield sampled
            return
        while self._due in self._ready:
            sampled = self._ready.pop(self._due)
            self._due += 1
            if keep_failed or sampled.error is None:
                yield sampled


def _add_index(error: BaseException, index: int) -> None:
    if isinstance(error, TinkexError):
        note = f"It was prompt {index} of sample_many."
        error.hint = f"{error.hint} {note}" if error.hint else note


class _Reporter:
    """Reports no progress."""

    def __call__(self, done: int, failed: int) -> None:
        """*done* prompts are finished, *failed* of them without a result."""

    def close(self) -> None:
        """The stream has ended."""


class _Caller(_Reporter):
    def __init__(self, call: ProgressCallback, total: Optional[int]) -> None:
        self._call = call
        self._total = total

    def __call__(self, done: int, failed: int) -> None:
        self._call(done, failed, self._total)


class _Bar(_Reporter):
    """A progress bar on stderr."""

    def __init__(self, total: Optional[int]) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("sampling", total=total)
        self._bar.start()

    def __call__(self, done: int, failed: int) -> None:
        what = f"sampling, {failed} failed" if failed else "sampling"
        self._bar.update(self._task, completed=done, description=what)

    def close(self) -> None:
        self._bar.stop()


def _reporter(progress: Progress, total: int) -> _Reporter:
    known = total if total >= 0 else None
    if not isinstance(progress, bool):
        return _Caller(progress, known)
    if progress and sys.stderr is not None and sys.stderr.isatty():
        return _Bar(known)
    return _Reporter()
