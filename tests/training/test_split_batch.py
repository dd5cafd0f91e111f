"""A batch of several requests is added to the gradient as a unit, or the run refuses to step."""

from __future__ import annotations

import pickle
import threading
from typing import Any, Iterator, List

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import MODEL, TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex._training.batch import in_indices_of_batch
from tinkex.errors import (
    APIConnectionError,
    BadRequestError,
    ClientClosedError,
    IncompleteGradientError,
    InternalServerError,
    InvalidInputError,
    RequestFailedError,
)
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ClientFlags, ServerSettings
from tinkex.wire.codec import codec_for

ADAM = types.AdamParams(learning_rate=0.01)
PASS = "POST /api/v1/forward_backward"
STEP = "POST /api/v1/optim_step"


def datum(first: int = 1, length: int = 4) -> types.Datum:
    tokens = np.arange(first, first + length + 1)
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * length}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)


def batch(count: int = 6) -> List[types.Datum]:
    return [datum(10 * index + 1) for index in range(count)]


@pytest.fixture
def trainer(server: ScriptedServer, routes: TinkerRoutes) -> Iterator[TrainingClient]:
    """A run on a server that takes two datums per request."""
    routes.serve("client/config", Answer(body={"fwdbwd_max_chunk_len": 2}))
    with ServiceClient(base_url=server.url, max_outage_s=0.1, wire="protobuf") as client:
        yield client.create_lora_training_client("base")


@pytest.fixture
def engine() -> DeterministicEngine:
    return DeterministicEngine(vocab_size=1000, context_length=64)


@pytest.fixture
def embedded(engine: DeterministicEngine) -> Iterator[TrainingClient]:
    """The same, on the embedded server."""
    settings = ServerSettings(flags=ClientFlags(fwdbwd_max_chunk_len=2))
    with LocalServer(engine, settings=settings) as server:
        with ServiceClient(base_url=server.url) as client:
            yield client.create_lora_training_client("deterministic", rank=4)


def seq_id_of(received: Received) -> int:
    codec = codec_for(received.headers["content-type"])
    return codec.decode_forward_backward(received.body).seq_id


def at(routes: TinkerRoutes, seq_id: int, answer: Answer) -> None:
    """Have the server answer the pass of *seq_id* with *answer*, and accept the others."""

    def step(received: Received) -> Answer:
        return answer if seq_id_of(received) == seq_id else routes.accept_pass(received)

    routes.serve("forward_backward", step)


def fails_at(routes: TinkerRoutes, seq_id: int, error: str) -> None:
    """Have the server accept the pass of *seq_id*, and fail it."""

    def step(received: Received) -> Answer:
        taken = routes.accept_pass(received)
        if seq_id_of(received) == seq_id:
            failed = {"error": error, "category": "user"}
            routes.results[taken.body["request_id"]] = Answer(body=failed)
        return taken

    routes.serve("forward_backward", step)


# What was added in part


def test_until_the_batch_is_complete_the_run_takes_no_step(embedded: TrainingClient) -> None:
    data = batch()
    bad = [*data[:3], datum(2000), *data[4:]]
    with pytest.raises(
        IncompleteGradientError, match=r"1 of 3 parts.* datum 3: model_input holds"
    ) as caught:
        embedded.forward_backward(bad, "cross_entropy").result(PATIENCE_S)
    assert isinstance(caught.value.__cause__, BadRequestError)
    assert "Call forward_backward with the batch again" in str(caught.value)
    assert "load_state_with_optimizer(path)" in str(caught.value)
    for call in (
        lambda: embedded.forward_backward(data[1:], "cross_entropy"),  # another batch
        lambda: embedded.forward_backward(data, "importance_sampling"),
        lambda: embedded.forward_backward(data[:1], "cross_entropy"),
        lambda: embedded.optim_step(ADAM),
    ):
        with pytest.raises(IncompleteGradientError, match="1 of 3 parts"):
            call().result(PATIENCE_S)
    pytest.importorskip("torch")
    with pytest.raises(IncompleteGradientError, match="1 of 3 parts"):
        embedded.forward_backward_custom(data, lambda d, p: (p[0].sum(), {})).result(PATIENCE_S)


def test_a_repeated_call_sends_only_the_missing_parts(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    at(routes, 2, Answer(400, {"detail": "datum 1 is bad"}))
    data = batch()
    error = trainer.forward_backward(data, "cross_entropy", {"a": 1}).exception(PATIENCE_S)
    assert "datum 3 is bad" in str(error)
    data[3] = datum(500)  # replaces the bad datum
    passed = trainer.forward_backward(data, "cross_entropy", {"a": 1})
    trainer.optim_step(ADAM).result(PATIENCE_S)
    output = passed.result(PATIENCE_S)
    assert len(output.loss_fn_outputs) == 6
    assert output.metrics == {"loss:sum": 6.0}
    first, refused, *rest = routes.submitted("forward_backward")
    assert refused.seq_id == 2
    assert [d for request in (first, *rest) for d in request.data] == data
    assert routes.seq_ids() == [1, 2, 3, 4, 5]


def test_the_missing_parts_may_be_left_out_of_the_batch(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    at(routes, 2, Answer(400, {"detail": "no"}))
    trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
    step = trainer.train_step(batch()[:2], "cross_entropy", ADAM)
    assert step.forward_backward.metrics == {"loss:sum": 2.0}
    assert len(routes.submitted("forward_backward")) == 2  # the good part and the bad one
    assert len(routes.submitted("optim_step")) == 1


def test_a_batch_may_be_completed_in_several_attempts(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    data = batch()
    for seq_id in (2, 4):
        at(routes, seq_id, Answer(400, {"detail": "no"}))
        passed = trainer.forward_backward(data, "cross_entropy")
        assert isinstance(passed.exception(PATIENCE_S), IncompleteGradientError)
    assert "2 of 3 parts" in str(passed.exception())
    trainer.train_step(data, "cross_entropy", ADAM)
    assert routes.seq_ids() == [1, 2, 3, 4, 5, 6]
    sent = routes.submitted("forward_backward")
    assert [d for n in (0, 2, 4) for d in sent[n].data] == data


@pytest.mark.parametrize("answer", [Answer(500), Answer(503), Answer(drop=True)])
def test_a_part_whose_response_was_lost_is_resent_under_its_seq_id(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes, answer: Answer
) -> None:
    at(routes, 2, answer)
    error = trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
    assert "Call forward_backward with the batch again" in str(error)
    changed = [*batch()[:3], *batch()[:1]]  # resending the lost part would add its data twice
    refused = trainer.forward_backward(changed, "cross_entropy").exception(PATIENCE_S)
    assert isinstance(refused, IncompleteGradientError)
    routes.serve("forward_backward", routes.accept_pass)
    trainer.train_step(batch(), "cross_entropy", ADAM)
    assert sorted({*routes.seq_ids()}) == [1, 2, 3, 4]
    assert len({received.body for received in server.requests(PASS)}) == 3


def test_after_another_request_a_lost_part_is_not_sent_again(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    at(routes, 2, Answer(503))
    trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
    routes.serve("forward_backward", routes.accept_pass)
    trainer.save_state("a").result(PATIENCE_S)  # first resends the lost part, whose result is lost
    error = trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
    assert isinstance(error, IncompleteGradientError)
    assert "Call forward_backward" not in str(error)


def test_a_part_whose_outcome_is_unknown_is_not_resent(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    def step(received: Received) -> Answer:
        taken = routes.accept_pass(received)
        if seq_id_of(received) == 2:
            routes.results[taken.body["request_id"]] = Answer(body={"loss_fn_outputs": "?"})
        return taken

    routes.serve("forward_backward", step)
    for _ in range(2):
        error = trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
        assert isinstance(error, IncompleteGradientError)
        assert "Call forward_backward" not in str(error)
    assert routes.seq_ids() == [1, 2, 3]


def test_every_partly_added_batch_must_be_completed(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    all_sent = threading.Event()

    def step(received: Received) -> Answer:
        taken = routes.accept_pass(received)
        if seq_id_of(received) in (2, 4):
            failed = Answer(body={"error": "no", "category": "server"}, hold=all_sent)
            routes.results[taken.body["request_id"]] = failed
        return taken

    routes.serve("forward_backward", step)
    batches = batch(4), batch(8)[4:]
    first, second = (trainer.forward_backward(data, "cross_entropy") for data in batches)
    server.wait_for(PASS, 4)
    all_sent.set()
    assert isinstance(first.exception(PATIENCE_S), IncompleteGradientError)
    assert isinstance(second.exception(PATIENCE_S), IncompleteGradientError)
    for data in batches:
        step_of_optimizer = trainer.optim_step(ADAM)
        assert isinstance(step_of_optimizer.exception(PATIENCE_S), IncompleteGradientError)
        trainer.forward_backward(data, "cross_entropy").result(PATIENCE_S)
    trainer.optim_step(ADAM).result(PATIENCE_S)
    sent = routes.submitted("forward_backward")
    assert [d for request in sent[4:] for d in request.data] == [*batch(4)[2:], *batch(8)[6:]]


def test_a_repeated_call_is_cut_at_the_same_places(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    # While the encoding is not known, the larger encoding decides where a batch is cut.
    limits = {"fwdbwd_max_chunk_len": 1000, "fwdbwd_max_chunk_bytes_count": 5000}
    routes.serve("client/config", Answer(body=limits))
    weights = np.full(100, 1 / 3, dtype=np.float32)
    data = [datum(index + 1, length=100) for index in range(8)]
    for one in data:
        one.loss_fn_inputs["weights"] = types.TensorData.from_numpy(weights)
    at(routes, 2, Answer(400, {"detail": "no"}))
    with ServiceClient(base_url=server.url, wire="auto") as client:
        trainer = client.create_lora_training_client("base")
        passed = trainer.forward_backward(data, "cross_entropy")
        assert isinstance(passed.exception(PATIENCE_S), IncompleteGradientError)
        data[-1] = datum(500)  # is much smaller
        trainer.forward_backward(data, "cross_entropy").result(PATIENCE_S)
    added, refused, *rest = routes.submitted("forward_backward")
    assert [len(request.data) for request in (added, refused)] == [2, 2]  # in protobuf: 3
    assert [d for request in (added, *rest) for d in request.data] == data


def test_a_lost_part_after_a_failed_one_is_not_sent_twice(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    arrived = threading.Event()

    def step(received: Received) -> Answer:
        if seq_id_of(received) == 2:
            arrived.set()
            return Answer(503)
        taken = routes.accept_pass(received)
        failed = Answer(body={"error": "no", "category": "user"}, hold=arrived)
        routes.results[taken.body["request_id"]] = failed
        return taken

    routes.serve("forward_backward", step)
    for _ in range(2):
        # To complete the batch, the client would first have to resend the lost second part, whose
        # outcome is unknown, and then send it once more.
        error = trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
        assert isinstance(error, IncompleteGradientError)
        assert "0 of 3 parts" in str(error)
        assert "Call forward_backward" not in str(error)
    assert sorted({*routes.seq_ids()}) == [1, 2]


def test_after_a_lost_part_another_batch_waits_for_the_outcome_of_the_other_parts(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve("client/config", Answer(body={"fwdbwd_max_chunk_len": 2}))
    go_on = threading.Event()
    plain = routes.retrieve

    def step(received: Received) -> Answer:
        lost = len(server.requests(PASS)) == 2
        return Answer(503) if lost else routes.accept_pass(received)

    def retrieve(received: Received) -> Answer:
        is_pass = received.json()["request_id"].startswith("forward_backward")
        return Answer(body=plain(received).body, hold=go_on if is_pass else None)

    routes.serve("forward_backward", step)
    routes.serve("retrieve_future", retrieve)
    with ServiceClient(base_url=server.url, max_outage_s=0.1, wire="protobuf") as client:
        trainer = client.create_lora_training_client("base")
        passed = trainer.forward_backward(batch(4), "cross_entropy")
        other = trainer.forward_backward(batch(1), "cross_entropy")
        server.wait_for(PASS, 2)
        # In flight remain the first part, its batch and the other batch.
        wait_until(lambda: len(client.inflight()) == 3, "the second part is given up")
        go_on.set()
        for future in (passed, other):
            assert isinstance(future.exception(PATIENCE_S), IncompleteGradientError)
        trainer.train_step(batch(4), "cross_entropy", ADAM)
    assert routes.seq_ids() == [1, 2, 2, 3]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_poll_does_not_show_the_outcome_of_the_work(
    trainer: TrainingClient, routes: TinkerRoutes, status: int
) -> None:
    def step(received: Received) -> Answer:
        taken = routes.accept_pass(received)
        if seq_id_of(received) == 2:
            routes.results[taken.body["request_id"]] = Answer(status, {"detail": "no"})
        return taken

    routes.serve("forward_backward", step)
    for _ in range(2):
        error = trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
        assert isinstance(error, IncompleteGradientError)
        assert "Call forward_backward" not in str(error)
    assert routes.seq_ids() == [1, 2, 3]


def test_loading_a_checkpoint_drops_the_gradient_and_the_run_continues(
    embedded: TrainingClient,
) -> None:
    data = batch()
    embedded.train_step(data, "cross_entropy", ADAM)
    loss = embedded.forward(data, "cross_entropy").result(PATIENCE_S).metrics["loss:sum"]
    with pytest.raises(IncompleteGradientError):
        embedded.forward_backward([*data[:3], datum(2000)], "cross_entropy").result(PATIENCE_S)
    path = embedded.save_state("rescue").result(PATIENCE_S).path
    loaded = embedded.load_state_with_optimizer(path)
    step = embedded.optim_step(ADAM)  # requested before the checkpoint was loaded
    loaded.result(PATIENCE_S)
    assert step.result(PATIENCE_S).metrics == {"grad_norm:mean": 0.0, "optimizer_steps:max": 1.0}
    again = embedded.train_step(data, "cross_entropy", ADAM)
    assert again.forward_backward.metrics["loss:sum"] == pytest.approx(loss)
    assert again.optim.metrics == {"grad_norm:mean": 0.5, "optimizer_steps:max": 2.0}


def test_a_failed_load_leaves_the_gradient_incomplete(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    at(routes, 2, Answer(400, {"detail": "no"}))
    failed = Answer(body={"error": "no such checkpoint", "category": "user"})
    routes.serve("load_weights", lambda received: routes.accepted("load_weights", failed))
    trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
    loaded, step = trainer.load_state("tinker://x/weights/a"), trainer.optim_step(ADAM)
    assert isinstance(loaded.exception(PATIENCE_S), RequestFailedError)
    assert isinstance(step.exception(PATIENCE_S), IncompleteGradientError)
    routes.serve("load_weights", routes.accept)
    trainer.load_state("tinker://x/weights/a").result(PATIENCE_S)
    trainer.optim_step(ADAM).result(PATIENCE_S)
    assert len(routes.submitted("optim_step")) == 1


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_an_optimizer_step_that_was_submitted_with_the_batch_is_not_sent(
    trainer: TrainingClient, routes: TinkerRoutes, how: str
) -> None:
    if how == "refused":
        at(routes, 2, Answer(422, {"detail": "no more"}))
    else:
        fails_at(routes, 2, "no more")
    passed, step = trainer.forward_backward(batch(), "cross_entropy"), trainer.optim_step(ADAM)
    for future in (passed, step):
        with pytest.raises(IncompleteGradientError, match=rf"of 3 parts .*{MODEL}.*no more"):
            future.result(PATIENCE_S)
    with pytest.raises(IncompleteGradientError):
        trainer.train_step(batch()[1:], "cross_entropy", ADAM)
    assert routes.submitted("optim_step") == []
    assert trainer.save_state("a").result(PATIENCE_S).path
    assert trainer.forward(batch(), "cross_entropy").result(PATIENCE_S).loss_fn_outputs


def test_after_a_failed_part_no_further_parts_are_sent(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    at(routes, 2, Answer(400, {"detail": "no"}))
    error = trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
    assert isinstance(error, IncompleteGradientError)
    assert error.status == 400
    assert "1 of 3 parts" in str(error)
    assert [request.seq_id for request in routes.submitted("forward_backward")] == [1, 2]
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)


@pytest.mark.parametrize("answer", [Answer(500), Answer(503), Answer(drop=True)])
def test_a_part_that_may_have_been_executed_counts_as_added(
    trainer: TrainingClient, routes: TinkerRoutes, answer: Answer
) -> None:
    at(routes, 1, answer)
    error = trainer.forward_backward(batch(), "cross_entropy").exception(PATIENCE_S)
    assert isinstance(error, IncompleteGradientError)
    assert "0 of 3 parts" in str(error)
    assert isinstance(error.__cause__, (InternalServerError, APIConnectionError))


# What was not added


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_a_batch_of_which_nothing_was_added_fails_like_any_other(
    trainer: TrainingClient, routes: TinkerRoutes, how: str
) -> None:
    refused = Answer(400, {"detail": "none of it"})
    failed = Answer(body={"error": "none of it", "category": "user"})
    answer = refused if how == "refused" else routes.accepted("forward_backward", failed)
    routes.serve("forward_backward", answer)
    passed = trainer.forward_backward(batch(), "cross_entropy")
    with pytest.raises((BadRequestError, RequestFailedError), match="none of it"):
        passed.result(PATIENCE_S)
    with pytest.raises((BadRequestError, RequestFailedError), match="none of it"):
        trainer.train_step(batch(), "cross_entropy", ADAM)  # no step without a gradient
    assert routes.submitted("optim_step") == []
    routes.serve("forward_backward", routes.accept_pass)
    trainer.train_step(batch(), "cross_entropy", ADAM)


def test_a_datum_that_cannot_be_encoded_is_found_before_anything_is_sent(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    pointer = types.ImageAssetPointerChunk("png", "file.png", expected_tokens=4)
    image = types.Datum(types.ModelInput([pointer]), {"target_tokens": [1, 2, 3, 4]})
    with pytest.raises(InvalidInputError, match=r"^data\[4\]: .*no protobuf form"):
        trainer.forward_backward([*batch(4), image], "cross_entropy").result(PATIENCE_S)
    assert server.requests(PASS) == []
    trainer.train_step(batch(), "cross_entropy", ADAM)
    assert routes.seq_ids() == [1, 2, 3, 4]


def test_a_batch_cancelled_in_the_queue_is_not_sent(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    go_on = threading.Event()
    routes.serve("save_weights", lambda r: Answer(body=routes.accept(r).body, hold=go_on))
    saved = trainer.save_state("a")
    passed = trainer.forward_backward(batch(), "cross_entropy")
    assert passed.cancel()
    go_on.set()
    saved.result(PATIENCE_S)
    trainer.optim_step(ADAM).result(PATIENCE_S)
    assert server.requests(PASS) == []


# In order, and as a unit


def test_the_optimizer_step_is_sent_once_all_parts_are_done(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    release = threading.Event()
    plain = routes.retrieve

    def held(received: Received) -> Answer:
        if received.json()["request_id"].startswith("forward_backward"):
            assert release.wait(PATIENCE_S)
            assert server.requests(STEP) == []
        return plain(received)

    routes.serve("retrieve_future", held)
    passed, step = trainer.forward_backward(batch(), "cross_entropy"), trainer.optim_step(ADAM)
    server.wait_for(PASS, 3)  # sent without waiting for results
    release.set()
    step.result(PATIENCE_S)
    assert passed.result(PATIENCE_S).metrics == {"loss:sum": 6.0}
    assert routes.seq_ids() == [1, 2, 3, 4]


def test_a_cancel_does_not_interrupt_a_batch(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def step(received: Received) -> Answer:
        taken = routes.accept_pass(received)
        if seq_id_of(received) == 1:
            arrived.set()
            taken = Answer(body=taken.body, hold=go_on)
        return taken

    routes.serve("forward_backward", step)
    passed = trainer.forward_backward(batch(), "cross_entropy")
    assert arrived.wait(PATIENCE_S)
    assert passed.cancel()
    go_on.set()
    trainer.optim_step(ADAM).result(PATIENCE_S)
    assert routes.seq_ids() == [1, 2, 3, 4]


def test_a_partly_added_batch_is_not_forgotten_if_it_is_cancelled(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def step(received: Received) -> Answer:
        if seq_id_of(received) == 2:
            arrived.set()
            return Answer(400, {"detail": "no more"}, hold=go_on)
        return routes.accept_pass(received)

    routes.serve("forward_backward", step)
    passed = trainer.forward_backward(batch(), "cross_entropy")
    assert arrived.wait(PATIENCE_S)
    assert passed.cancel()
    go_on.set()
    with pytest.raises(IncompleteGradientError, match="1 of 3 parts"):
        trainer.optim_step(ADAM).result(PATIENCE_S)


def test_a_batch_of_a_closing_client_fails_with_a_closed_error(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve("client/config", Answer(body={"fwdbwd_max_chunk_len": 2}))
    pending = Answer(body={"type": "try_again"}, hold=threading.Event())
    routes.serve("retrieve_future", pending)
    client = ServiceClient(base_url=server.url, wire="protobuf")
    routes.serve("retrieve_future", routes.retrieve, pending)  # the run is created, nothing more
    trainer = client.create_lora_training_client("base")
    passed, step = trainer.forward_backward(batch(), "cross_entropy"), trainer.optim_step(ADAM)
    server.wait_for(PASS, 3)
    client.close()
    assert isinstance(passed.exception(PATIENCE_S), ClientClosedError)
    assert isinstance(step.exception(PATIENCE_S), ClientClosedError)


# Indices


@pytest.mark.parametrize("call", ["forward", "forward_backward"])
def test_errors_use_the_callers_index(embedded: TrainingClient, call: str) -> None:
    data = [*batch(5), datum(2000)]
    error = getattr(embedded, call)(data, "cross_entropy").exception(PATIENCE_S)
    assert "datum 5: model_input holds token 2003" in str(error)
    # Nothing was added, so the run is unchanged.
    step = embedded.optim_step(ADAM).exception(PATIENCE_S)
    assert (step is None) == (call == "forward")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("datum 0 holds token 5", "datum 4 holds token 5"),
        ("data[1]: datum 12 is bad", "data[5]: datum 16 is bad"),
        ("input.data.1.model_input: no", "input.data.5.model_input: no"),
        ('[{"loc":["body","data",1,"x",7]}]', '[{"loc":["body","data",5,"x",7]}]'),
        ("metadata 3 and 2 data", "metadata 3 and 2 data (in data[4:6] of the batch)"),
    ],
)  # fmt: skip
def test_an_index_within_a_part_becomes_one_within_the_batch(message: str, expected: str) -> None:
    cause = ValueError("x")
    error = BadRequestError(message, status=400, hint="Look.")
    error.__cause__ = cause
    found = in_indices_of_batch(error, 4, 6)
    assert type(found) is BadRequestError
    assert (found.message, found.status, found.hint, found.__cause__) == (
        expected,
        400,
        "Look.",
        cause,
    )
    assert in_indices_of_batch(error, 0, 4) is error
    other: Any = OSError("datum 1")
    assert in_indices_of_batch(other, 4, 6) is other


def test_warnings_about_nan_logprobs_use_the_callers_index(
    trainer: TrainingClient, routes: TinkerRoutes, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"logprobs": {"data": [-1.0] * 4, "dtype": "float32", "shape": [4]}}
    unknown = {"logprobs": {"data": [None] * 4, "dtype": "float32", "shape": [4]}}

    def step(received: Received) -> Answer:
        outputs = [good, unknown if seq_id_of(received) == 2 else good]
        return routes.accepted("forward_backward", Answer(body={"loss_fn_outputs": outputs}))

    routes.serve("forward_backward", step)
    trainer.forward_backward(batch(), "cross_entropy").result(PATIENCE_S)
    assert "logprobs of data[3]" in caplog.text
