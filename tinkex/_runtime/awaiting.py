"""Awaiting tinkex's futures and calls in a program that has an event loop.

tinkex itself has none: its threads settle `concurrent.futures` futures, and asyncio carries the
outcome into the caller's loop.  asyncio is imported only when something is awaited.

The clients' ``*_async`` names are the official SDK's.  Each is made from the method it is named
after, by what it awaits: the queuing of work (`future_of`), the outcome of a future (`result_of`),
or the end of a blocking call (`in_thread`).
"""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Awaitable, Callable, Coroutine, TypeVar

from tinkex._runtime.clock import LongWait

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    P = ParamSpec("P")

T = TypeVar("T")
FutureT = TypeVar("FutureT", bound="Future[Any]")


async def outcome_of(future: Future[T], wait: LongWait, explain: Callable[[LongWait], None]) -> T:
    """Wait for *future* without blocking the loop, and return its result.

    *explain* is called from time to time to log the reason for a long wait.  Cancelling the
    awaiting task cancels the future, and so does the end of *wait*: this is asyncio's rule, and the
    official SDK's behavior.

    Raises:
        asyncio.TimeoutError: *wait* is over.
        asyncio.CancelledError: the task or the future was cancelled.
        TinkexError: the operation failed.
    """
    import asyncio

    waiting = asyncio.wrap_future(future)
    try:
        # Unlike asyncio.wait_for, asyncio.wait does not cancel the future at the end of a slice.
        while not (await asyncio.wait({waiting}, timeout=wait.slice_s()))[0]:
            if wait.is_over:
                raise asyncio.TimeoutError(f"no result within {wait.timeout_s:g} s: {future!r}")
            explain(wait)
        return waiting.result()
    finally:
        if not waiting.done():
            waiting.cancel()
            future.cancel()  # asyncio would do so only when the loop runs next


async def itself(value: T) -> T:
    """Return *value*, so that a value that is already there can be awaited."""
    return value


def future_of(method: Callable[P, FutureT]) -> Callable[P, Coroutine[Any, Any, FutureT]]:
    """Make the ``*_async`` form of a *method* that queues work: awaiting it gives the future.

    The method is called in the loop's own thread, where it does not block.  Work of one run is done
    in call order, which calls from several threads would not preserve.
    """

    async def queue(*args: P.args, **kwargs: P.kwargs) -> FutureT:
        return method(*args, **kwargs)

    return _named(queue, method, "queues work; awaiting this gives its future")


def result_of(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make the ``*_async`` form of a *method* that returns a future: awaiting gives its result."""

    async def wait(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    return _named(wait, method, "returns a future; awaiting this gives its result")


def in_thread(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make the ``*_async`` form of a *method* that blocks: it runs in asyncio's own thread pool."""

    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        import asyncio

        return await asyncio.to_thread(method, *args, **kwargs)

    return _named(run, method, "blocks; this runs it in a thread of asyncio's pool")


def _named(coroutine: Callable[P, T], method: Callable[P, Any], does: str) -> Callable[P, T]:
    functools.update_wrapper(coroutine, method)  # including its signature
    name = method.__name__
    coroutine.__name__ = (name[: -len("_future")] if name.endswith("_future") else name) + "_async"
    coroutine.__qualname__ = method.__qualname__[: -len(name)] + coroutine.__name__
    coroutine.__doc__ = f"For a running event loop: `{name}` {does}."
    return coroutine
