"""TrainingClient.pipeline: which steps are in flight, and what an early end does to them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from typing import Any, Iterator, List

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.threads import wait_until
from support.tinker_routes import TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex.clients.pipeline import Pipeline
from tinkex.errors import (
    BackpressureError,
    BadRequestError,
    ClientClosedError,
    InvalidInputError,
    RequestFailedError,
)
from tinkex.futures import APIFuture

ADAM = types.AdamParams(learning_rate=0.01)
PASS = "POST /api/v1/forward_backward"
STEP = "POST /api/v1/optim_step"


def batch(index: int) -> List[types.Datum]:
    tokens = types.TensorData.from_numpy(np.array([index + 1, 2], dtype=np.int64))
    return [types.Datum(types.ModelInput.from_ints([index, 1]), {"target_tokens": tokens})]


class Batches:
    """An endless iterator of batches that counts how many were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[List[types.Datum]]:
        while True:
            self.taken += 1
            yield batch(self.taken - 1)


@pytest.fixture
def run(scripted: ServiceClient) -> TrainingClient:
    return scripted.create_lora_training_client("base")


def test_a_pipeline_trains_like_single_steps(service: ServiceClient) -> None:
    first = service.create_lora_training_client("deterministic", rank=4, seed=1)
    second = service.create_lora_training_client("deterministic", rank=4, seed=1)
    piped = list(first.pipeline(map(batch, range(5)), "cross_entropy", ADAM, depth=3))
    single = [second.train_step(batch(index), "cross_entropy", ADAM) for index in range(5)]
    assert [step.index for step in piped] == list(range(5))
    for ours, theirs in zip(piped, single):
        assert ours.forward_backward.metrics == theirs.forward_backward.metrics
        assert ours.metrics == {**theirs.forward_backward.metrics, **(theirs.optim.metrics or {})}


def test_a_batch_of_lists_is_trained_on_in_several_passes(service: ServiceClient) -> None:
    first = service.create_lora_training_client("deterministic", rank=4, seed=1)
    second = service.create_lora_training_client("deterministic", rank=4, seed=1)
    batches = [[batch(index), batch(index + 1) + batch(index + 2)] for index in range(4)]
    piped = list(first.pipeline(batches, "cross_entropy", ADAM, depth=3))
    for step, (one, two) in zip(piped, batches):
        passes = [second.forward_backward(data, "cross_entropy").result() for data in (one, two)]
        second.optim_step(ADAM).result()
        assert len(step.forward_backward.loss_fn_outputs) == 3
        sums = [passed.metrics["loss:sum"] for passed in passes]
        assert step.metrics["loss:sum"] == sum(sums)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depth_is_the_number_of_steps_in_flight(
    server: ScriptedServer, routes: TinkerRoutes, run: TrainingClient, depth: int
) -> None:
    batches = Batches()
    pipeline = run.pipeline(batches, "cross_entropy", ADAM, depth=depth)
    assert batches.taken == 0
    for index in range(3):
        step = next(pipeline)
        assert step.index == index
        assert batches.taken == index + depth
        assert {"loss:sum", "grad_norm:mean"} <= set(step.metrics)
    server.wait_for(STEP, 2 + depth)
    order = [
        r.path.rpartition("/")[2]
        for r in server.requests()
        if r.path.endswith(("forward_backward", "optim_step"))
    ]
    assert order == ["forward_backward", "optim_step"] * (2 + depth)
    pipeline.close()


def test_the_next_step_is_sent_before_the_current_one_is_awaited(
    server: ScriptedServer, routes: TinkerRoutes, run: TrainingClient
) -> None:
    def poll(received: Received) -> Answer:
        if received.json()["request_id"].startswith("forward_backward"):
            server.wait_for(PASS, 2)  # fails, and ends the poll, if the pass does not arrive
        return routes.retrieve(received)

    routes.serve("retrieve_future", poll)
    pipeline = run.pipeline(map(batch, range(2)), "cross_entropy", ADAM)
    assert [step.index for step in pipeline] == [0, 1]


def test_a_schedule_sets_the_learning_rate_of_each_step(
    run: TrainingClient, routes: TinkerRoutes
) -> None:
    rates = [0.3, 0.2, 0.1]
    list(
        run.pipeline(
            map(batch, range(3)),
            "cross_entropy",
            lambda index: types.AdamParams(learning_rate=rates[index]),
        )
    )
    sent = [body["adam_params"]["learning_rate"] for body in routes.submitted("optim_step")]
    assert sent == rates


def test_a_failure_ends_the_pipeline_and_names_the_step(
    server: ScriptedServer,
    routes: TinkerRoutes,
    run: TrainingClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = Batches()
    pipeline = run.pipeline(batches, "cross_entropy", ADAM, depth=2)
    next(pipeline)
    server.wait_for(PASS, 2)  # step 1 has been accepted
    routes.serve(
        "forward_backward",
        lambda received: routes.accepted(
            "failing", Answer(body={"error": "no such luck", "category": "user"})
        ),
    )
    steps: List[int] = []
    with pytest.raises(RequestFailedError, match="It was step 2 of the pipeline") as caught:
        steps.extend(step.index for step in pipeline)
    assert steps == [1]
    assert "no such luck" in str(caught.value)
    assert batches.taken == 4
    assert list(pipeline) == []
    assert "the pipeline stops: RequestFailedError" in caplog.text


def test_after_a_failure_unsent_requests_are_cancelled(
    server: ScriptedServer,
    scripted: ServiceClient,
    routes: TinkerRoutes,
    run: TrainingClient,
) -> None:
    let_go = threading.Event()
    failing = Answer(body={"error": "no such luck", "category": "user"})
    passes = iter([lambda r: routes.accepted("failing", failing)])

    def accept_pass(received: Received) -> Answer:
        first = next(passes, None)
        if first is not None:
            return first(received)
        # The lane's thread is held while it sends step 1.
        return dataclasses.replace(routes.accept_pass(received), hold=let_go)

    routes.serve("forward_backward", accept_pass)

    def poll(received: Received) -> Answer:
        if received.json()["request_id"].startswith("failing"):
            server.wait_for(PASS, 2)
        return routes.retrieve(received)

    routes.serve("retrieve_future", poll)
    pipeline = run.pipeline(Batches(), "cross_entropy", ADAM, depth=3)
    with pytest.raises(RequestFailedError, match="step 0"):
        next(pipeline)
    # Step 1's pass was sent and its optimizer step will be; nothing of step 2 is sent.
    wait_until(
        lambda: (
            sorted(future.kind for future in scripted.inflight())
            == ["forward_backward", "optim_step"]
        ),
        "the optimizer step of step 0 is done",
    )
    let_go.set()
    assert [step.index for step in pipeline.drain()] == [1]
    assert len(server.requests(PASS)) == 2
    assert len(server.requests(STEP)) == 2


def test_after_an_interrupt_the_steps_in_flight_can_be_drained(
    server: ScriptedServer,
    routes: TinkerRoutes,
    run: TrainingClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = Batches()
    pipeline = run.pipeline(batches, "cross_entropy", ADAM, depth=2)

    def interrupted(future: APIFuture[Any], timeout: Any = None) -> Any:
        server.wait_for(STEP, 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(APIFuture, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(pipeline)
    assert "done by the server unless it fails: step 0, 1" in caplog.text
    assert [step.index for step in pipeline.drain()] == [0, 1]
    assert batches.taken == 2
    assert list(pipeline) == []


@pytest.mark.usefixtures("without_key")
def test_a_batch_that_is_being_cut_gets_its_optimizer_step(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def config(received: Received) -> Answer:
        asked.set()
        return Answer(body={"fwdbwd_max_chunk_len": 1}, hold=go_on)

    with ServiceClient(base_url=server.url) as client:
        run = client.create_lora_training_client("base")
        routes.serve("client/config", config)  # the lane's thread needs it to cut the batch
        pipeline = run.pipeline(
            [batch(0) + batch(1), interrupting(asked)], "cross_entropy", ADAM, depth=2
        )
        with pytest.raises(KeyboardInterrupt):
            next(pipeline)
        go_on.set()
        assert [step.index for step in pipeline.drain()] == [0]
    assert len(server.requests(PASS)) == 2  # the parts of the batch
    assert len(server.requests(STEP)) == 1


def interrupting(event: threading.Event) -> Iterator[types.Datum]:
    """A batch whose iteration is interrupted, as by Ctrl-C, once *event* is set."""
    assert event.wait(PATIENCE_S)
    raise KeyboardInterrupt
    yield


def test_drain_raises_the_first_failure(routes: TinkerRoutes, run: TrainingClient) -> None:
    failing = Answer(body={"error": "no such luck", "category": "user"})
    pipeline = run.pipeline(Batches(), "cross_entropy", ADAM, depth=3)
    next(pipeline)
    assert [step.index for step in pipeline.drain()] == [1, 2]
    routes.serve("optim_step", lambda received: routes.accepted("failing", failing))
    pipeline = run.pipeline(map(batch, range(2)), "cross_entropy", ADAM, depth=2)
    pipeline._fill()
    with pytest.raises(RequestFailedError, match="step 0"):
        pipeline.drain()


def test_leaving_the_block_reports_the_steps_that_were_sent(
    server: ScriptedServer, run: TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    with run.pipeline(Batches(), "cross_entropy", ADAM, depth=2) as pipeline:
        next(pipeline)
        server.wait_for(STEP, 2)
    assert "the pipeline was closed: already sent" in caplog.text
    assert "step 1" in caplog.text
    assert list(pipeline) == []


def test_a_pass_is_sent_with_its_optimizer_step_or_not_at_all(
    routes: TinkerRoutes, run: TrainingClient
) -> None:
    def schedule(index: int) -> Any:
        return ADAM if index == 0 else {"learning_rate": 1}  # the latter has no type

    with pytest.raises(InvalidInputError, match="It was step 1 of the pipeline"):
        next(run.pipeline(Batches(), "cross_entropy", schedule, depth=2))
    assert len(routes.submitted("forward_backward")) <= 1


def test_batches_whose_iterator_fails(run: TrainingClient) -> None:
    def broken() -> Iterator[List[types.Datum]]:
        yield batch(0)
        raise OSError("the disk is gone")

    pipeline = run.pipeline(broken(), "cross_entropy", ADAM, depth=2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(pipeline)
    assert [step.index for step in pipeline.drain()] in ([0], [])


@pytest.mark.parametrize("depth", [0, -1, 1.5, True])
def test_bad_depths(run: TrainingClient, depth: Any) -> None:
    with pytest.raises(InvalidInputError, match="depth"):
        run.pipeline([], "cross_entropy", ADAM, depth=depth)


def test_a_custom_loss_takes_no_settings(run: TrainingClient) -> None:
    with pytest.raises(InvalidInputError, match="loss_fn_config"):
        run.pipeline([], lambda data, logprobs: (0, {}), ADAM, {"a": 1.0})  # type: ignore[arg-type, return-value]


def test_a_pipeline_with_a_custom_loss(service: ServiceClient) -> None:
    pytest.importorskip("torch")
    run = service.create_lora_training_client("deterministic", rank=4)

    def loss(data: Any, logprobs: Any) -> Any:
        return -sum(each.sum() for each in logprobs), {"custom": 1.0}

    steps = list(run.pipeline(map(batch, range(2)), loss, ADAM))
    assert [step.metrics["custom"] for step in steps] == [1.0, 1.0]


def test_a_pipeline_of_a_closed_client(scripted: ServiceClient, run: TrainingClient) -> None:
    pipeline = run.pipeline(Batches(), "cross_entropy", ADAM)
    assert isinstance(pipeline, Pipeline)
    next(pipeline)
    scripted.close()
    with pytest.raises(ClientClosedError):
        list(pipeline)
    with pytest.raises(ClientClosedError):
        run.pipeline([], "cross_entropy", ADAM)


# Checkpoints


def loss_of(service: ServiceClient, path: str) -> float:
    saved = service.create_training_client_from_state_with_optimizer(path)
    return saved.forward(batch(0), "cross_entropy").result(PATIENCE_S).metrics["loss:sum"]


@pytest.mark.parametrize("save_after", [3, lambda index: index == 2], ids=["every", "function"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_checkpoint_of_a_step_contains_no_later_step(
    service: ServiceClient, depth: int, save_after: Any
) -> None:
    run = service.create_lora_training_client("deterministic", rank=4)
    saved: List[str] = []
    losses: List[float] = []
    steps = run.pipeline([batch(0)] * 8, "cross_entropy", ADAM, depth=depth, save_after=save_after)
    for step in steps:
        losses.append(step.metrics["loss:sum"])
        if step.index == 2:
            saved.append(step.save_state("exact").result(PATIENCE_S).path)
            sampled = step.save_weights_for_sampler("exact").result(PATIENCE_S)
            assert "exact" in sampled.path
    assert [step_loss < before for before, step_loss in zip(losses, losses[1:])] == [True] * 7
    # Step 3's pass is the first with the weights after step 2.
    assert loss_of(service, saved[0]) == losses[3]


@pytest.mark.parametrize("depth", [2, 4])
def test_the_pipeline_fills_up_again_after_a_saved_step(
    server: ScriptedServer, routes: TinkerRoutes, run: TrainingClient, depth: int
) -> None:
    batches = Batches()
    pipeline = run.pipeline(batches, "cross_entropy", ADAM, depth=depth, save_after=4)
    taken = []
    for _ in range(8):
        step = next(pipeline)
        if step.index % 4 == 3:
            step.save_state("a")
        taken.append(batches.taken)
    assert taken == [min(n + depth, 4) for n in range(4)] + [min(n + depth, 8) for n in range(4, 8)]
    server.wait_for("POST /api/v1/save_weights", 2)
    order = [r.path.rpartition("/")[2] for r in server.requests()]
    work = [name for name in order if name in ("forward_backward", "optim_step", "save_weights")]
    assert work == [*["forward_backward", "optim_step"] * 4, "save_weights"] * 2


def test_a_checkpoint_that_would_contain_later_steps_is_refused(
    run: TrainingClient, routes: TinkerRoutes
) -> None:
    pipeline = run.pipeline(map(batch, range(5)), "cross_entropy", ADAM, depth=3)
    step = next(pipeline)
    with pytest.raises(InvalidInputError, match="steps 1 to 2 were already submitted") as caught:
        step.save_state("a")
    assert "save_every=100" in str(caught.value)
    assert "save_after=100" in str(caught.value)
    with pytest.raises(InvalidInputError, match="the checkpoint would hold more than step 0"):
        step.save_weights_for_sampler("a")
    assert routes.submitted("save_weights") == []
    last = [*pipeline][-1]
    last.save_state("a", ttl_seconds=60, overwrite=True, user_metadata={"k": "v"})
    assert run.forward(batch(0), "cross_entropy").result(PATIENCE_S)
    (sent,) = routes.submitted("save_weights")
    assert (sent["path"], sent["ttl_seconds"], sent["overwrite"], sent["user_metadata"]) == (
        "a",
        60,
        True,
        {"k": "v"},
    )


@pytest.mark.parametrize("change", ["optim_step", "train_step", "load_state", "pipeline"])
def test_a_step_cannot_be_saved_after_other_training_of_the_run(
    run: TrainingClient, routes: TinkerRoutes, change: str
) -> None:
    (step,) = run.pipeline([batch(0)], "cross_entropy", ADAM, save_after=1)
    run.forward(batch(0), "cross_entropy").result(PATIENCE_S)
    step.save_state("a").result(PATIENCE_S)
    if change == "optim_step":
        run.optim_step(ADAM).result(PATIENCE_S)
    elif change == "train_step":
        run.train_step(batch(0), "cross_entropy", ADAM)
    elif change == "load_state":
        run.load_state("tinker://run/weights/a")
    else:
        next(run.pipeline([batch(0)], "cross_entropy", ADAM))
    with pytest.raises(InvalidInputError, match="outside of the pipeline after step 0") as caught:
        step.save_state("b")
    assert "call save_state of the training client" in str(caught.value)
    assert len(routes.submitted("save_weights")) == 1


def test_a_generator_of_batches_may_save_without_emptying_the_pipeline(
    service: ServiceClient,
) -> None:
    run = service.create_lora_training_client("deterministic", rank=4)
    saves: List[Any] = []

    def batches() -> Iterator[List[types.Datum]]:
        for index in range(6):
            yield batch(0)
            if index == 2:
                saves.append(run.save_state("exact"))

    steps = list(run.pipeline(batches(), "cross_entropy", ADAM, depth=3))
    assert loss_of(service, saves[0].result(PATIENCE_S).path) == steps[3].metrics["loss:sum"]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_pipeline_saves_exactly_after_a_step(service: ServiceClient, depth: int) -> None:
    run = service.create_lora_training_client("deterministic", rank=4)
    steps = [*run.pipeline([batch(0)] * 9, "cross_entropy", ADAM, depth=depth, save_every=3)]
    losses = [step.metrics["loss:sum"] for step in steps]
    assert [step_loss < before for before, step_loss in zip(losses, losses[1:])] == [True] * 8
    for index in (2, 5):  # the next step's pass is the first with the weights after this step
        path = steps[index].save_state().result(PATIENCE_S).path
        assert path.endswith(f"/weights/step-{index + 1}")
        assert loss_of(service, path) == losses[index + 1]
    assert steps[8].save_state().result(PATIENCE_S).path.endswith("step-9")
    with pytest.raises(InvalidInputError, match="has not saved step 3"):
        steps[3].save_state()


def test_saving_a_step_does_not_delay_the_next(
    server: ScriptedServer, routes: TinkerRoutes, run: TrainingClient
) -> None:
    batches = Batches()
    pipeline = run.pipeline(batches, "cross_entropy", ADAM, depth=3, save_every=2)
    taken = []
    for _ in range(6):
        next(pipeline)
        taken.append(batches.taken)
    assert taken == [3, 4, 5, 6, 7, 8]
    server.wait_for("POST /api/v1/save_weights", 4)
    order = [r.path.rpartition("/")[2] for r in server.requests()]
    work = [name for name in order if name in ("forward_backward", "optim_step", "save_weights")]
    assert work == [*["forward_backward", "optim_step"] * 2, "save_weights"] * 4
    pipeline.close()


def test_a_function_names_the_steps_to_save(routes: TinkerRoutes, run: TrainingClient) -> None:
    def name(index: int) -> Any:
        return "last" if index == 3 else None

    steps = run.pipeline(
        map(batch, range(4)), "cross_entropy", ADAM, save_every=name, save_ttl_seconds=60
    )
    assert [*steps][3].save_state().result(PATIENCE_S)
    (sent,) = routes.submitted("save_weights")
    assert (sent["path"], sent["ttl_seconds"]) == ("last", 60)


def test_the_checkpoint_of_an_unsent_step_is_cancelled(
    server: ScriptedServer, scripted: ServiceClient, routes: TinkerRoutes, run: TrainingClient
) -> None:
    let_go = threading.Event()
    failing = Answer(body={"error": "no such luck", "category": "user"})
    passes = iter([lambda r: routes.accepted("failing", failing)])

    def accept_pass(received: Received) -> Answer:
        first = next(passes, None)
        if first is not None:
            return first(received)
        return dataclasses.replace(routes.accept_pass(received), hold=let_go)

    routes.serve("forward_backward", accept_pass)

    def poll(received: Received) -> Answer:
        if received.json()["request_id"].startswith("failing"):
            server.wait_for(PASS, 2)
        return routes.retrieve(received)

    routes.serve("retrieve_future", poll)
    pipeline = run.pipeline(
        Batches(), "cross_entropy", ADAM, depth=3, save_every=lambda i: "a" if i == 2 else None
    )
    with pytest.raises(RequestFailedError, match="step 0"):
        next(pipeline)
    let_go.set()
    assert [step.index for step in pipeline.drain()] == [1]
    assert routes.submitted("save_weights") == []
    assert scripted.inflight() == []


def test_a_step_can_be_copied_and_pickled(run: TrainingClient) -> None:
    (step,) = run.pipeline([batch(0)], "cross_entropy", ADAM)
    for other in (pickle.loads(pickle.dumps(step)), copy.deepcopy(step)):
        assert other.metrics == step.metrics
        with pytest.raises(InvalidInputError, match="does not belong to a pipeline"):
            other.save_state("a")
    assert dataclasses.asdict(step)["index"] == 0


@pytest.mark.parametrize("argument", ["save_after", "save_every"])
@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "5"])
def test_bad_steps_to_save(run: TrainingClient, argument: str, steps: Any) -> None:
    with pytest.raises(InvalidInputError, match=argument):
        run.pipeline([], "cross_entropy", ADAM, **{argument: steps})


# A single step


def test_no_optimizer_step_is_sent_without_its_pass(
    server: ScriptedServer, routes: TinkerRoutes, run: TrainingClient
) -> None:
    routes.serve("forward_backward", Answer(400, {"detail": "no such luck"}))
    with pytest.raises(BadRequestError, match="no such luck"):
        run.train_step(batch(0), "cross_entropy", ADAM)
    with pytest.raises(BadRequestError, match="It was step 0"):
        next(run.pipeline(map(batch, range(1)), "cross_entropy", ADAM))
    routes.serve("forward_backward", routes.accept_pass)
    assert run.train_step(batch(0), "cross_entropy", ADAM).optim.metrics
    assert len(server.requests(STEP)) == 1


def test_a_step_counts_as_one_unread_future(server: ScriptedServer, routes: TinkerRoutes) -> None:
    with ServiceClient(base_url=server.url, max_unread=1, on_backpressure="raise") as client:
        run = client.create_lora_training_client("base")
        assert run.train_step(batch(0), "cross_entropy", ADAM).optim.metrics
        steps = run.pipeline(map(batch, range(4)), "cross_entropy", ADAM, depth=3)
        assert [step.index for step in steps] == [0, 1, 2, 3]
        unread = run.save_state("a")
        with pytest.raises(BackpressureError):
            run.train_step(batch(0), "cross_entropy", ADAM)
        assert unread.result(PATIENCE_S)
    assert len(server.requests(PASS)) == 5


def test_an_interrupted_unsent_step_is_cancelled(
    server: ScriptedServer,
    scripted: ServiceClient,
    routes: TinkerRoutes,
    run: TrainingClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_go = threading.Event()
    routes.serve("save_weights", lambda r: dataclasses.replace(routes.accept(r), hold=let_go))
    saved = run.save_state("a")  # the lane is busy with it

    def interrupted(future: APIFuture[Any], timeout: Any = None) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(APIFuture, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.train_step(batch(0), "cross_entropy", ADAM)
    assert scripted.inflight() == [saved]
    let_go.set()
    assert saved.result(PATIENCE_S).path
    assert server.requests(PASS) == server.requests(STEP) == []


def test_a_step_that_cannot_be_queued_is_not_in_flight(
    scripted: ServiceClient, run: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(task: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run._run._queue._lane, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train_step(batch(0), "cross_entropy", ADAM)
    assert scripted.inflight() == []
    assert sum(scripted.usage().reserved) == 0
