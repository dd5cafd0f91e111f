"""Custom losses: traced, and uploaded if the server accepts them, else computed by the client."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import MODEL, TinkerRoutes

torch = pytest.importorskip("torch")

from tinkex import APIFuture, LossHandle, ServiceClient, TrainingClient, types  # noqa: E402
from tinkex._training.loss_tracing import trace_loss  # noqa: E402
from tinkex.errors import (  # noqa: E402
    BadRequestError,
    IncompleteGradientError,
    InternalServerError,
    InvalidInputError,
    RequestFailedError,
    ResponseDecodeError,
)
from tinkex.wire.codec import codec_for  # noqa: E402

ADAM = types.AdamParams(learning_rate=0.01)
RANKS = {"logprobs": 1, "advantages": 1, "clip": 0}


def datum(seed: int = 0, length: int = 3, **inputs: Any) -> types.Datum:
    tokens = np.random.default_rng(seed).integers(1, 1000, length + 1)
    extra = {"advantages": np.arange(length, dtype=np.float32), "clip": np.float32([2.0])}
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], **extra, **inputs},
    )


def clipped(logprobs: Any, advantages: Any, clip: Any) -> Any:
    gain = torch.minimum(logprobs * advantages, clip)
    return -gain.sum(), {"custom/gain:sum": gain.sum(), "custom/tokens:mean": logprobs.shape[0]}


@pytest.fixture
def flagged(server: ScriptedServer, routes: TinkerRoutes) -> Iterator[ServiceClient]:
    """A client of a server that accepts custom losses."""
    routes.serve("client/config", Answer(body={"custom_loss_server_side": True}))
    routes.serve("create_custom_loss", accepted("loss-request"))
    routes.results["loss-request"] = Answer(body={"loss_id": "loss-7"})
    with ServiceClient(base_url=server.url) as client:
        yield client


@pytest.fixture
def in_parts(server: ScriptedServer, routes: TinkerRoutes) -> Iterator[TrainingClient]:
    """A run on a server that takes one datum per request."""
    routes.serve("client/config", Answer(body={"fwdbwd_max_chunk_len": 1}))
    with ServiceClient(base_url=server.url) as client:
        yield client.create_lora_training_client("base")


@pytest.fixture
def scripted_trainer(scripted: ServiceClient) -> TrainingClient:
    return scripted.create_lora_training_client("base")


def accepted(request_id: str) -> Answer:
    return Answer(body={"request_id": request_id, "model_id": MODEL})


def passes(routes: TinkerRoutes) -> List[Tuple[int, bool]]:
    return [(b.seq_id, b.forward_only) for b in routes.submitted("forward_backward")]


# Traced


def test_a_loss_is_traced_into_plain_json() -> None:
    def loss(logprobs: Any, mask: Any) -> Any:
        kept = torch.where(mask > 0, logprobs[..., 1:], float("-inf"))
        return torch.exp(kept).to(torch.float32).sum(dim=(0,)), {"custom/n:sum": mask.sum()}

    traced = trace_loss(loss, {"logprobs": 1, "mask": 1})
    assert traced.name == "loss"
    assert [(entry.name, entry.rank) for entry in traced.inputs] == [("logprobs", 1), ("mask", 1)]
    nodes = traced.graph["nodes"]
    assert traced.graph["format"] == 1
    assert json.loads(json.dumps(nodes)) == nodes
    assert [(n["op"], n["target"]) for n in nodes] == [
        ("placeholder", "logprobs"),
        ("placeholder", "mask"),
        ("call_function", "operator.gt"),
        ("call_function", "operator.getitem"),
        ("call_function", "torch.where"),
        ("call_function", "torch.exp"),
        ("call_method", "to"),
        ("call_method", "sum"),
        ("call_method", "sum"),
        ("output", "output"),
    ]
    by_name = {n["name"]: n for n in nodes}
    assert by_name["gt"]["args"] == [{"ref": "mask"}, 0]
    index = {"tuple": [{"ellipsis": True}, {"slice": [1, None, None]}]}
    assert by_name["getitem"]["args"] == [{"ref": "logprobs"}, index]
    assert by_name["where"]["args"][2] == {"float": "-inf"}
    assert by_name["to"]["args"][1] == {"dtype": "float32"}
    assert by_name["sum_1"]["kwargs"] == {"dim": {"tuple": [0]}}
    metrics = {"dict": {"custom/n:sum": {"ref": "sum_2"}}}
    assert nodes[-1]["args"] == [{"tuple": [{"ref": "sum_1"}, metrics]}]


def golden(logprobs: Any, mask: Any, old: Any) -> Any:
    ratio = torch.exp(logprobs - old)
    kept = torch.where(mask > 0, ratio[..., 1:], float("-inf"))
    bounded = torch.clamp(kept, min=-1e30, max=float("inf")).to(torch.float32)
    moved = bounded.to(device=torch.device("cpu"), memory_format=torch.contiguous_format)
    pair = torch.stack([moved.sum(dim=(0,)), abs(moved).mean()])
    total = pair.sum() * math.sqrt(logprobs.shape[0])
    return total, {"custom/n:sum": mask.sum(), "custom/r:mean": ratio.detach().mean()}


def test_the_graph_is_the_one_that_the_official_client_sends() -> None:
    # What tinker 0.38.0 sent for this same function, recorded on the wire.
    recorded = json.loads(Path(__file__).with_name("golden_loss.json").read_text())
    assert trace_loss(golden, {"logprobs": 1, "mask": 1, "old": 1}).graph == recorded


def test_math_shapes_and_devices_can_be_traced_too() -> None:
    def loss(logprobs: Any) -> Any:
        half = logprobs.to(device=torch.device("cpu"), memory_format=torch.contiguous_format)
        return half.sum() * math.sqrt(logprobs.shape[0]), {}

    nodes = {n["name"]: n for n in trace_loss(loss, {"logprobs": 1}).graph["nodes"]}
    assert nodes["to"]["kwargs"] == {
        "device": {"device": "cpu"},
        "memory_format": {"memory_format": "contiguous_format"},
    }
    assert nodes["getattr_1"]["target"] == "getattr"
    assert nodes["getattr_1"]["args"] == [{"ref": "logprobs"}, "shape"]
    assert nodes["sqrt"]["target"] == "math.sqrt"


def total(logprobs: Any) -> Any:
    return logprobs.sum(), {}


CAPTURED = torch.ones(3)
LAYER = torch.nn.Linear(3, 1)
ONE = {"logprobs": 1}

BAD_LOSSES: Dict[str, Tuple[Any, Any, str]] = {
    "no function": (7, ONE, "not a function"),
    "no logprobs": (lambda x: (x.sum(), {}), {"x": 1}, "logprobs first"),
    "a default": (lambda logprobs, x=1: (logprobs.sum(), {}), {**ONE, "x": 1}, "default"),
    "a star": (lambda logprobs, *x: (logprobs.sum(), {}), ONE, "positional"),
    "a keyword": (lambda logprobs, *, x: (logprobs.sum(), {}), {**ONE, "x": 1}, "positional"),
    "a name in capitals": (lambda logprobs, X: (logprobs.sum(), {}), {**ONE, "X": 1}, "lower"),
    "a missing rank": (total, {}, "input_ranks"),
    "a rank too many": (total, {**ONE, "x": 1}, "input_ranks"),
    "a scalar of logprobs": (total, {"logprobs": 0}, "one of"),
    "a high rank": (lambda logprobs, x: (x.sum(), {}), {**ONE, "x": 3}, "one of"),
    "a captured tensor": (lambda logprobs: ((logprobs * CAPTURED).sum(), {}), ONE, "parameters"),
    "a module": (lambda logprobs: (LAYER(logprobs).sum(), {}), ONE, "traced|module|parameters"),
    "a number": (lambda logprobs: (logprobs.sum().item(), {}), ONE, r"\.item"),
    "backward": (lambda logprobs: (logprobs.sum().backward(), {}), ONE, r"\.backward"),
    "an if": (lambda logprobs: (logprobs if logprobs.sum() > 0 else -logprobs, {}), ONE, "traced"),
    "a foreign function": (lambda logprobs: (abs_of(logprobs), {}), ONE, "abs_of"),
    "no pair": (lambda logprobs: logprobs.sum(), ONE, "return"),
    "no dict": (lambda logprobs: (logprobs.sum(), [1]), ONE, "return"),
    "no tensor": (lambda logprobs: (1.0, {}), ONE, "return"),
    "a bad metric": (lambda logprobs: (logprobs.sum(), {"loss:sum": 1}), ONE, "custom/"),
    "a bad reduction": (lambda logprobs: (logprobs.sum(), {"custom/x:max": 1}), ONE, "custom/"),
}


def abs_of(value: Any) -> Any:
    return abs(value)


torch.fx.wrap("abs_of")


@pytest.mark.parametrize("what", BAD_LOSSES)
def test_a_function_that_cannot_be_traced_is_refused_before_anything_is_sent(
    scripted: ServiceClient, routes: TinkerRoutes, what: str
) -> None:
    fn, ranks, message = BAD_LOSSES[what]
    before = routes.count()
    with pytest.raises(InvalidInputError, match=message):
        scripted.create_custom_loss(fn, ranks)
    assert routes.count() == before


def test_a_loss_has_at_most_sixteen_parameters() -> None:
    def source(count: int) -> Any:
        names = ["logprobs", *(f"x{i}" for i in range(count - 1))]
        fn = eval(f"lambda {', '.join(names)}: (logprobs.sum(), {{}})")
        return fn, dict.fromkeys(names, 1)

    assert len(trace_loss(*source(16)).inputs) == 16
    with pytest.raises(InvalidInputError, match="at most 16"):
        trace_loss(*source(17))


def test_threads_may_trace_in_parallel() -> None:
    graphs: List[Any] = []
    barrier = threading.Barrier(4)

    def trace() -> None:
        barrier.wait(PATIENCE_S)
        graphs.extend(trace_loss(clipped, RANKS) for _ in range(5))

    threads = [threading.Thread(target=trace) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(graphs) == 20
    assert all(graph == graphs[0] for graph in graphs)


# Computed by the client


def test_without_the_flag_a_loss_is_computed_by_the_client(
    scripted: ServiceClient, scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    handle = scripted.create_custom_loss(clipped, RANKS)
    assert isinstance(handle, LossHandle)
    assert handle.result(timeout=0) is handle
    assert handle.loss_id is None
    assert "computed here" in repr(handle)
    data = [datum(1), datum(2, length=4)]
    output = scripted_trainer.forward_backward_custom(data, handle).result(PATIENCE_S)
    # The scripted server's logprobs are all -1: min(-a, 2) over a = 0, 1, 2 and 0, 1, 2, 3.
    assert output.metrics == {
        "loss:sum": 9.0,
        "surrogate_loss:sum": 2.0,
        "custom/gain:sum": -9.0,
        "custom/tokens:mean": 3.5,
    }
    assert len(output.loss_fn_outputs) == 2
    assert passes(routes) == [(1, True), (2, False)]
    second = routes.submitted("forward_backward")[1]
    assert second.loss_fn == "cross_entropy"
    weights = [d.loss_fn_inputs["weights"].tolist() for d in second.data]
    assert weights == [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]]


def test_the_first_pass_has_weights_of_zero_if_there_are_none(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    data = [datum(1), datum(2, weights=[1.0, 0.0, 1.0])]
    loss = lambda d, p: (p[0].sum() + p[1].sum(), {})  # noqa: E731
    scripted_trainer.forward_backward_custom(data, loss).result(PATIENCE_S)
    first = routes.submitted("forward_backward")[0]
    assert [sorted(d.loss_fn_inputs) for d in first.data] == [["target_tokens", "weights"]] * 2
    weights = [d.loss_fn_inputs["weights"].tolist() for d in first.data]
    assert weights == [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]


def test_the_metrics_of_a_loss_may_be_numbers_of_any_kind(scripted_trainer: TrainingClient) -> None:
    import torch

    def loss(data: Any, logprobs: Any) -> Any:
        return logprobs[0].sum(), {
            "count": 3,
            "numpy": np.float32(0.5),
            "total": logprobs[0].sum(),
            "one": torch.tensor([2.0]),
            "each": logprobs[0] * 2,
            "text": "1.5",
            "nested": {"a": [1, None]},
            "nothing": None,
            7: True,
        }

    metrics = dict(
        scripted_trainer.forward_backward_custom([datum()], loss).result(PATIENCE_S).metrics
    )
    each: Any = metrics.pop("each")
    assert each.tolist() == [-2.0, -2.0, -2.0]
    assert not each.requires_grad
    assert metrics == {
        "loss:sum": -3.0,
        "surrogate_loss:sum": 1.0,
        "count": 3.0,
        "numpy": 0.5,
        "total": -3.0,
        "one": 2.0,
        "text": "1.5",
        "nested": {"a": [1, None]},
        "nothing": None,
        "7": 1.0,
    }
    assert {type(metrics[name]) for name in ("count", "numpy", "total", "one", "7")} == {float}


def test_both_passes_carry_the_provenance(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    spans = [types.PromptProvenanceSpan("q", length=1), types.SampledProvenanceSpan("q", length=2)]
    annotated = datum(1).with_provenance(spans, spans)
    loss = lambda d, p: (p[0].sum(), {})  # noqa: E731
    scripted_trainer.forward_backward_custom([annotated], loss).result(PATIENCE_S)
    sent = [batch.data[0] for batch in routes.submitted("forward_backward")]
    assert len(sent) == 2
    assert {d.model_input_spans for d in sent} == {d.loss_fn_input_spans for d in sent}
    assert {d.model_input_spans for d in sent} == {tuple(spans)}


@pytest.mark.parametrize("missing", ["advantages", "clip", "target_tokens"])
def test_a_missing_input_of_the_loss_is_reported_before_anything_is_sent(
    scripted: ServiceClient, scripted_trainer: TrainingClient, routes: TinkerRoutes, missing: str
) -> None:
    handle = scripted.create_custom_loss(clipped, RANKS)
    inputs = {k: v for k, v in datum().loss_fn_inputs.items() if k != missing}
    before = routes.count()
    bare = types.Datum(datum().model_input, inputs)
    wide = datum(clip=np.ones((1, 2), np.float32))
    with pytest.raises(InvalidInputError, match=missing):
        scripted_trainer.forward_backward_custom([datum(), bare], handle)
    with pytest.raises(InvalidInputError, match="'clip' has 2 dimensions"):
        scripted_trainer.forward_backward_custom([wide], handle)
    assert routes.count() == before


def test_a_loss_that_is_not_a_single_number_is_refused(
    scripted: ServiceClient, scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    handle = scripted.create_custom_loss(lambda logprobs: (logprobs * 2, {}), ONE)
    with pytest.raises(InvalidInputError, match=r"shape \(3,\)"):
        scripted_trainer.forward_backward_custom([datum()], handle).result(PATIENCE_S)
    assert passes(routes) == [(1, True)]


def test_logprobs_of_another_shape_than_the_targets_are_an_error(
    scripted_trainer: TrainingClient,
) -> None:
    two_deep = datum(target_tokens=np.ones((3, 2), np.int64))
    loss = lambda d, p: (p[0].sum(), {})  # noqa: E731
    with pytest.raises(ResponseDecodeError, match=r"shape \(3,\).*shape \(3, 2\)"):
        scripted_trainer.forward_backward_custom([two_deep], loss).result(PATIENCE_S)


def test_the_deprecated_argument_warns_and_has_no_effect(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    loss = lambda d, p: (p[0].sum(), {})  # noqa: E731
    with pytest.warns(DeprecationWarning, match="loss_type_input"):
        future = scripted_trainer.forward_backward_custom(
            [datum()], loss, loss_type_input="logprobs"
        )
    assert future.result(PATIENCE_S).metrics["loss:sum"] == -3.0
    assert passes(routes) == [(1, True), (2, False)]


def test_a_name_is_not_taken_for_a_function(scripted_trainer: TrainingClient) -> None:
    name: Any = "cross_entropy"
    with pytest.raises(InvalidInputError, match="not a function"):
        scripted_trainer.forward_backward_custom([datum()], name)


# Uploaded


def test_a_server_that_accepts_losses_gets_the_graph_and_computes_them(
    flagged: ServiceClient, routes: TinkerRoutes
) -> None:
    handle = flagged.create_custom_loss(clipped, RANKS)
    assert handle.loss_id == "loss-7"
    (sent,) = routes.submitted("create_custom_loss")
    assert sent == {
        "session_id": "session-1",
        "custom_loss_seq_id": 0,
        "name": "clipped",
        "inputs": [
            {"name": "logprobs", "rank": 1},
            {"name": "advantages", "rank": 1},
            {"name": "clip", "rank": 0},
        ],
        "graph": trace_loss(clipped, RANKS).graph,
        "type": "create_custom_loss",
    }
    trainer = flagged.create_lora_training_client("base")
    data = [datum()]
    output = trainer.forward_backward_custom(data, handle).result(PATIENCE_S)
    (batch,) = routes.submitted("forward_backward")
    assert (batch.seq_id, batch.loss_fn, batch.forward_only) == (1, "custom", False)
    assert batch.loss_fn_config == {"loss_id": "loss-7"}
    assert batch.data == data
    assert output.metrics == {"loss:sum": 1.0}


def test_losses_have_seq_ids_and_each_is_created_once(
    flagged: ServiceClient, routes: TinkerRoutes
) -> None:
    flagged.create_custom_loss(clipped, RANKS)
    with pytest.raises(InvalidInputError, match="'clipped' was created in this session before"):
        flagged.create_custom_loss(clipped, RANKS)
    flagged.create_custom_loss(total, {"logprobs": 1})
    flagged.create_custom_loss(total, {"logprobs": 2})  # another loss, with other inputs
    numbers = [body["custom_loss_seq_id"] for body in routes.submitted("create_custom_loss")]
    assert numbers == [0, 1, 2]


def test_an_interrupted_upload_can_be_repeated(
    flagged: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = APIFuture.result

    def interrupted(future: APIFuture[Any], timeout: Optional[float] = None) -> Any:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return result(future, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(APIFuture, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flagged.create_custom_loss(clipped, RANKS)
    assert flagged.create_custom_loss(clipped, RANKS).loss_id == "loss-7"


def test_a_failed_upload_can_be_repeated(flagged: ServiceClient, routes: TinkerRoutes) -> None:
    routes.serve(
        "create_custom_loss",
        Answer(400, {"detail": "too many nodes"}),
        accepted("loss-request"),
    )
    with pytest.raises(BadRequestError, match="too many nodes"):
        flagged.create_custom_loss(clipped, RANKS)
    assert flagged.create_custom_loss(clipped, RANKS).loss_id == "loss-7"


def test_a_server_that_sets_the_flag_but_lacks_the_route_is_tried_once(
    flagged: ServiceClient, routes: TinkerRoutes
) -> None:
    routes.serve("create_custom_loss", Answer(404, {"detail": "Not Found"}))
    assert flagged.create_custom_loss(clipped, RANKS).loss_id is None
    assert flagged.create_custom_loss(total, ONE).loss_id is None
    assert len(routes.submitted("create_custom_loss")) == 1


def test_a_server_that_does_not_report_its_flags_gets_no_losses(
    server: ScriptedServer, routes: TinkerRoutes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)  # with a key, the session needs the flags
    routes.serve("client/config", Answer(500, {"detail": "broken"}))
    with ServiceClient(base_url=server.url) as client:
        assert client.create_custom_loss(clipped, RANKS).loss_id is None
    assert routes.submitted("create_custom_loss") == []


def test_in_another_session_an_uploaded_loss_is_computed_by_the_client(
    flagged: ServiceClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    handle = flagged.create_custom_loss(clipped, RANKS)
    routes.serve("create_session", Answer(body={"session_id": "session-2"}))
    routes.serve("sessions/session-2/finish", Answer(body={}))
    with ServiceClient(base_url=server.url) as other:
        trainer = other.create_lora_training_client("base")
        trainer.forward_backward_custom([datum()], handle).result(PATIENCE_S)
    assert passes(routes) == [(1, True), (2, False)]


# A gradient in several parts


def number_of(received: Received) -> int:
    codec = codec_for(received.headers["content-type"])
    return codec.decode_forward_backward(received.body).seq_id


def fail_at(routes: TinkerRoutes, seq_id: int, answer: Answer) -> None:
    """Have the server refuse the pass with that number."""

    def step(received: Received) -> Answer:
        return answer if number_of(received) == seq_id else routes.accept_pass(received)

    routes.serve("forward_backward", step)


def lose_at(routes: TinkerRoutes, seq_id: int, **failure: Any) -> None:
    """Have the server accept the pass with that number, and fail it."""

    def step(received: Received) -> Answer:
        taken = routes.accept_pass(received)
        if number_of(received) == seq_id:
            routes.results[taken.body["request_id"]] = Answer(body=failure)
        return taken

    routes.serve("forward_backward", step)


def both(data: Any, logprobs: Any) -> Any:
    return logprobs[0].sum() + logprobs[1].sum(), {}


def test_a_gradient_in_parts_is_sent_completely(
    in_parts: TrainingClient, routes: TinkerRoutes
) -> None:
    data = [datum(1), datum(2)]
    output = in_parts.forward_backward_custom(data, both).result(PATIENCE_S)
    assert passes(routes) == [(1, True), (2, True), (3, False), (4, False)]
    assert len(output.loss_fn_outputs) == 2
    assert output.metrics == {"loss:sum": -6.0, "surrogate_loss:sum": 2.0}


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_after_a_partly_added_gradient_the_run_can_be_saved_but_not_trained(
    in_parts: TrainingClient, routes: TinkerRoutes, how: str
) -> None:
    if how == "refused":
        fail_at(routes, 4, Answer(400, {"detail": "no more"}))
    else:
        lose_at(routes, 4, error="no more", category="server")
    custom = in_parts.forward_backward_custom([datum(1), datum(2)], both)
    queued = in_parts.optim_step(ADAM)  # requested before the failure was known
    with pytest.raises(IncompleteGradientError, match=r"1 of 2 parts.*no more") as caught:
        custom.result(PATIENCE_S)
    assert isinstance(caught.value.__cause__, (BadRequestError, RequestFailedError))
    assert "create_training_client_from_state_with_optimizer" in str(caught.value)
    for call in (
        lambda: queued,
        lambda: in_parts.optim_step(ADAM),
        lambda: in_parts.forward_backward([datum()], "cross_entropy"),
        lambda: in_parts.forward_backward_custom([datum()], lambda d, p: (p[0].sum(), {})),
    ):
        with pytest.raises(IncompleteGradientError, match=MODEL):
            call().result(PATIENCE_S)
    assert routes.submitted("optim_step") == []
    assert in_parts.save_state("rescue").result(PATIENCE_S).path
    in_parts.forward([datum()], "cross_entropy").result(PATIENCE_S)
    assert routes.seq_ids() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_if_nothing_of_a_gradient_was_added_the_run_stays_usable(
    in_parts: TrainingClient, routes: TinkerRoutes, how: str
) -> None:
    if how == "refused":
        fail_at(routes, 3, Answer(400, {"detail": "none of it"}))
        with pytest.raises(BadRequestError, match="none of it"):
            in_parts.forward_backward_custom([datum(1), datum(2)], both).result(PATIENCE_S)
        assert passes(routes)[2:] == [(3, False)]  # the second part was not sent the first time
    else:
        answers = [Answer(400, {"detail": "none"})] * 2
        routes.serve("forward_backward", routes.accept_pass, routes.accept_pass, *answers)
        with pytest.raises(BadRequestError):
            in_parts.forward_backward_custom([datum(1), datum(2)], both).result(PATIENCE_S)
    in_parts.optim_step(ADAM).result(PATIENCE_S)


def test_a_part_that_may_have_been_added_counts_as_added(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve("client/config", Answer(body={"fwdbwd_max_chunk_len": 1}))
    fail_at(routes, 3, Answer(502, {"detail": "bad gateway"}))
    with ServiceClient(base_url=server.url, max_outage_s=0.1, wire="protobuf") as client:
        trainer = client.create_lora_training_client("base")
        with pytest.raises(IncompleteGradientError, match="0 of 2 parts") as caught:
            trainer.forward_backward_custom([datum(1), datum(2)], both).result(PATIENCE_S)
        assert isinstance(caught.value.__cause__, InternalServerError)


def test_a_gradient_in_one_part_is_added_or_not_and_the_run_continues(
    scripted_trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    lose_at(routes, 2, error="out of memory", category="server")
    with pytest.raises(RequestFailedError, match="out of memory"):
        scripted_trainer.forward_backward_custom([datum(1), datum(2)], both).result(PATIENCE_S)
    scripted_trainer.optim_step(ADAM).result(PATIENCE_S)


def test_a_cancel_does_not_interrupt_a_gradient_in_parts(
    in_parts: TrainingClient, routes: TinkerRoutes
) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def step(received: Received) -> Answer:
        taken = routes.accept_pass(received)
        if number_of(received) == 3:
            arrived.set()
            taken = Answer(body=taken.body, hold=go_on)
        return taken

    routes.serve("forward_backward", step)
    custom = in_parts.forward_backward_custom([datum(1), datum(2)], both)
    assert arrived.wait(PATIENCE_S)
    assert custom.cancel()
    go_on.set()
    in_parts.optim_step(ADAM).result(PATIENCE_S)
    assert passes(routes)[2:] == [(3, False), (4, False)]
