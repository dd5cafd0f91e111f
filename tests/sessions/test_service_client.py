"""ServiceClient and its session: creation, loss, children, close and collection."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import warnings
import weakref
from concurrent.futures import Future, wait
from typing import Any, Callable, Iterator, List

import pytest
from sessions.fakes import FakeNetwork
from support.scripted_server import PATIENCE_S, Answer
from support.session_server import BEAT, CREATE, POLL, SessionServer
from support.threads import promptly, race, wait_until

import tinkex
from tinkex import ServiceClient, errors, types
from tinkex._sessions import manager as session_manager_module, session
from tinkex._sessions.manager import SessionManager
from tinkex._transport.limits import MAX_AFTER_429
from tinkex._transport.server_state import state_of
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    ClientClosedError,
    InvalidInputError,
    NotFoundError,
    SessionLostError,
)

Connect = Callable[..., ServiceClient]

PROMPT = types.ModelInput.from_ints([1, 2, 3])
CREATE_MODEL = "POST /api/v1/create_model"
LOAD = "POST /api/v1/load_weights"


@pytest.fixture
def hold(server: SessionServer) -> Iterator[threading.Event]:
    """An event; the results of the server's work are held until it is set."""
    event = threading.Event()
    server.serve_work(event)
    yield event
    event.set()


def tinkex_threads() -> List[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tinkex-")]


# 14: lost sessions


def test_a_lost_session_does_not_fail_work_by_itself(
    server: SessionServer, connect: Connect
) -> None:
    server.serve_work()
    service = connect()
    sampler = service.create_sampling_client(base_model="m")
    server.wait_for(BEAT)
    server.on(BEAT, Answer(410))
    lost = service._runtime.session.manager.lost_reason
    wait_until(lambda: lost("s0") is not None, "the session is known to be gone")
    assert sampler.sample(PROMPT).result(PATIENCE_S).sequences[0].tokens == [7]  # the server


def test_failed_work_names_the_lost_session_and_how_to_resume(
    server: SessionServer, connect: Connect
) -> None:
    server.serve_work()
    service = connect()
    trainer = service.create_lora_training_client("m")
    sampler = service.create_sampling_client(base_model="m")
    path = "tinker://s0:train:0/weights/a"
    server.on("POST /api/v1/save_weights", Answer(body={"request_id": "save"}))
    server.on(POLL, Answer(body={"path": path}))
    trainer.save_state("a").result(PATIENCE_S)
    server.wait_for(BEAT)
    server.on(BEAT, Answer(410))
    lost = service._runtime.session.manager.lost_reason
    wait_until(lambda: lost("s0") is not None, "the session is known to be gone")
    server.on("POST /api/v1/asample", Answer(410, {"detail": "session s0 has expired"}))
    with pytest.raises(SessionLostError) as caught:
        sampler.sample(PROMPT).result(PATIENCE_S)
    error = caught.value
    year = time.strftime("%Y-")
    assert f"session s0 was lost (the server ended it or let it expire, at {year}" in str(error)
    assert "session s0 has expired" in str(error)  # the server's own words
    assert path in str(error.hint)
    assert "create_training_client_from_state_with_optimizer" in str(error.hint)
    assert error.status == 410
    assert isinstance(error.__cause__, errors.APIStatusError)


def test_without_a_checkpoint_the_error_says_so(server: SessionServer, connect: Connect) -> None:
    server.serve_work()
    service = connect()
    sampler = service.create_sampling_client(base_model="m")
    server.on(BEAT, Answer(410))
    lost = service._runtime.session.manager.lost_reason
    wait_until(lambda: lost("s0") is not None, "the session is known to be gone")
    server.on("POST /api/v1/asample", Answer(404, {"detail": "no such session"}))
    with pytest.raises(SessionLostError, match="No checkpoint was saved"):
        sampler.sample(PROMPT).result(PATIENCE_S)


def test_a_lost_session_of_another_process_needs_a_new_sampler_from_there(
    server: SessionServer, connect: Connect
) -> None:
    server.serve_work()
    service = connect()
    handle = service.create_sampling_client(base_model="m").get_sampler_handle()
    service.close()
    sampler = tinkex.SamplingClient.from_sampler_handle(handle)
    server.on(BEAT, Answer(410))
    server.on("POST /api/v1/asample", Answer(410, {"detail": "session s0 is finished"}))
    try:
        with pytest.raises(SessionLostError, match="have that process make a new sampler") as lost:
            sampler.sample(PROMPT).result(PATIENCE_S)
        assert "checkpoint" not in str(lost.value.hint)
    finally:
        sampler._runtime.close()


def test_if_work_fails_before_the_next_heartbeat_the_server_is_asked_about_the_session(
    server: SessionServer,
) -> None:
    server.serve_work()
    with ServiceClient(base_url=server.url, api_key="tml-k", heartbeat_interval_s=600) as service:
        sampler = service.create_sampling_client(base_model="m")
        server.on(BEAT, Answer(404))  # the server was restarted
        server.on("POST /api/v1/asample", Answer(404, {"detail": "no such sampler"}))
        for _ in range(2):
            with pytest.raises(SessionLostError, match="no such sampler"):
                sampler.sample(PROMPT).result(PATIENCE_S)
        assert len(server.beats()) == 1


def test_a_session_lost_just_after_it_was_found_alive_is_reported(
    server: SessionServer,
) -> None:
    server.serve_work()
    with ServiceClient(base_url=server.url, api_key="tml-k", heartbeat_interval_s=600) as service:
        sampler = service.create_sampling_client(base_model="m")
        server.on("POST /api/v1/asample", Answer(404, {"detail": "no such sampler"}))
        with pytest.raises(NotFoundError):
            sampler.sample(PROMPT).result(PATIENCE_S)
        server.on(BEAT, Answer(404))
        with pytest.raises(SessionLostError):
            sampler.sample(PROMPT).result(PATIENCE_S)
        assert len(server.beats()) == 2


def test_if_a_gateway_responds_the_session_is_checked_again(
    server: SessionServer, short_backoff: None
) -> None:
    server.serve_work()
    answers = iter([Answer(504), Answer(404, b"<html/>", content_type="text/html"), Answer(404)])
    with ServiceClient(base_url=server.url, api_key="tml-k", heartbeat_interval_s=600) as service:
        sampler = service.create_sampling_client(base_model="m")
        server.on("POST /api/v1/asample", Answer(404, {"detail": "no such sampler"}))
        server.on(BEAT, lambda _: next(answers))
        with pytest.raises(SessionLostError):
            sampler.sample(PROMPT).result(PATIENCE_S)


@pytest.mark.parametrize("obstacle", ["a 402", "a back-off", "requests after a back-off"])
def test_failed_work_checks_the_session_without_delay(server: SessionServer, obstacle: str) -> None:
    with ServiceClient(base_url=server.url, heartbeat_interval_s=600, on_billing="wait") as service:
        limiter = state_of(service.config).limiter
        if obstacle == "a 402":
            server.on(BEAT, Answer(402))
        elif obstacle == "a back-off":
            limiter.back_off(2 * PATIENCE_S)
        else:
            limiter.back_off(0.0)
            for _ in range(MAX_AFTER_429):
                limiter.acquire(lambda _: None, lambda: False)
        error = errors.RequestFailedError("it failed")
        asking = service._runtime.session.explain  # type: ignore[union-attr]
        with promptly():
            assert race(lambda: asking(error)) == [error]
        assert len(server.beats()) == (0 if obstacle == "a back-off" else 1)


def test_many_failures_in_a_live_session_share_one_check(
    server: SessionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ALIVE_FOR_S", PATIENCE_S)
    monkeypatch.setattr(session, "_ROW_GAP_S", PATIENCE_S)
    with ServiceClient(base_url=server.url, heartbeat_interval_s=600) as service:
        error = errors.RequestFailedError("it failed")
        lived = service._runtime.session
        for _ in range(20):
            assert lived.explain(error) is error
        assert len(server.beats()) == session.ALIVE_IN_A_ROW
        monkeypatch.setattr(session, "ALIVE_FOR_S", 0.0)  # later
        server.on(BEAT, Answer(404))
        assert isinstance(lived.explain(error), SessionLostError)


def test_an_unresponsive_server_is_asked_only_now_and_then(
    server: SessionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ASK_TIMEOUT_S", 0.1)
    server.serve_work()
    with ServiceClient(base_url=server.url, api_key="tml-k", heartbeat_interval_s=600) as service:
        sampler = service.create_sampling_client(base_model="m")
        server.on("POST /api/v1/asample", Answer(404, {"detail": "no such sampler"}))
        server.on(BEAT, Answer(503))
        for _ in range(3):
            with pytest.raises(NotFoundError):
                sampler.sample(PROMPT).result(PATIENCE_S)
        assert len(server.beats()) == 1


def test_errors_of_a_live_session_stay_unchanged(server: SessionServer, connect: Connect) -> None:
    server.serve_work()
    sampler = connect().create_sampling_client(base_model="m")
    server.on("POST /api/v1/asample", Answer(404, {"detail": "no such sampler"}))
    with pytest.raises(NotFoundError, match="no such sampler"):
        sampler.sample(PROMPT).result(PATIENCE_S)


# 15: settings


def test_a_client_takes_a_config_or_keywords_and_not_both(server: SessionServer) -> None:
    config = Config(server.url, display_name="by config")
    with ServiceClient(config=config) as service:
        assert service.config is config
    with ServiceClient(base_url=server.url, display_name="by keyword") as service:
        assert service.config.display_name == "by keyword"
    names = [r.json()["display_name"] for r in server.requests(CREATE)]
    assert names == ["by config", "by keyword"]
    with pytest.raises(InvalidInputError, match="not both"):
        ServiceClient(config=config, base_url=server.url)
    assert server.created == 2


def test_the_environment_is_read_once(
    server: SessionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve_work()
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", "tml-first")
    with ServiceClient(heartbeat_interval_s=0.05) as service:
        monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("TINKER_API_KEY", "tml-second")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        sampler = service.create_sampling_client(base_model="m")
        sampler.sample(PROMPT).result(PATIENCE_S)
        server.wait_for(BEAT)
    assert {r.headers["x-api-key"] for r in server.requests()} == {"tml-first"}


def test_clients_with_different_configs_do_not_interfere(server: SessionServer) -> None:
    with SessionServer("t") as other:
        for each in (server, other):
            each.serve_work()
        first = ServiceClient(base_url=server.url, api_key="tml-a", heartbeat_interval_s=0.05)
        second = ServiceClient(base_url=other.url, api_key="tml-b", heartbeat_interval_s=0.05)
        with first, second:
            limiters = {state_of(c.config).limiter for c in (first, second)}
            assert len(limiters) == 2
            second.create_sampling_client(base_model="m").sample(PROMPT).result(PATIENCE_S)
            first.close()
            beats = len(other.beats())
            other.wait_for(BEAT, beats + 2)
        assert {r.headers["x-api-key"] for r in server.requests()} == {"tml-a"}
        assert {r.headers["x-api-key"] for r in other.requests()} == {"tml-b"}


# 16: construction


def test_constructing_blocks_until_the_session_exists(server: SessionServer) -> None:
    server.create_hold = threading.Event()
    made: List[ServiceClient] = []
    thread = threading.Thread(target=lambda: made.append(ServiceClient(base_url=server.url)))
    thread.start()
    server.wait_for(CREATE)
    assert made == []
    server.create_hold.set()
    thread.join(PATIENCE_S)
    with made[0] as service:
        assert service.session_id == "s0"


def test_a_failed_construction_leaves_nothing_behind(
    server: SessionServer, recwarn: pytest.WarningsRecorder
) -> None:
    server.on(CREATE, Answer(401, {"detail": "no such key"}))
    with pytest.raises(errors.AuthenticationError) as caught:
        ServiceClient(base_url=server.url)
    assert caught.value.hint
    wait_until(lambda: not tinkex_threads(), "its threads end")
    server.wait_until_idle()
    assert session_manager_module.default_manager().snapshot() == []
    del caught
    gc.collect()
    assert [str(w.message) for w in recwarn.list] == []


def test_the_error_about_an_absent_server_names_it(unused_port: int) -> None:
    with pytest.raises(APIConnectionError, match=rf"127\.0\.0\.1:{unused_port}.*refused"):
        ServiceClient(base_url=f"http://127.0.0.1:{unused_port}", startup_timeout_s=0.1)


def test_a_failure_after_the_session_was_created_ends_it(
    server: SessionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poller(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("tinkex._sessions.runtime.Poller", poller)
    with pytest.raises(MemoryError):
        ServiceClient(base_url=server.url)
    assert server.reasons() == ["interrupted"]


def test_all_clients_share_one_manager_unless_given_another(connect: Connect) -> None:
    clients = [connect() for _ in range(3)]
    assert {c._runtime.session.manager for c in clients} == {
        session_manager_module.default_manager()
    }
    # For a moment there may be two: a thread that hangs while it sends is replaced.
    wait_until(lambda: tinkex_threads().count("tinkex-heartbeat") == 1, "one heartbeat thread")
    network = FakeNetwork()
    with SessionManager(open_link=network.open) as manager:
        own = connect(manager=manager)
        assert own.session_id == "s0"
        assert network.created == 1
        own.close()
        assert network.finished == [("s0", "success", None)]


# 17: creators


def test_creators_block_and_have_future_variants(
    server: SessionServer, connect: Connect, hold: threading.Event
) -> None:
    service = connect()
    path = "tinker://s0:train:0/weights/a"
    futures: List[Future[Any]] = [
        service.create_lora_training_client_future("m"),
        service.create_training_client_from_state_future(path),
        service.create_training_client_from_state_with_optimizer_future(path),
    ]
    server.wait_for(POLL, 3)
    assert not any(future.done() for future in futures)
    assert set(service.inflight()) >= set(futures)
    hold.set()
    assert not wait(futures, timeout=10).not_done
    trainers = [future.result() for future in futures]
    trainers.append(service.create_lora_training_client("m"))
    trainers.append(service.create_training_client_from_state(path))
    trainers.append(service.create_training_client_from_state_with_optimizer(path))
    assert all(isinstance(t, tinkex.TrainingClient) for t in trainers)
    samplers = [
        service.create_sampling_client_future(base_model="m").result(PATIENCE_S),
        service.create_sampling_client("tinker://s0:train:0/sampler_weights/a"),
    ]
    assert all(isinstance(s, tinkex.SamplingClient) for s in samplers)
    assert isinstance(service.create_rest_client(), tinkex.RestClient)
    loads = [r.json()["optimizer"] for r in server.requests(LOAD)]
    assert sorted(loads) == [False, False, True, True]


def test_a_client_is_its_own_result(server: SessionServer, connect: Connect) -> None:
    server.serve_work()
    service = connect()
    trainer = service.create_lora_training_client("m")
    sampler = service.create_sampling_client(base_model="m")
    assert trainer.result() is trainer
    assert sampler.result(timeout=PATIENCE_S) is sampler
    rest = service.create_rest_client()
    assert rest.result() is rest


def test_server_capabilities(server: SessionServer, connect: Connect) -> None:
    models = [{"model_name": "m", "max_context_length": 64}]
    route = "GET /api/v1/get_server_capabilities"
    server.on(route, Answer(body={"supported_models": models}))
    assert connect().get_server_capabilities().supported_models[0].model_name == "m"


# 18, 19: checks and counters


def test_arguments_are_checked_before_any_request(
    server: SessionServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)  # a key would request flags first
    service = connect()
    calls: List[Callable[[], Any]] = [
        lambda: service.create_lora_training_client(""),
        lambda: service.create_lora_training_client("m", rank=0),
        lambda: service.create_lora_training_client(
            "m", train_mlp=False, train_attn=False, train_unembed=False
        ),
        lambda: service.create_training_client_from_state("weights/a"),
        lambda: service.create_training_client_from_state_with_optimizer("/tmp/weights"),
        lambda: service.create_sampling_client(),
        lambda: service.create_sampling_client("tinker://r/weights/a", base_model=""),
        lambda: service.create_sampling_client("not a path"),
        lambda: service.create_sampling_client(base_model=""),
        lambda: service.close("bored"),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError):
            call()
    assert {r.path for r in server.requests()} <= {CREATE.split()[1], BEAT.split()[1]}
    assert service._runtime.session.next_model_seq_id() == 0
    assert service._runtime.session.next_sampler_seq_id() == 0


def test_a_checkpoint_may_be_sampled_with_the_name_of_its_base_model(
    server: SessionServer, connect: Connect
) -> None:
    server.serve_work()
    connect().create_sampling_client("tinker://r/sampler_weights/a", base_model="m")
    (request,) = server.requests("POST /api/v1/create_sampling_session")
    assert request.json()["model_path"] == "tinker://r/sampler_weights/a"
    assert request.json()["base_model"] == "m"


def test_the_ttl_of_a_checkpoint_has_a_minimum(server: SessionServer, connect: Connect) -> None:
    server.serve_work()
    trainer = connect().create_lora_training_client("m")
    with pytest.raises(InvalidInputError, match="ttl"):
        trainer.save_state("a", ttl_seconds=0)
    assert server.requests("POST /api/v1/save_weights") == []


def test_sequence_ids_start_at_zero_and_are_used_up_even_by_failures(
    server: SessionServer, connect: Connect
) -> None:
    server.serve_work()
    service = connect()
    server.on(
        CREATE_MODEL,
        Answer(400, {"detail": "no such model"}),
        Answer(body={"request_id": "s0:train:1"}),
    )
    with pytest.raises(errors.BadRequestError):
        service.create_lora_training_client("typo")
    service.create_lora_training_client("m")
    service.create_training_client_from_state("tinker://s0:train:1/weights/a")
    bodies = [*server.requests(CREATE_MODEL), *server.requests(LOAD)]
    assert [r.json()["model_seq_id"] for r in bodies] == [0, 1, 2]
    for _ in range(2):
        service.create_sampling_client(base_model="m")
    samplers = server.requests("POST /api/v1/create_sampling_session")
    assert [r.json()["sampling_session_seq_id"] for r in samplers] == [0, 1]


def test_training_clients_share_the_count_of_samplers(
    server: SessionServer, connect: Connect
) -> None:
    server.serve_work()
    service = connect()
    trainer = service.create_lora_training_client("m")
    service.create_sampling_client(base_model="m")
    trainer.create_sampling_client("tinker://s0:train:0/sampler_weights/a")
    service.create_sampling_client(base_model="m")
    samplers = server.requests("POST /api/v1/create_sampling_session")
    assert [r.json()["sampling_session_seq_id"] for r in samplers] == [0, 1, 2]


def test_sequence_ids_are_unique_among_threads(connect: Connect) -> None:
    session = connect()._runtime.session
    numbers = race(*[lambda: [session.next_model_seq_id() for _ in range(500)]] * 8)
    assert sorted(n for each in numbers for n in each) == list(range(4000))


# 20: children


def test_children_are_tracked_weakly_and_close_without_the_others(
    server: SessionServer, connect: Connect
) -> None:
    server.serve_work()
    service = connect()
    kept, dropped = [service.create_lora_training_client("m") for _ in range(2)]
    gone = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert gone() is None
    sampler = service.create_sampling_client(base_model="m")
    kept.close()
    with pytest.raises(ClientClosedError, match="closed"):
        kept.get_info()
    assert sampler.sample(PROMPT).result(PATIENCE_S)
    with sampler:
        pass
    with pytest.raises(ClientClosedError, match="SamplingClient"):
        sampler.sample(PROMPT)
    assert service.create_sampling_client(base_model="m").sample(PROMPT).result(PATIENCE_S)
    server.wait_for(BEAT, len(server.beats()) + 2)
    assert server.reasons() == []


def test_a_client_whose_loading_fails_is_closed(
    server: SessionServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: List[Any] = []
    real = tinkex.TrainingClient.close
    monkeypatch.setattr(
        tinkex.TrainingClient, "close", lambda self: (closed.append(self.model_id), real(self))
    )
    server.serve_work()
    server.on("POST /api/v1/get_info", Answer(400, {"detail": "no facts"}))
    with pytest.raises(errors.BadRequestError, match="no facts"):
        connect().create_lora_training_client("m")
    assert closed == ["s0:train:0"]


def test_no_child_is_lost_when_its_creation_is_interrupted(
    server: SessionServer, connect: Connect, hold: threading.Event
) -> None:
    service = connect()
    future = service.create_lora_training_client_future("m")
    server.wait_for(POLL)
    service.close()
    with pytest.raises(ClientClosedError):
        future.result(PATIENCE_S)
    assert server.reasons() == ["success"]  # which frees the created objects


# 21: close


def test_close_resolves_futures_wakes_waiters_and_ends_the_session(
    server: SessionServer, connect: Connect, hold: threading.Event
) -> None:
    service = connect()
    sampler = service.create_sampling_client(base_model="m")
    trainer = service.create_lora_training_client_future("m")
    samples = [sampler.sample(PROMPT) for _ in range(5)]
    server.wait_for(POLL, 6)
    woken: List[Any] = []
    waiter = threading.Thread(target=lambda: woken.append(samples[0].exception(PATIENCE_S)))
    waiter.start()
    with promptly():
        done = service.close("errored", "enough", timeout_s=PATIENCE_S)
    assert isinstance(done, Future)
    assert done.result(0) is None
    waiter.join(PATIENCE_S)
    assert isinstance(woken[0], ClientClosedError)
    for future in [*samples, trainer]:
        assert isinstance(future.exception(0), ClientClosedError)
    assert service.inflight() == []
    assert server.reasons() == ["errored"]
    assert server.details() == ["enough"]
    wait_until(lambda: not tinkex_threads(), "every thread ends")
    hold.set()
    server.wait_until_idle()
    server.assert_ended_once()


def test_later_calls_name_the_closed_client(server: SessionServer, connect: Connect) -> None:
    server.serve_work()
    service = connect()
    trainer = service.create_lora_training_client("m")
    sampler = service.create_sampling_client(base_model="m")
    rest = service.create_rest_client()
    service.close()
    calls: List[Callable[[], Any]] = [
        lambda: service.create_lora_training_client("m"),
        lambda: service.create_training_client_from_state("tinker://r/weights/a"),
        lambda: service.create_sampling_client(base_model="m"),
        service.create_rest_client,
        service.get_server_capabilities,
        service.__enter__,
        lambda: trainer.optim_step(types.AdamParams()),
        lambda: trainer.save_state("a"),
        lambda: sampler.sample(PROMPT),
        lambda: rest.list_training_runs(),
    ]
    for call in calls:
        with pytest.raises(ClientClosedError, match="ServiceClient of session s0 was closed"):
            call()


def test_close_is_idempotent_and_safe_from_several_threads(
    server: SessionServer, connect: Connect
) -> None:
    for number in range(10):
        service = connect()
        assert race(*[service.close] * 4) != []
        service.close("errored")
        assert server.reasons(f"s{number}") == ["success"]


def test_close_is_bounded_when_the_server_hangs(
    server: SessionServer, connect: Connect, hold: threading.Event
) -> None:
    service = connect()
    sampler = service.create_sampling_client(base_model="m")
    sampler.sample(PROMPT)
    server.wait_for(POLL)
    server.finish_answer = Answer(hold=threading.Event())
    server.on(BEAT, Answer(hold=threading.Event()))
    with promptly():
        service.close(timeout_s=1)
    wait_until(lambda: not tinkex_threads(), "every thread ends")


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (None, "success", None),
        (Boom, "errored", "Boom"),
        (KeyboardInterrupt, "interrupted", "KeyboardInterrupt"),
        (SystemExit, "interrupted", "SystemExit"),
    ],
)
def test_a_with_block_reports_its_outcome(
    server: SessionServer, connect: Connect, error: Any, reason: str, detail: Any
) -> None:
    def work() -> None:
        with connect():
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert server.reasons() == [reason]
    assert server.details() == [detail]


def test_an_interrupted_close_can_be_finished(
    server: SessionServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = connect()
    manager = service._runtime.session.manager
    real = manager.stop_session

    def interrupted(*args: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manager, "stop_session", interrupted)
    with pytest.raises(KeyboardInterrupt):
        service.close()
    assert [s.session_id for s in manager.snapshot()] == ["s0"]
    monkeypatch.setattr(manager, "stop_session", real)
    service.close("interrupted")
    assert manager.snapshot() == []
    assert server.reasons() == ["interrupted"]


def test_closing_from_a_callback_of_the_client_itself(
    server: SessionServer, connect: Connect, hold: threading.Event
) -> None:
    service = connect()
    sampler = service.create_sampling_client(base_model="m")
    called = threading.Event()

    def close_too(future: Any) -> None:
        service.close("errored", timeout_s=PATIENCE_S)
        called.set()

    sampler.sample(PROMPT).add_done_callback(close_too)
    server.wait_for(POLL)
    with promptly():  # neither call waits for the other
        service.close(timeout_s=PATIENCE_S)
        assert called.wait(PATIENCE_S)
    assert server.reasons() == ["success"]


# 22, the part that needs no separate process


def test_a_forgotten_client_is_collected_and_warned_about(server: SessionServer) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        service = ServiceClient(base_url=server.url, heartbeat_interval_s=0.05)
        line = f"{os.path.abspath(__file__)}:{_line_above()}"
        gone = weakref.ref(service._runtime)
        server.wait_for(BEAT)
        del service
        gc.collect()
        assert gone() is None
    (warning,) = caught
    assert warning.category is ResourceWarning
    assert str(warning.message) == (
        f"unclosed ServiceClient of session s0, opened at {line}; "
        "use `with ServiceClient(...)` or close()"
    )
    assert server.wait_for_finish() == ["success"]
    assert server.details() == ["the client was dropped"]
    wait_until(lambda: not tinkex_threads(), "its threads end")
    server.assert_ended_once()


def test_a_dropped_client_ends_without_the_garbage_collector(
    server: SessionServer,
) -> None:
    server.serve_work()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        service = ServiceClient(base_url=server.url)
        sampler = service.create_sampling_client(base_model="m")
        sampler.sample(types.ModelInput.from_ints([1, 2, 3])).result()
        gone = weakref.ref(service._runtime)
        gc.collect()
        gc.disable()
        try:
            del service, sampler
            # A thread may still be busy settling the last future.
            wait_until(lambda: gone() is None, "nothing refers to it")
        finally:
            gc.enable()
    assert server.wait_for_finish() == ["success"]
    wait_until(lambda: not tinkex_threads(), "its threads end")


def test_a_closed_client_is_collected_silently(
    server: SessionServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    service = ServiceClient(base_url=server.url)
    service.close()
    gone = weakref.ref(service._runtime)
    del service
    gc.collect()  # a warning would be an error
    assert gone() is None
    assert [r for r in caplog.records if r.levelno > logging.INFO] == []


def _line_above() -> int:
    import inspect

    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno - 1
