"""SampleStream: samples any number of prompts, a bounded number at a time, as an iterator.

It has no thread of its own: the iterating thread takes prompts and returns results.  Futures put
their index into a queue when they are settled.
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

#: Called as ``progress(done, failed, total)``: *failed* counts among *done*; *total* may be None.
ProgressCallback = Callable[[int, int, Optional[int]], object]
Progress = Union[bool, ProgressCallback]

#: In input order, up to this many times max_in_flight prompts are begun ahead of the next result.
WINDOW = 4


class Sampled(NamedTuple):
    """The outcome of one prompt: its response, or the error that it failed with.

    Attributes:
        index: the prompt's position in the iterable, from 0.
    """

    index: int  # type: ignore[assignment]  # tuple has a method of that name
    prompt: ModelInput
    response: Optional[SampleResponse]
    error: Optional[BaseException] = None


class SampleStream(Iterator[Sampled]):
    """The iterator that `SamplingClient.sample_many` returns; see there for the *options*.

    Several threads may share it: each result goes to one of them.  Any thread may call `close`, and
    so may the iterable of prompts and the progress function.

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
        # Guards _running and _results: one thread at a time takes prompts and waits.  Reentrant,
        # because the iterable of prompts and the progress function run inside and may call `close`.
        self._lock = threading.RLock()
        self._running = False
        self._results = run.results()
        self._pid = os.getpid()

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> Sampled:
        if self._pid != os.getpid():  # locks may be held for ever, and nothing would wake us
            raise ClientClosedError("sample_many: this belongs to the parent process of a fork")
        # A running generator must not be entered or closed again: Python raises ValueError.
        with self._lock:
            self._running = True
            try:
                return next(self._results)
            finally:
                self._running = False

    def close(self) -> None:
        """Cancel the requests in flight, and take no more prompts.  Idempotent.

        The iterator then ends, even for a thread that is waiting in it.  Blocks while another
        thread is reading the iterable of prompts.
        """
        if self._pid != os.getpid():
            return
        self._run.stop()  # before the lock, which is held by a thread that waits for a result
        with self._lock:
            if not self._running:  # otherwise the prompts or the progress function called `close`
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
        # Finished results that wait for an earlier one in input order, by index.
        self._ready: Dict[int, Sampled] = {}
        self._due = 0
        # A prompt that was taken but could not be submitted yet.
        self._next: Optional[Tuple[int, ModelInput]] = None

    def stop(self) -> None:
        """End the run, and wake the waiting thread.  Thread-safe."""
        # A thread that submits prompts sees the flag; one that waits for a result gets the item.
        self._stopped = True
        self._settled.put(None)

    def results(self) -> Generator[Sampled, None, None]:
        """Yield the outcomes of the prompts.  Closing the generator cancels requests in flight."""
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
            # `close` sets the flag before it closes the generator; the garbage collector does not.
            collected = not self._stopped
            raise
        finally:
            self._stopped = True
            futures = [future for _, future in self._in_flight.values()]
            if collected:
                # A finalizer can run at any point of any thread.  Cancelling takes locks, which
                # that thread may be holding.
                call_from_finalizer(discard, futures)
            else:
                discard(futures)
            self._in_flight.clear()
            report.close()

    def _fill(self) -> None:
        """Submit as many prompts as there is room for."""
        while len(self._in_flight) < self._max_in_flight and not self._stopped:
            if self._next is None:
                self._next = next(self._prompts, None)
                if self._next is None:
                    self._prompts = iter(())  # don't call an iterator again that has ended
                    return
                continue  # the iterable of prompts may have closed the stream
            index, prompt = self._next
            # A slow prompt holds back all later results; this bounds their number.
            if self._window is not None and index >= self._due + self._window:
                return
            try:
                future = self._sample(prompt)
            except (BudgetExceededError, BackpressureError) as error:
                # With no request of ours in flight to free any room, waiting might never end.
                if not self._in_flight:
                    _add_index(error, index)
                    raise
                return  # there may be room once some of our requests are done
            except InvalidInputError as error:
                future = APIFuture("sample")  # a failure like any other: on_error decides
                future.try_set_exception(error)
            self._in_flight[index] = (prompt, future)  # first: Ctrl-C may strike in any call
            self._next = None
            future.on_settled(functools.partial(self._note_settled, index))

    def _note_settled(self, index: int, future: Any) -> None:
        """Called in the thread that settles the future."""
        self._settled.put(index)

    def _wait(self) -> Optional[Sampled]:
        """Wait until a request in flight is settled; return None if the run is stopped."""
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
        # Checked first, because `exception` would raise CancelledError rather than return it.
        if future.cancelled():
            return Sampled(index, prompt, None, CancelledError())
        error = future.exception()
        if isinstance(error, ClientClosedError):
            raise error  # whatever on_error says: every further prompt would fail, too
        if error is not None:
            return Sampled(index, prompt, None, error)
        return Sampled(index, prompt, future.result())

    def _explain_wait(self) -> None:
        # A dict keeps insertion order, so the first entry is the oldest.
        _, oldest = next(iter(self._in_flight.values()))
        logger.info(
            "sample_many: still waiting for %d samples; the oldest is %s",
            len(self._in_flight),
            oldest.status(),
        )

    def _hand_out(self, index: int) -> Iterator[Sampled]:
        """Yield what can be returned now that *index* is ready, without skipped failures."""
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
        """Report that *done* prompts are finished, *failed* of them without a result."""

    def close(self) -> None:
        """Report that the stream has ended."""


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
