"""SamplingClient.sample_many: order, bounds, failures, and early ends."""

from __future__ import annotations

import gc
import itertools
import os
import re
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, Iterator, List, Optional, Tuple

import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import race, wait_until
from support.tinker_routes import RESULTS, TinkerRoutes

from tinkex import Budget, RetryConfig, SamplingClient, ServiceClient, types
from tinkex._sampling.requests import PendingSample
from tinkex.clients import sample_stream
from tinkex.clients.sample_stream import Sampled, SampleStream
from tinkex.errors import (
    BackpressureError,
    BudgetExceededError,
    ClientClosedError,
    InvalidInputError,
    RequestFailedError,
)

PARAMS = types.SamplingParams(max_tokens=2, seed=1)
ASAMPLE = "POST /api/v1/asample"


def prompt(index: int) -> types.ModelInput:
    return types.ModelInput.from_ints([index + 1, 7])


def prompts(count: int) -> List[types.ModelInput]:
    return [prompt(index) for index in range(count)]


class Counted:
    """An endless iterator of prompts that counts how many were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[types.ModelInput]:
        while True:
            self.taken += 1
            yield prompt(self.taken - 1)


class Held:
    """Releases the results of samples on command, by the first token of their prompts."""

    def __init__(self, routes: TinkerRoutes) -> None:
        self._routes = routes
        self._token: dict[str, int] = {}
        self._done = {number: threading.Event() for number in range(1, 100)}
        self.failing: set[int] = set()
        routes.serve("asample", self._accept)
        routes.serve("retrieve_future", self._retrieve)

    def finish(self, *indexes: int) -> None:
        for index in indexes:
            self._done[index + 1].set()

    def _accept(self, received: Received) -> Answer:
        answer = self._routes.accepted("asample", Answer(body=RESULTS["asample"]))
        token = received.json()["prompt"]["chunks"][0]["tokens"][0]
        self._token[answer.body["request_id"]] = token
        return answer

    def _retrieve(self, received: Received) -> Answer:
        token = self._token[received.json()["request_id"]]
        if token - 1 in self.failing:
            body: Any = {"error": "no such luck", "category": "server"}
        else:
            body = RESULTS["asample"]
        return Answer(body=body, hold=self._done[token])


@pytest.fixture
def held(routes: TinkerRoutes) -> Iterator[Held]:
    made = Held(routes)
    yield made
    made.finish(*range(99))


@pytest.fixture
def sampler(scripted: ServiceClient) -> SamplingClient:
    return scripted.create_sampling_client(base_model="base")


def test_every_prompt_is_sampled(service: ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="deterministic")
    found = list(sampler.sample_many(prompts(40), PARAMS, num_samples=2, max_in_flight=8))
    assert sorted(one.index for one in found) == list(range(40))
    for one in found:
        assert one.prompt == prompt(one.index)
        assert one.error is None
        alone = sampler.sample(one.prompt, 2, PARAMS).result(PATIENCE_S)
        assert one.response is not None
        assert [s.tokens for s in one.response.sequences] == [s.tokens for s in alone.sequences]


def test_results_can_be_in_input_order(service: ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="deterministic")
    found = list(sampler.sample_many(iter(prompts(30)), PARAMS, max_in_flight=4, order="input"))
    assert [one.index for one in found] == list(range(30))


def test_no_prompts(sampler: SamplingClient, routes: TinkerRoutes) -> None:
    assert list(sampler.sample_many([])) == []
    assert routes.submitted("asample") == []


def test_further_options_are_those_of_sample(sampler: SamplingClient, routes: TinkerRoutes) -> None:
    next(sampler.sample_many(prompts(1), topk_sample_logprobs=3, on_error="yield"))
    assert routes.submitted("asample")[0]["topk_sample_logprobs"] == 3


def test_nothing_is_taken_before_a_result_is_requested(sampler: SamplingClient) -> None:
    source = Counted()
    sampler.sample_many(source).close()
    assert source.taken == 0


def test_results_arrive_in_order_of_completion(sampler: SamplingClient, held: Held) -> None:
    held.finish(2)
    stream = sampler.sample_many(prompts(3), max_in_flight=3)
    assert next(stream).index == 2
    held.finish(0)
    assert next(stream).index == 0
    held.finish(1)
    assert [one.index for one in stream] == [1]


def test_no_more_samples_are_in_flight_than_allowed(
    server: ScriptedServer, sampler: SamplingClient, held: Held
) -> None:
    source = Counted()
    stream = sampler.sample_many(source, max_in_flight=3)
    held.finish(0)
    next(stream)
    assert source.taken == 3
    held.finish(1)
    next(stream)
    assert source.taken == 4
    stream.close()


def test_the_window_of_input_order_is_bounded(sampler: SamplingClient, held: Held) -> None:
    source = Counted()
    stream = sampler.sample_many(source, max_in_flight=2, order="input")
    window = 2 * sample_stream.WINDOW
    held.finish(*range(1, 99))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, stream)
        # All but the first sample of the window are done; one more prompt may have been taken.
        wait_until(lambda: source.taken == window + 1, "the window is full")
        assert not first.done()
        held.finish(0)
        assert first.result(PATIENCE_S).index == 0
        assert [next(stream).index for _ in range(window)] == list(range(1, window + 1))
    stream.close()


def test_closing_a_stream_cancels_its_samples_and_takes_no_more_prompts(
    scripted: ServiceClient, sampler: SamplingClient, held: Held
) -> None:
    source = Counted()
    with sampler.sample_many(source, max_in_flight=3) as stream:
        held.finish(1)
        next(stream)
        assert len(scripted.inflight()) == 2
    assert scripted.inflight() == []
    assert source.taken == 3
    assert list(stream) == []
    stream.close()


def test_leaving_the_loop_cancels(
    scripted: ServiceClient, sampler: SamplingClient, held: Held
) -> None:
    held.finish(1)
    for one in sampler.sample_many(Counted(), max_in_flight=3):
        assert one.index == 1
        break
    assert scripted.inflight() == []


def test_a_stream_collected_inside_our_code_is_cancelled_later(
    sampler: SamplingClient, held: Held
) -> None:
    """The garbage collector may run in a thread that holds a lock that cancelling takes."""
    poller = sampler._runtime.poller
    cycle: List[Any] = [sampler.sample_many(Counted(), max_in_flight=3)]
    cycle.append(cycle)
    held.finish(0)
    assert next(cycle[0]).index == 0
    held.finish(1)
    gc.collect()
    del cycle
    ours = {"__name__": "tinkex.any", "lock": poller._lock, "collect": gc.collect}
    race(lambda: exec("with lock: collect()", ours))
    held.finish(2)  # for the sample in the next line
    assert sampler.sample(prompt(2)).result(PATIENCE_S)
    wait_until(lambda: poller.inflight() == [], "the others are cancelled")


def test_a_long_wait_is_explained_in_the_log(
    server: ScriptedServer, routes: TinkerRoutes, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tinkex")
    with ServiceClient(base_url=server.url, notice_after_s=0.01) as client:
        sampler = client.create_sampling_client(base_model="base")

        def reported() -> int:
            return caplog.text.count("sample_many: still waiting for 2 samples; the oldest is ")

        with sampler.sample_many(prompts(2)) as stream, ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, stream)
            wait_until(
                lambda: reported() >= 2 and "sample: waiting for " in caplog.text,
                "the wait is explained again, once the server has the sample, too",
            )
            held.finish(0)
            assert first.result(PATIENCE_S).index == 0
    assert re.search(r"oldest is sample: waiting for \d+ s, request asample-", caplog.text)


def test_another_thread_may_close_the_stream(sampler: SamplingClient, held: Held) -> None:
    stream = sampler.sample_many(Counted(), max_in_flight=3)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, stream)
        wait_until(lambda: len(sampler._runtime.poller.inflight()) == 3, "three are in flight")
        stream.close()
        assert rest.result(PATIENCE_S) == []
    assert sampler._runtime.poller.inflight() == []


def test_an_interrupt_cancels(
    scripted: ServiceClient, sampler: SamplingClient, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Counted()
    stream = sampler.sample_many(source, max_in_flight=3)

    class Interrupted:
        def get(self, timeout: Optional[float] = None) -> int:
            raise KeyboardInterrupt

        def put(self, index: Optional[int]) -> None:
            pass

    stream._run._settled = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert source.taken == 3
    assert scripted.inflight() == []
    assert list(stream) == []


def test_an_interrupted_call_leaves_nothing_behind(
    server: ScriptedServer, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceClient(base_url=server.url, budget=Budget(tokens=100)) as client:
        sampler = client.create_sampling_client(
            base_model="base", retry_config=RetryConfig(max_connections=1)
        )

        def interrupted(*work: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PendingSample, "sampler_id", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(sampler.sample_many(prompts(3), PARAMS))
        assert client.inflight() == []
        assert client.usage().reserved == (0, 0, 0)
        assert len(list(sampler.sample_many(prompts(3), PARAMS))) == 3  # its slot is free


def test_a_stream_in_the_child_of_a_fork(
    sampler: SamplingClient, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = sampler.sample_many(prompts(2), max_in_flight=2)
    held.finish(0)
    assert next(stream).index == 0
    parent = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(ClientClosedError, match="parent process of a fork"):
            next(stream)
        stream.close()
    held.finish(1)
    assert [one.index for one in stream] == [1]


def test_threads_can_share_a_stream(service: ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="deterministic")
    stream = sampler.sample_many(prompts(40), PARAMS, max_in_flight=8)
    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(lambda _: [one.index for one in stream], range(4)))
    assert sorted(itertools.chain(*shares)) == list(range(40))


def test_prompts_whose_iterator_fails(scripted: ServiceClient, sampler: SamplingClient) -> None:
    def broken() -> Iterator[types.ModelInput]:
        yield prompt(0)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(sampler.sample_many(broken()))
    assert scripted.inflight() == []


# Failures


def test_a_failure_raises_and_names_the_prompt(
    scripted: ServiceClient, sampler: SamplingClient, held: Held
) -> None:
    held.failing = {1}
    held.finish(1)
    source = Counted()
    with pytest.raises(RequestFailedError, match="prompt 1 of sample_many"):
        list(sampler.sample_many(source, max_in_flight=3))
    assert source.taken == 3
    assert scripted.inflight() == []


def test_failures_can_be_yielded(sampler: SamplingClient, held: Held) -> None:
    held.failing = {1}
    held.finish(*range(3))
    bad = [prompt(0), prompt(1), "no tokens"]
    found = list(sampler.sample_many(bad, order="input", on_error="yield"))  # type: ignore[arg-type]
    assert [one.index for one in found] == [0, 1, 2]
    assert found[0].error is None
    assert isinstance(found[1].error, RequestFailedError)
    assert isinstance(found[2].error, InvalidInputError)
    assert [one.response is None for one in found] == [False, True, True]


@pytest.mark.parametrize("order", ["completion", "input"])
def test_failures_can_be_skipped_with_a_warning(
    sampler: SamplingClient, held: Held, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    held.failing = {0, 2}
    held.finish(*range(4))
    found = list(sampler.sample_many(prompts(4), order=order, on_error="skip"))
    assert sorted(one.index for one in found) == [1, 3]
    reported = [r.getMessage() for r in caplog.records if "were skipped" in r.getMessage()]
    assert len(reported) == 1
    assert "2 of 4 prompts failed" in reported[0]


def test_a_sample_cancelled_from_outside(
    scripted: ServiceClient, sampler: SamplingClient, held: Held
) -> None:
    held.finish(0)
    stream = sampler.sample_many(prompts(2), on_error="yield")
    assert next(stream).index == 0
    (left,) = scripted.inflight()
    left.cancel()
    assert isinstance(next(stream).error, CancelledError)


def test_closing_the_client_ends_the_stream(
    scripted: ServiceClient, sampler: SamplingClient, held: Held
) -> None:
    held.finish(0)
    stream = sampler.sample_many(Counted(), max_in_flight=2, on_error="skip")
    next(stream)
    scripted.close()
    with pytest.raises(ClientClosedError):
        next(stream)
    with pytest.raises(ClientClosedError):
        sampler.sample_many([])


@pytest.mark.parametrize(
    "bad",
    [
        {"max_in_flight": 0},
        {"max_in_flight": 2.5},
        {"order": "random"},
        {"on_error": "ignore"},
        {"progress": "bar"},
        {"prompts": prompt(0)},
        {"prompts": 7},
    ],
    ids=str,
)
def test_bad_arguments(sampler: SamplingClient, bad: Any) -> None:
    with pytest.raises(InvalidInputError):
        sampler.sample_many(**{"prompts": [], **bad})


# Limits of the client


def test_a_budget_paces_and_then_ends_the_stream(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    # A prompt has 2 tokens, and reserves 2 more; one is sampled.
    with ServiceClient(base_url=server.url, budget=Budget(tokens=13)) as client:
        sampler = client.create_sampling_client(base_model="base")
        stream = sampler.sample_many(Counted(), PARAMS, max_in_flight=50, on_error="skip")
        found: List[int] = []
        with pytest.raises(BudgetExceededError) as caught:
            found.extend(one.index for one in stream)
        assert sorted(found) == [0, 1, 2, 3]
        assert caught.value.used == 12
        assert len(routes.submitted("asample")) == 4


@pytest.mark.parametrize("policy", ["wait", "raise"])
def test_unread_results_do_not_block_the_stream(
    server: ScriptedServer, routes: TinkerRoutes, policy: str
) -> None:
    with ServiceClient(base_url=server.url, max_unread=2, on_backpressure=policy) as client:
        sampler = client.create_sampling_client(base_model="base")
        found = list(sampler.sample_many(prompts(9), max_in_flight=50))
        assert sorted(one.index for one in found) == list(range(9))


def test_unread_results_of_other_calls_block_the_stream(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, max_unread=1, on_backpressure="raise") as client:
        sampler = client.create_sampling_client(base_model="base")
        mine = sampler.sample(prompt(0))
        with pytest.raises(BackpressureError):
            next(sampler.sample_many(prompts(1)))
        mine.result(PATIENCE_S)


# Progress


def test_progress_is_reported(sampler: SamplingClient, held: Held) -> None:
    held.failing = {1}
    held.finish(*range(3))
    reported: List[Tuple[int, int, Optional[int]]] = []
    for _ in sampler.sample_many(
        prompts(3), max_in_flight=1, on_error="skip", progress=lambda *what: reported.append(what)
    ):
        pass
    assert reported == [(1, 0, 3), (2, 1, 3), (3, 1, 3)]


def test_the_progress_function_may_close_the_stream(sampler: SamplingClient) -> None:
    def stop_after_two(done: int, failed: int, total: Optional[int]) -> None:
        if done == 2:
            stream.close()

    source = Counted()
    stream = sampler.sample_many(source, max_in_flight=3, progress=stop_after_two)
    assert len(drained(stream)) == 2
    assert source.taken <= 5
    assert sampler._runtime.poller.inflight() == []


def test_the_iterator_of_prompts_may_close_the_stream(
    sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    def three() -> Iterator[types.ModelInput]:
        yield from prompts(3)
        stream.close()
        yield prompt(3)

    stream = sampler.sample_many(three(), max_in_flight=1)
    assert len(drained(stream)) == 3
    assert len(routes.submitted("asample")) == 3


def drained(stream: SampleStream) -> List[Sampled]:
    """Return the rest of *stream*; fail if it hangs."""
    (found,) = race(lambda: list(stream))
    assert isinstance(found, list)
    return found


def test_the_total_of_a_generator_is_unknown(sampler: SamplingClient) -> None:
    reported: List[Tuple[int, int, Optional[int]]] = []
    source = (one for one in prompts(1))
    list(sampler.sample_many(source, progress=lambda *what: reported.append(what)))
    assert reported == [(1, 0, None)]


def test_the_progress_bar_is_shown_on_terminals_only(
    sampler: SamplingClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(sampler.sample_many(prompts(3), progress=True))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    list(sampler.sample_many(prompts(3), progress=True))
    assert "3/3" in capsys.readouterr().err
