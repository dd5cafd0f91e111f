"""Spans of operations and of their requests, and the trace context that the server gets."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any, Iterator, List

import pytest
from support.scripted_server import Answer, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import AdamParams, Datum, ModelInput, ServiceClient
from tinkex._runtime import late_import
from tinkex.errors import ConfigError, TinkexError
from tinkex.local import LocalServer
from tinkex.types import SamplingParams

KEY = "tml-secret-4711"
DATUM = Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8], "weights": [1, 1, 1]})


@pytest.fixture(scope="module")
def exporter() -> Any:
    """Collects the finished spans of all tests here, as a process has only one provider."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


class Spans:
    """The exported spans."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter

    def all(self) -> List[Any]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> Any:
        """Wait for the span *name*, which ends only after waiters have woken."""
        wait_until(lambda: any(span.name == name for span in self.all()), f"the span {name}")
        return next(span for span in self.all() if span.name == name)

    def inside(self, span: Any) -> List[Any]:
        """The children of *span*, oldest first."""
        children = [s for s in self.all() if s.parent and s.parent.span_id == span.context.span_id]
        return sorted(children, key=lambda child: child.start_time)


@pytest.fixture
def spans(exporter: Any) -> Iterator[Spans]:
    exporter.clear()
    yield Spans(exporter)
    exporter.clear()


@pytest.fixture
def traced(local: LocalServer) -> Iterator[ServiceClient]:
    with ServiceClient(base_url=local.url, api_key=KEY, tracing=True) as client:
        yield client


def text_of(span: Any) -> str:
    return str(span.to_json())


def test_each_operation_is_a_span_inside_the_callers_with_its_requests_inside(
    traced: ServiceClient, spans: Spans
) -> None:
    from opentelemetry import trace

    with trace.get_tracer("test").start_as_current_span("experiment") as experiment:
        trainer = traced.create_lora_training_client("deterministic", rank=4)
        passed = trainer.forward_backward([DATUM], "cross_entropy")
        trainer.optim_step(AdamParams()).result()
        passed.result()
        path = trainer.save_weights_for_sampler("first").result().path
        sampler = traced.create_sampling_client(path)
        prompt = ModelInput.from_ints([1, 2])
        sampler.sample(prompt, 1, SamplingParams(max_tokens=2)).result()
    found = {}
    for kind in ("create_lora_training_client", "forward_backward", "optim_step", "sample"):
        span = found[kind] = spans.named(f"tinkex.{kind}")
        assert span.parent.span_id == experiment.get_span_context().span_id
        assert span.status.is_ok or span.status.status_code is trace.StatusCode.UNSET
    assert found["forward_backward"].attributes["tinkex.request_id"]
    for kind, route in [("forward_backward", "forward_backward"), ("sample", "asample")]:
        first, *_ = requests = spans.inside(found[kind])
        assert first.name == f"POST /api/v1/{route}"
        assert first.kind is trace.SpanKind.CLIENT
        assert first.attributes["http.response.status_code"] == 200
        assert first.attributes["http.request.method"] == "POST"
        assert first.attributes["server.address"] == "127.0.0.1"
        assert requests[-1].name == "POST /api/v1/retrieve_future"
    assert not any("heartbeat" in span.name for span in spans.all())
    assert not any(KEY in text_of(span) for span in spans.all())


def test_without_a_span_of_the_caller_an_operation_begins_a_trace(
    traced: ServiceClient, spans: Spans
) -> None:
    trainer = traced.create_lora_training_client("deterministic", rank=4)
    trainer.forward([DATUM], "cross_entropy").result()
    assert spans.named("tinkex.forward").parent is None


def test_the_server_gets_the_trace_context_of_the_attempt(
    server: ScriptedServer, routes: TinkerRoutes, spans: Spans
) -> None:
    with ServiceClient(base_url=server.url, tracing=True) as service:
        trainer = service.create_lora_training_client("base", rank=4)
        trainer.optim_step(AdamParams()).result()
    (received,) = server.requests("POST /api/v1/optim_step")
    operation = spans.named("tinkex.optim_step")
    attempt = spans.inside(operation)[0]
    version, trace_id, span_id, _ = received.headers["traceparent"].split("-")
    assert (version, int(trace_id, 16), int(span_id, 16)) == (
        "00",
        operation.context.trace_id,
        attempt.context.span_id,
    )


@pytest.mark.usefixtures("short_backoff")
def test_a_failed_attempt_is_a_separate_span(
    server: ScriptedServer, routes: TinkerRoutes, spans: Spans
) -> None:
    from opentelemetry.trace import StatusCode

    with ServiceClient(base_url=server.url, tracing=True) as service:
        trainer = service.create_lora_training_client("base", rank=4)
        server.on("POST /api/v1/optim_step", Answer(503, {"error": "busy"}), routes.accept)
        trainer.optim_step(AdamParams()).result()
    operation = spans.named("tinkex.optim_step")
    failed, repeated, *_ = spans.inside(operation)
    assert failed.name == repeated.name == "POST /api/v1/optim_step"
    assert failed.attributes["http.response.status_code"] == 503
    assert failed.attributes["error.type"] == "503"
    assert failed.status.status_code is StatusCode.ERROR
    assert repeated.attributes["http.response.status_code"] == 200
    assert operation.status.status_code is StatusCode.UNSET


def test_the_span_of_a_failed_operation_says_so(spans: Spans, traced: ServiceClient) -> None:
    from opentelemetry.trace import StatusCode

    trainer = traced.create_lora_training_client("deterministic", rank=4)
    with pytest.raises(TinkexError):
        trainer.load_state("tinker://nowhere:train:0/weights/none").result()
    span = spans.named("tinkex.load_state")
    assert span.status.status_code is StatusCode.ERROR
    assert "nowhere" in span.status.description
    assert span.attributes["error.type"].endswith("Error")
    assert not any(KEY in text_of(span) for span in spans.all())


def test_the_span_of_a_cancelled_operation_says_so(
    server: ScriptedServer, routes: TinkerRoutes, spans: Spans
) -> None:
    with ServiceClient(base_url=server.url, tracing=True) as service:
        trainer = service.create_lora_training_client("base", rank=4)
        held = threading.Event()
        server.on("POST /api/v1/optim_step", Answer(hold=held))
        future = trainer.optim_step(AdamParams())
        server.wait_for("POST /api/v1/optim_step")
        future.cancel()
        held.set()
    assert spans.named("tinkex.optim_step").attributes["tinkex.cancelled"] is True


def test_the_trace_context_goes_to_no_other_host(
    server: ScriptedServer, routes: TinkerRoutes, spans: Spans
) -> None:
    with ScriptedServer() as other:
        other.on("GET /elsewhere", Answer(body={"sessions": []}))
        elsewhere = Answer(302, headers={"location": f"{other.url}/elsewhere"})
        server.on("GET /api/v1/sessions", elsewhere)
        with ServiceClient(base_url=server.url, tracing=True) as service:
            service.create_rest_client().list_sessions().result()
        (here,) = server.requests("GET /api/v1/sessions")
        (there,) = other.requests()
    assert "traceparent" in here.headers
    assert "traceparent" not in there.headers


def test_without_the_package_tracing_is_an_error_with_the_command_to_install_it(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    monkeypatch.delitem(late_import._modules, "opentelemetry.trace", raising=False)
    with pytest.raises(ConfigError) as caught:
        ServiceClient(base_url=server.url, tracing=True)
    assert "tracing=True needs opentelemetry.trace" in str(caught.value)
    assert 'python -m pip install "tinkex[otel]"' in str(caught.value)
    assert server.requests() == []


def test_tracing_is_off_by_default_and_imports_nothing_then(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    script = (
        "import sys, tinkex\n"
        "with tinkex.ServiceClient(base_url=sys.argv[1]) as service:\n"
        "    trainer = service.create_lora_training_client('base', rank=4)\n"
        "    trainer.optim_step(tinkex.AdamParams()).result()\n"
        "print('opentelemetry' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
    assert not any("traceparent" in received.headers for received in server.requests())
