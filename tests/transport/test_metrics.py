"""ServiceClient.metrics: counters and latencies, and the cost of recording them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import Metrics, ServiceClient, types
from tinkex.metrics import STAGES, Latency, Recorder

PROMPT = types.ModelInput.from_ints([1, 2, 3])
ASAMPLE = "POST /api/v1/asample"


def test_samples_are_counted(
    server: ScriptedServer, scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    sampler = scripted.create_sampling_client(base_model="base")
    before = scripted.metrics()
    for _ in range(3):
        sampler.sample(PROMPT).result(PATIENCE_S)
    after = scripted.metrics()
    assert after.requests - before.requests >= 6  # each sample is submitted and polled for
    bodies = sum(len(r.body) for r in server.requests(ASAMPLE))
    polls = sum(len(r.body) for r in server.requests("POST /api/v1/retrieve_future"))
    assert after.bytes_sent - before.bytes_sent >= bodies + polls
    assert after.bytes_received > before.bytes_received
    assert (after.retries, after.rate_limited) == (0, 0)
    assert (after.in_flight, after.queued) == (0, 0)
    for stage in STAGES:
        added = after.latencies[stage].count - before.latencies[stage].count
        assert added == 3, stage
        assert 0 <= after.latencies[stage].p50 <= after.latencies[stage].max


def test_passes_are_timed_too(scripted: ServiceClient, service: ServiceClient) -> None:
    run = service.create_lora_training_client("deterministic", rank=4)
    before = service.metrics()
    tokens = types.TensorData([2, 3], "int64", (2,))
    datum = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": tokens})
    run.forward_backward([datum], "cross_entropy").result(PATIENCE_S)
    after = service.metrics()
    for stage in ("submit", "queue", "fetch", "decode"):
        assert after.latencies[stage].count - before.latencies[stage].count == 1, stage


def test_retries_and_failures_are_counted(server: ScriptedServer, routes: TinkerRoutes) -> None:
    routes.serve(
        "asample",
        Answer(429, headers={"retry-after-ms": "1"}),
        Answer(503, headers={"retry-after-ms": "1"}),
        routes.accept,
    )
    with ServiceClient(base_url=server.url) as client:
        client.create_sampling_client(base_model="base").sample(PROMPT).result(PATIENCE_S)
        seen = client.metrics()
        assert seen.rate_limited == 1
        assert seen.retries == 2


def test_work_in_flight_is_counted(server: ScriptedServer, routes: TinkerRoutes) -> None:
    hold = threading.Event()

    def poll(received: Received) -> Answer:
        answer = routes.results[received.json()["request_id"]]
        return Answer(body=answer.body, hold=hold)

    routes.serve("retrieve_future", poll)
    with ServiceClient(base_url=server.url, max_concurrent_samples=2) as client:
        sampler = client.create_sampling_client(base_model="base")
        futures = [sampler.sample(PROMPT) for _ in range(5)]
        wait_until(lambda: client.metrics().in_flight == 2, "two are in flight")
        assert client.metrics().queued == 3
        hold.set()
        for future in futures:
            future.result(PATIENCE_S)
        wait_until(lambda: client.metrics().in_flight == 0, "all are forgotten")


def test_queue_is_the_time_spent_on_the_server(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    """The time of a held poll counts as queue, not as fetch."""
    hold = threading.Event()

    def poll(received: Received) -> Answer:
        answer = routes.results[received.json()["request_id"]]
        threading.Timer(0.2, hold.set).start()
        return Answer(body=answer.body, hold=hold)

    with ServiceClient(base_url=server.url) as client:
        sampler = client.create_sampling_client(base_model="base")
        routes.serve("retrieve_future", poll)
        sampler.sample(PROMPT).result(PATIENCE_S)
        latencies = client.metrics().latencies
        assert latencies["queue"].max >= 0.19
        assert latencies["fetch"].max < latencies["queue"].max


def test_a_snapshot_is_frozen(scripted: ServiceClient) -> None:
    seen = scripted.metrics()
    assert isinstance(seen, Metrics)
    with pytest.raises(AttributeError):
        seen.requests = 5  # type: ignore[misc]


# The recorder


def test_latencies_are_right_within_a_tenth() -> None:
    recorder = Recorder()
    for milliseconds in range(1, 1001):
        recorder.took("submit", milliseconds / 1e3)
    _, latencies = recorder.snapshot()
    seen = latencies["submit"]
    assert seen.count == 1000
    assert seen.mean == pytest.approx(0.5005)
    assert seen.p50 == pytest.approx(0.5, rel=0.1)
    assert seen.p95 == pytest.approx(0.95, rel=0.1)
    assert seen.max == 1.0
    assert latencies["fetch"] == Latency()


def test_any_duration_has_a_bucket() -> None:
    recorder = Recorder()
    for seconds in (0.0, -1e-9, 1e-7, 5e5):
        recorder.took("queue", seconds)
    seen = recorder.snapshot()[1]["queue"]
    assert seen.count == 4
    assert seen.max == 5e5


def test_no_count_is_lost_and_memory_is_bounded() -> None:
    recorder = Recorder()

    def work(_: int) -> None:
        for _ in range(5000):
            recorder.request(2, 3)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(recorder._entries) < 2 * 1024 + 3 * 8
    counts, _ = recorder.snapshot()
    assert counts["requests"] == 40000
    assert counts["bytes_sent"] == 80000
    assert counts["bytes_received"] == 120000


def test_metrics_print_as_a_table() -> None:
    latencies = {"encode": Latency(), "submit": Latency(3, 0.5, 0.4, 1.25, 2.0)}
    lines = str(Metrics(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, latencies)).splitlines()
    assert lines[0] == "1 in flight, 2 queued; 3 requests, 4 responses of 429, 5 retries"
    assert "10 sampled" in lines[1]
    assert lines[-1].split() == ["submit", "3", "500.0", "400.0", "1250.0", "2000.0"]
