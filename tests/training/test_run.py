"""TrainingRun and its RunQueue: sequence numbers on each kind of server."""

from __future__ import annotations

import functools
import itertools
import pickle
import threading
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import pytest
from servers.profiles import NAMES, ProfiledServer
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import API, MODEL, RESULTS, TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex._api import _call
from tinkex._training import requests
from tinkex._training.batch import Loss
from tinkex._training.requests import EndpointRequest
from tinkex.errors import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    BadRequestError,
    CredentialError,
    InternalServerError,
    NotFoundError,
    RequestFailedError,
    ResponseDecodeError,
    ResultExpiredError,
    SequenceLostError,
    TinkexError,
)
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.retry import RetryPolicy
from tinkex.wire.codec import codec_for
from tinkex.wire.json_codec import JSON

ADAM = types.AdamParams(learning_rate=0.01)
NO_ANSWER = Answer(drop=True)
PATH = f"tinker://{MODEL}/weights/a"


def datum(seed: int = 0, length: int = 8) -> types.Datum:
    tokens = np.random.default_rng(seed).integers(1, 900, length + 1)
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": [1.0] * length},
    )


@pytest.fixture
def quick(server: ScriptedServer, routes: TinkerRoutes) -> Iterator[ServiceClient]:
    """A client that gives up on an outage soon."""
    with ServiceClient(base_url=server.url, max_outage_s=0.1) as client:
        yield client


@pytest.fixture
def trainer(quick: ServiceClient) -> TrainingClient:
    return quick.create_lora_training_client("base")


def numbers(server: ScriptedServer, routes: TinkerRoutes, since: int = 0) -> List[Tuple[str, int]]:
    """Return route and number of each training request, in order of arrival."""
    names = [r.path[len(API) :] for r in server.requests()]
    kept = [n for n in names if n in ("forward_backward", "optim_step") or "_weights" in n]
    return list(zip(kept, routes.seq_ids()))[since:]


class Strict:
    """Counts like TuFT: only the expected number runs, and only a success counts.

    Passes with the loss "bad" fail.  *swallow*: execute this many requests and lose their
    responses.
    """

    def __init__(self, routes: TinkerRoutes) -> None:
        self.expected = 1
        self.ran: List[str] = []
        self.swallow = 0
        self._routes = routes
        for route in ("forward_backward", "optim_step", "save_weights"):
            routes.serve(route, self.accept)

    def accept(self, received: Received) -> Answer:
        route = received.path[len(API) :]
        loss_fn, body = "", None
        if route == "forward_backward":
            codec = codec_for(received.headers["content-type"])
            request = codec.decode_forward_backward(received.body)
            seq_id, loss_fn = request.seq_id, request.loss_fn
            outputs = [{"logprobs": types.TensorData([-1.0] * 8, "float32")} for _ in request.data]
            body = JSON.encode_output(types.ForwardBackwardOutput(outputs, {}, "T"))
        else:
            seq_id, body = received.json()["seq_id"], RESULTS[route]
        if seq_id != self.expected:
            text = f"Future failed: Sequence conflict: expected {self.expected}, got {seq_id}."
            return self._routes.accepted(route, Answer(409, {"detail": text}))
        if loss_fn == "bad":
            return self._routes.accepted(route, Answer(422, {"detail": "Future failed: bad loss"}))
        self.expected += 1
        self.ran.append(route)
        if self.swallow > 0:
            self.swallow -= 1
            return Answer(drop=True)
        return self._routes.accepted(route, Answer(body=body))


# Servers that do not count what failed


def test_the_request_after_a_failed_one_reuses_its_seq_id(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    strict = Strict(routes)
    with pytest.raises(RequestFailedError, match="bad loss"):
        trainer.forward_backward([datum()], "bad").result(PATIENCE_S)
    trainer.optim_step(ADAM).result(PATIENCE_S)
    trainer.save_state("a").result(PATIENCE_S)
    assert strict.ran == ["optim_step", "save_weights"]
    assert numbers(server, routes) == [
        ("forward_backward", 1),
        ("optim_step", 2),  # refused: expected 1
        ("optim_step", 1),
        ("save_weights", 2),
    ]


def test_all_requests_in_flight_after_a_failure_are_executed_once_and_in_order(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    strict = Strict(routes)
    release = threading.Event()
    real = routes.retrieve

    def held(received: Received) -> Answer:
        assert release.wait(PATIENCE_S)
        return real(received)

    routes.serve("retrieve_future", held)
    good = [trainer.forward_backward([datum()], "cross_entropy")]
    bad = [trainer.forward_backward([datum()], "bad")]
    good += [trainer.optim_step(ADAM), trainer.forward_backward([datum(1)], "cross_entropy")]
    bad += [trainer.forward_backward([datum()], "bad")]
    good += [trainer.optim_step(ADAM), trainer.save_state("a")]
    server.wait_for(f"POST {API}save_weights", 1)  # all are in flight before a failure is noticed
    release.set()
    for future in good:
        future.result(PATIENCE_S)
    for failed in bad:
        with pytest.raises(RequestFailedError, match="bad loss"):
            failed.result(PATIENCE_S)
    assert strict.ran == [
        "forward_backward",
        "optim_step",
        "forward_backward",
        "optim_step",
        "save_weights",
    ]
    assert trainer.optim_step(ADAM).result(PATIENCE_S)
    assert strict.expected == 7


def test_a_refused_request_that_was_cancelled_is_not_sent_again(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    strict = Strict(routes)
    polled, release = threading.Event(), threading.Event()
    real = routes.retrieve

    def held(received: Received) -> Answer:
        polled.set()
        assert release.wait(PATIENCE_S)
        return real(received)

    with pytest.raises(RequestFailedError):
        trainer.forward_backward([datum()], "bad").result(PATIENCE_S)
    routes.serve("retrieve_future", held)
    step, save = trainer.optim_step(ADAM), trainer.save_state("a")
    server.wait_for(f"POST {API}save_weights", 1)
    assert polled.wait(PATIENCE_S)
    save.cancel()
    release.set()
    step.result(PATIENCE_S)
    trainer.forward_backward([datum()], "cross_entropy").result(PATIENCE_S)
    assert strict.ran == ["optim_step", "forward_backward"]


def test_a_waiting_task_of_the_lane_does_not_prevent_resending(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    # Like a custom loss; a plain wait in the lane's thread would wait for itself.
    strict = Strict(routes)
    run = trainer._run
    bad = trainer.forward_backward([datum()], "bad")
    future = run.queue(
        "waiting task",
        lambda waiting: waiting.try_set_result(
            run.run_pass("forward_backward", [datum()], Loss("cross_entropy"))
        ),
    )
    assert len(future.result(PATIENCE_S).loss_fn_outputs) == 1
    assert isinstance(bad.exception(PATIENCE_S), RequestFailedError)
    assert strict.ran == ["forward_backward"]


def test_a_result_lost_with_its_response_is_reported_and_the_run_continues(
    scripted: ServiceClient, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkex.retry.RetryPolicy.delay_s", lambda *args: 0.001)
    trainer = scripted.create_lora_training_client("base")
    strict = Strict(routes)
    strict.swallow = 1  # the step is executed and its answer lost; the retry has a number too many
    with pytest.raises(ResultExpiredError, match="was done") as caught:
        trainer.optim_step(ADAM).result(PATIENCE_S)
    assert "Do not repeat it" in str(caught.value)
    trainer.save_state("a").result(PATIENCE_S)
    assert strict.ran == ["optim_step", "save_weights"]


def test_nothing_is_resent_to_a_server_that_forgot_the_run(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    strict = Strict(routes)
    trainer.optim_step(ADAM).result(PATIENCE_S)
    trainer.save_state("a").result(PATIENCE_S)
    strict.expected = 1
    with pytest.raises(SequenceLostError, match="expects request 1") as caught:
        trainer.optim_step(ADAM).result(PATIENCE_S)
    assert f"create_training_client_from_state_with_optimizer({PATH!r})" in str(caught.value)
    assert numbers(server, routes, 2) == [("optim_step", 3)]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.session_id) == (str(caught.value), "session-1")
    assert isinstance(caught.value.__cause__, RequestFailedError)


def test_a_server_that_never_agrees_is_not_retried_forever(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    def refuse(received: Received) -> Answer:
        seq_id = received.json()["seq_id"]
        text = f"Sequence conflict: expected {seq_id - 1}, got {seq_id}."
        return routes.accepted("optim_step", Answer(409, {"detail": text}))

    trainer.save_state("a").result(PATIENCE_S)
    routes.serve("save_weights", Answer(400, {"detail": "no"}))
    for _ in range(3):
        assert isinstance(trainer.save_state("b").exception(PATIENCE_S), BadRequestError)
    routes.serve("optim_step", refuse)
    with pytest.raises(SequenceLostError):
        trainer.optim_step(ADAM).result(PATIENCE_S)
    assert numbers(server, routes, 4) == [("optim_step", n) for n in (5, 4, 3, 2)]


def test_any_other_409_is_an_ordinary_failure(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    taken = Answer(409, {"detail": "expected 20 tensors, got 21"})
    routes.serve("save_weights", lambda received: routes.accepted("save_weights", taken))
    with pytest.raises(RequestFailedError, match="20 tensors"):
        trainer.save_state("a").result(PATIENCE_S)
    assert len(routes.submitted("save_weights")) == 1


@pytest.mark.parametrize("profile", NAMES)
def test_bad_input_never_loses_the_run(profile: str) -> None:
    engine = DeterministicEngine(vocab_size=1000, context_length=64)
    with ProfiledServer(engine, profile=profile) as local:
        with ServiceClient(base_url=local.url, api_key="tml-key") as service:
            trainer = service.create_lora_training_client("deterministic", rank=4)
            good = [trainer.forward_backward([datum()], "cross_entropy")]
            bad = trainer.forward_backward([datum()], "no such loss")
            good += [trainer.optim_step(ADAM), trainer.forward_backward([datum()], "cross_entropy")]
            results: List[Any] = [future.result(PATIENCE_S) for future in good]
            assert isinstance(bad.exception(PATIENCE_S), TinkexError)
            step = trainer.train_step([datum()], "cross_entropy", ADAM)
            # One step was executed between the first two passes, none between the last two.
            losses = [r.metrics["loss:sum"] for r in (results[0], results[2])]
            assert losses[1] < losses[0]
            assert step.forward_backward.metrics["loss:sum"] == losses[1]


# Answers that were lost


class FirstBodyWins:
    """Identifies a request by its number alone, like hatchery-core; loses the first answer.

    The client gets *lost* in its place.
    """

    def __init__(self, routes: TinkerRoutes, lost: Answer) -> None:
        self._routes = routes
        self._lost = lost
        self._ids: Dict[int, Answer] = {}
        self.ran: List[str] = []
        for route in ("optim_step", "save_weights"):
            routes.serve(route, self.accept)

    def accept(self, received: Received) -> Answer:
        route, seq_id = received.path[len(API) :], received.json()["seq_id"]
        lost = not self._ids
        if seq_id not in self._ids:
            self.ran.append(route)
            self._ids[seq_id] = self._routes.accepted(route, Answer(body=RESULTS[route]))
        return self._lost if lost else self._ids[seq_id]


def lose_answers(trainer: TrainingClient, routes: TinkerRoutes) -> APIConnectionError:
    """Send a step whose answers are all lost."""
    routes.serve("optim_step", NO_ANSWER)
    error = trainer.optim_step(ADAM).exception(PATIENCE_S)
    assert isinstance(error, APIConnectionError)
    assert error.maybe_taken
    return error


def test_the_same_call_again_is_the_same_request(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    assert "The same call again is executed only once" in str(lose_answers(trainer, routes))
    routes.serve("optim_step", routes.accept)
    trainer.optim_step(ADAM).result(PATIENCE_S)
    trainer.save_state("a").result(PATIENCE_S)
    sent = server.requests(f"POST {API}optim_step")
    assert len({r.body for r in sent}) == len({r.headers["x-idempotency-key"] for r in sent}) == 1
    assert routes.seq_ids()[-2:] == [1, 2]


def test_another_call_first_resends_the_lost_request(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    lose_answers(trainer, routes)
    lost = len(routes.seq_ids())
    routes.serve("optim_step", routes.accept)
    assert trainer.save_state("a").result(PATIENCE_S).path == PATH
    assert numbers(server, routes, lost) == [("optim_step", 1), ("save_weights", 2)]
    assert len({r.body for r in server.requests(f"POST {API}optim_step")}) == 1


@pytest.mark.parametrize("status", [None, 500, 502, 503, 504, 520])
def test_the_response_to_another_body_is_not_accepted(
    trainer: TrainingClient, routes: TinkerRoutes, status: Optional[int]
) -> None:
    # The gateway answered with an error after the server had accepted the request.
    lost = NO_ANSWER if status is None else Answer(status, b"", content_type="text/html")
    first = FirstBodyWins(routes, lost)
    error = trainer.optim_step(ADAM).exception(PATIENCE_S)
    assert isinstance(error, APIError)
    assert error.maybe_taken
    assert "The same call again is executed only once" in str(error)
    assert trainer.save_state("a").result(PATIENCE_S).path == PATH
    assert first.ran == ["optim_step", "save_weights"]


def test_a_request_that_breaks_the_server_does_not_block_the_run(
    trainer: TrainingClient,
    server: ScriptedServer,
    routes: TinkerRoutes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    routes.serve("optim_step", Answer(500, {"detail": "it breaks the server"}))
    assert isinstance(trainer.optim_step(ADAM).exception(PATIENCE_S), InternalServerError)
    assert trainer.save_state("a").result(PATIENCE_S).path == PATH
    # A pass without effect uses up number 1, whether or not the step was executed.
    (filler,) = routes.submitted("forward_backward")
    assert filler.forward_only
    assert filler.seq_id == 1
    assert routes.submitted("save_weights")[0]["seq_id"] == 2
    assert "seq_id 1. The request is abandoned" in caplog.text


def test_a_seq_id_that_cannot_be_filled_blocks_the_run(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    for route in ("optim_step", "forward_backward", "forward"):
        routes.serve(route, Answer(500, {"detail": "out of order"}))
    trainer.optim_step(ADAM).exception(PATIENCE_S)
    with pytest.raises(InternalServerError, match=r"optim_step, seq_id 1 .* response was lost"):
        trainer.save_state("a").result(PATIENCE_S)
    assert routes.submitted("save_weights") == []
    routes.serve("optim_step", routes.accept)
    trainer.save_state("a").result(PATIENCE_S)
    assert routes.submitted("save_weights")[0]["seq_id"] == 2


def test_nothing_overtakes_a_request_that_may_have_been_executed(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    lose_answers(trainer, routes)
    error = trainer.save_state("a").exception(PATIENCE_S)
    assert isinstance(error, APIConnectionError)
    assert "POST /api/v1/optim_step, seq_id 1" in str(error)
    assert routes.submitted("save_weights") == []
    routes.serve("optim_step", routes.accept)
    trainer.save_state("a").result(PATIENCE_S)
    assert routes.seq_ids()[-2:] == [1, 2]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (Answer(409, {"detail": "number 1 was used"}), 2),  # it had been executed
        (Answer(422, {"detail": "what is this"}), 2),  # read, and finally refused
        (Answer(413, {"detail": "too large"}), 1),  # not accepted, and never will be
        (Answer(500, {"detail": "it breaks the server"}), 2),  # given up, and its number filled
    ],
)
def test_the_response_to_the_lost_request_decides_on_its_seq_id(
    trainer: TrainingClient, routes: TinkerRoutes, answer: Answer, number: int
) -> None:
    lose_answers(trainer, routes)
    routes.serve("optim_step", answer)
    trainer.save_state("a").result(PATIENCE_S)
    assert routes.seq_ids()[-1] == number


def test_a_repeated_call_whose_seq_id_was_used_is_not_executed_twice(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    lose_answers(trainer, routes)
    sent = len(routes.submitted("optim_step"))
    routes.serve("optim_step", Answer(409, {"detail": "number 1 was used"}))
    with pytest.raises(ResultExpiredError, match="was done"):
        trainer.optim_step(ADAM).result(PATIENCE_S)
    assert len(routes.submitted("optim_step")) == sent + 1
    trainer.save_state("a").result(PATIENCE_S)
    assert routes.seq_ids()[-1] == 2


@pytest.mark.parametrize(
    ("answer", "error", "number"),
    [
        (Answer(400, {"detail": "no"}), BadRequestError, 2),  # read, so used up
        (Answer(401, {"detail": "no"}), AuthenticationError, 1),  # turned away unread
        (Answer(501, {"detail": "no such thing"}), InternalServerError, 1),
    ],
)
def test_a_request_uses_its_seq_id_if_the_server_has_read_it(
    trainer: TrainingClient, routes: TinkerRoutes, answer: Answer, error: Any, number: int
) -> None:
    routes.serve("optim_step", answer)
    assert isinstance(trainer.optim_step(ADAM).exception(PATIENCE_S), error)
    trainer.save_state("a").result(PATIENCE_S)
    assert routes.seq_ids()[-1] == number


def test_a_request_that_cannot_be_sent_uses_no_seq_id(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    class Unsendable(EndpointRequest[Any]):
        def send(self, channel: Any = None) -> types.UntypedFuture:
            raise CredentialError("the credential command failed")

    future = trainer._run.submit("optim_step", Unsendable, {})
    assert isinstance(future.exception(PATIENCE_S), CredentialError)
    trainer.save_state("a").result(PATIENCE_S)
    assert routes.seq_ids() == [1]


def test_an_unreadable_response_uses_the_seq_id(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve("optim_step", Answer(body={"what": "is this"}))
    assert isinstance(trainer.optim_step(ADAM).exception(PATIENCE_S), ResponseDecodeError)
    trainer.save_state("a").result(PATIENCE_S)
    assert routes.seq_ids() == [1, 2]


def test_a_server_that_was_never_reached_has_executed_nothing(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    with ServiceClient(base_url=server.url, max_outage_s=0.1) as service:
        trainer = service.create_lora_training_client("base")
        service._runtime.transport.drop_idle()
        server.close()
        error = trainer.optim_step(ADAM).exception(PATIENCE_S)
    assert isinstance(error, APIConnectionError)
    assert not error.maybe_taken


def test_a_request_without_a_seq_id_waits_for_all_earlier_ones(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    strict = Strict(routes)
    routes.serve("unload_model", lambda received: routes.accepted("unload_model", Answer(body={})))
    trainer.forward_backward([datum()], "bad")
    trainer.optim_step(ADAM)
    trainer.unload().result(PATIENCE_S)
    assert strict.ran == ["optim_step"]
    work = [r.path[len(API) :] for r in server.requests()]
    assert [w for w in work if w in ("optim_step", "unload_model")] == [
        "optim_step",
        "optim_step",
        "unload_model",
    ]


@pytest.mark.parametrize("status", [404, 409, 410])
def test_an_unload_whose_response_was_lost_counts_as_done(
    server: ScriptedServer,
    routes: TinkerRoutes,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_call, "RetryPolicy", functools.partial(RetryPolicy, base_s=0.002))
    answers = iter([Answer(drop=True), Answer(status, {"detail": f"{MODEL} was unloaded"})])
    routes.serve("unload_model", lambda received: next(answers))
    with ServiceClient(base_url=server.url) as service:
        trainer = service.create_lora_training_client("base")
        assert trainer.unload().result(PATIENCE_S) == types.UnloadModelResponse(MODEL)


def test_an_unload_that_is_refused_at_first_fails(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve("unload_model", lambda received: Answer(404, {"detail": f"no model {MODEL}"}))
    with pytest.raises(NotFoundError, match=MODEL):
        trainer.unload().result(PATIENCE_S)


# Errors that repeat


def test_the_error_about_a_repeated_5xx_names_the_broken_route(
    trainer: TrainingClient, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkex.retry.RetryPolicy.delay_s", lambda *args: 0.001)
    routes.serve("optim_step", Answer(500, b"Internal Server Error", content_type="text/plain"))
    error = trainer.optim_step(ADAM).exception(PATIENCE_S)
    assert isinstance(error, InternalServerError)
    assert "POST /api/v1/optim_step returned 500: Internal Server Error" in str(error)
    assert "the same error 4 times: its route POST /api/v1/optim_step is broken" in str(error)
    routes.serve("optim_step", *[Answer(500, {"detail": text}) for text in "abcd"])
    assert "broken" not in str(trainer.optim_step(ADAM).exception(PATIENCE_S))


def test_the_error_about_a_poll_that_keeps_breaking_names_its_route(
    trainer: TrainingClient, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkex.retry.RetryPolicy.delay_s", lambda *args: 0.001)
    routes.serve("retrieve_future", Answer(500, {"detail": "out of order"}))
    error = trainer.optim_step(ADAM).exception(PATIENCE_S)
    assert "out of order" in str(error)
    assert "its route POST /api/v1/retrieve_future is broken" in str(error)


def test_a_repeated_unnamed_save_keeps_its_sampling_session_seq_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: List[Any] = []
    monkeypatch.setattr(requests, "submit", lambda *args, **fields: sent.append(fields))
    queue: Any = SimpleNamespace(transport=None, model_id="m", runtime=SimpleNamespace())
    queue.runtime.session = SimpleNamespace(next_sampler_seq_id=itertools.count(4).__next__)
    future: Any = SimpleNamespace(kind="save_weights_and_get_sampling_client")
    request = requests.SaveAndSample(queue, future, {"kind": "snapshot"}, str)
    for seq_id in (7, 8):
        request.seq_id = seq_id
        request.send()
    assert [(fields["seq_id"], fields["sampling_session_seq_id"]) for fields in sent] == [
        (7, 4),
        (8, 4),
    ]
