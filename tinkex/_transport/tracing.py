"""OpenTelemetry spans of operations and of their HTTP requests, for clients with ``tracing=True``.

The span of an operation begins in the caller's thread, as a child of the caller's current span, and
ends when its future is settled.  Threads that work for an operation make its span the current one.
Each attempt of a request that such a thread sends gets a span of its own, and the server receives
its trace context.  Heartbeats, and polls for many samples at once, belong to no operation and get
no span.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import Any, Dict, Iterator, Optional
from urllib.parse import urlsplit

from tinkex._runtime.late_import import import_extra, import_late
from tinkex._version import __version__
from tinkex.config import Config

_NO_SPAN: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Tracer:
    """Makes the spans of one client, using the program's tracer provider.  Thread-safe.

    Raises:
        ConfigError: ``opentelemetry-api`` is not installed.
    """

    def __init__(self, config: Config) -> None:
        self.api = import_extra(
            "opentelemetry.trace", "get_tracer", user="tracing=True", extra="otel"
        )
        self.context = import_late("opentelemetry.context")
        propagation = import_late("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()
        self._tracer = self.api.get_tracer("tinkex", __version__)
        parts = urlsplit(config.base_url)
        self._server = {
            "server.address": parts.hostname or "",
            "server.port": parts.port or (443 if parts.scheme == "https" else 80),
        }

    def operation(self, kind: str) -> Operation:
        """Begin the span of an operation."""
        return Operation(self, self._tracer.start_span(f"tinkex.{kind}", attributes=self._server))

    @contextlib.contextmanager
    def request(self, method: str, path: str, headers: Dict[str, str]) -> Iterator[Any]:
        """Make a span for one attempt, and add its trace context to *headers*.

        Yields the span, for `respond`, or None if there is no current span.
        """
        # Outside an operation, each poll would otherwise begin a trace of its own.
        if not self.api.get_current_span().get_span_context().is_valid:
            yield None
            return
        path = path.partition("?")[0]
        attributes = {"http.request.method": method, "url.path": path, **self._server}
        with self._tracer.start_as_current_span(
            f"{method} {path}",
            kind=self.api.SpanKind.CLIENT,
            attributes=attributes,
            # An exception may quote the server's response; the operation's span redacts it.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            self._propagator.inject(headers)
            try:
                yield span
            except BaseException as error:
                self.fail(span, error)
                raise

    def respond(self, span: Any, status: int) -> None:
        """Add the *status* of the response to *span*."""
        span.set_attribute("http.response.status_code", status)
        if status >= 400:
            span.set_attribute("error.type", str(status))
            span.set_status(self.api.StatusCode.ERROR)

    def fail(self, span: Any, error: BaseException, message: Optional[str] = None) -> None:
        """Mark *span* as failed with *error*."""
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(self.api.StatusCode.ERROR, message)


class Operation:
    """The span of one operation, and the context in which threads work for it."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._context = tracer.api.set_span_in_context(span)

    def attach(self) -> Any:
        """Make this span the current one of this thread; return the token for `detach`."""
        return self._tracer.context.attach(self._context)

    def detach(self, token: Any) -> None:
        """Restore the span that was current before `attach`."""
        self._tracer.context.detach(token)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this span the current one of this thread inside the block."""
        token = self.attach()
        try:
            yield
        finally:
            self.detach(token)

    def end(self, future: Any) -> None:
        """End the span with the outcome of *future*, which is settled."""
        if future.request_id is not None:
            self._span.set_attribute("tinkex.request_id", future.request_id)
        if future.cancelled():
            self._span.set_attribute("tinkex.cancelled", True)
        else:
            # Call the base class's method: APIFuture's would count the failure as read by the user.
            error = Future.exception(future, 0)
            if error is not None:
                self._tracer.fail(self._span, error, getattr(error, "message", None))
        self._span.end()


def active(operation: Optional[Operation]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that makes the span of *operation* current; a no-op for None."""
    return _NO_SPAN if operation is None else operation.active()
