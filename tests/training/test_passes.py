"""Passes: how batches are cut, and results that are uniform whatever the server sends."""

from __future__ import annotations

import logging
import math
from typing import Any, Dict, List, Optional

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, Answer, Received, ScriptedServer
from support.tinker_routes import API, TinkerRoutes

from tinkex import ServiceClient, TrainingClient, types
from tinkex._training.batch import Chunk, cross_entropy, cut, importance_sampling
from tinkex._transport.server_flags import ServerFlags
from tinkex.errors import ResponseDecodeError
from tinkex.types import PromptProvenanceSpan, TensorData
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

CONFIG = "client/config"


def datum(length: int = 4, weights: Optional[List[float]] = None) -> types.Datum:
    return types.Datum(
        types.ModelInput.from_ints(range(1, length + 1)),
        {"target_tokens": list(range(2, length + 2)), "weights": weights or [1.0] * length},
    )


@pytest.fixture
def trainer(scripted: ServiceClient) -> TrainingClient:
    return scripted.create_lora_training_client("base")


def answer_passes(routes: TinkerRoutes, **result: Any) -> None:
    """Answer every pass with *result*, as JSON."""
    body: Dict[str, Any] = {"loss_fn_output_type": "T", "metrics": {}, **result}
    accept = lambda received: routes.accepted("forward_backward", Answer(body=body))  # noqa: E731
    routes.serve("forward_backward", accept)


def logprobs(*values: Optional[float]) -> Dict[str, Any]:
    return {"logprobs": {"data": list(values), "dtype": "float32", "shape": [len(values)]}}


# Cutting


def sizes(chunks: List[Chunk]) -> List[int]:
    for chunk in chunks:
        assert chunk.nbytes == sum(datum.nbytes for datum in chunk.data)
    assert [chunk.first for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
    return [len(chunk.data) for chunk in chunks]


def test_a_batch_is_cut_by_the_limits_of_the_server() -> None:
    data = [datum() for _ in range(7)]
    assert sizes(cut(data, ServerFlags(), PROTOBUF)) == [7]
    assert sizes(cut(data, ServerFlags(fwdbwd_max_chunk_len=3), PROTOBUF)) == [3, 3, 1]
    two = 2 * data[0].nbytes
    assert sizes(cut(data, ServerFlags(fwdbwd_max_chunk_bytes_count=two), PROTOBUF)) == [2, 2, 2, 1]


def test_a_batch_is_also_cut_by_the_limits_of_the_caller() -> None:
    data = [datum() for _ in range(7)]
    flags = ServerFlags(fwdbwd_max_chunk_len=3)
    assert sizes(cut(data, flags, PROTOBUF, breaks=[1, 6])) == [1, 3, 2, 1]
    assert sizes(cut(data[2:], flags, PROTOBUF, first=2, breaks=[1, 2, 4, 7])) == [2, 3]


@pytest.mark.parametrize("length", [1, 100, 3000])
def test_bodies_keep_to_the_limit_in_either_encoding(length: int) -> None:
    tokens = np.random.default_rng(length).integers(100_000, 200_000, length)
    weights = np.random.default_rng(length).normal(size=length).astype(np.float32)
    one = types.Datum(
        types.ModelInput.from_ints(tokens), {"target_tokens": tokens, "weights": weights}
    )
    data, limit = [one] * 10, 4 * JSON.size_of(one)
    assert JSON.size_of(one) > one.nbytes
    flags = ServerFlags(fwdbwd_max_chunk_bytes_count=limit)
    for codec in (JSON, PROTOBUF):
        chunks = cut(data, flags, codec)
        assert sum(sizes(chunks)) == 10
        for chunk in chunks:
            request = types.ForwardBackwardRequest("m" * 50, 1, chunk.data, "cross_entropy")
            envelope = types.ForwardBackwardRequest("m" * 50, 1, [], "cross_entropy")
            body = codec.encode_forward_backward(request)
            assert len(body) - len(codec.encode_forward_backward(envelope)) <= limit
    assert sizes(cut(data, flags, JSON)) == [4, 4, 2]
    # While the encoding is not known, the larger size counts.
    assert sizes(cut(data, flags, None)) == [4, 4, 2]


def test_a_datum_without_a_json_form_is_measured_too() -> None:
    span = PromptProvenanceSpan("s", length=4)
    data = [datum().with_provenance([span], [span])] * 4
    flags = ServerFlags(fwdbwd_max_chunk_bytes_count=2 * data[0].nbytes)
    assert sizes(cut(data, flags, None)) == [2, 2]


@pytest.mark.usefixtures("without_key")
def test_the_flags_are_requested_with_the_first_pass(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve(CONFIG, Answer(body={"fwdbwd_max_chunk_len": 2}))
    trainer.optim_step(types.AdamParams()).result(PATIENCE_S)
    asked = len(server.requests(f"POST {API}{CONFIG}"))
    combined = trainer.forward_backward([datum(n) for n in (1, 2, 3)], "cross_entropy")
    assert len(combined.result(PATIENCE_S).loss_fn_outputs) == 3
    trainer.forward_backward([datum()], "cross_entropy").result(PATIENCE_S)
    assert [len(b.data) for b in routes.submitted("forward_backward")] == [2, 1, 1]
    assert routes.seq_ids() == [1, 2, 3, 4]
    assert len(server.requests(f"POST {API}{CONFIG}")) <= asked + 1


def test_a_pass_is_sent_even_if_the_flags_cannot_be_fetched(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes
) -> None:
    routes.serve(CONFIG, Answer(500, {"detail": "broken"}))
    for _ in range(2):
        trainer.forward_backward([datum()], "cross_entropy").result(PATIENCE_S)
    assert len(server.requests(f"POST {API}{CONFIG}")) == 1  # one try, for the life of the run


@pytest.mark.usefixtures("without_key")
def test_passes_are_compressed_if_the_server_asks_for_zstd(
    trainer: TrainingClient, server: ScriptedServer, routes: TinkerRoutes, scripted: ServiceClient
) -> None:
    plain = routes.accept_pass

    def accept(received: Received) -> Answer:
        if "content-encoding" in received.headers:
            return routes.accepted("forward_backward", Answer(body={"loss_fn_outputs": [{}]}))
        return plain(received)

    routes.serve(CONFIG, Answer(body={"proto_compress_fwdbwd": True}))
    routes.serve("forward_backward", accept)
    for _ in range(2):
        trainer.forward_backward([datum()], "ppo").result(PATIENCE_S)
    assert scripted.server_dialect.compression == "zstd"


# Results


@pytest.mark.parametrize("found", [0, 1, 3])
@pytest.mark.parametrize("call", ["forward", "forward_backward"])
def test_a_result_with_another_number_of_outputs_is_an_error(
    trainer: TrainingClient, routes: TinkerRoutes, call: str, found: int
) -> None:
    body = {"loss_fn_outputs": [logprobs(-1, -1, -1, -1)] * found, "metrics": {"loss:sum": 1.0}}
    for route in ("forward", "forward_backward"):
        routes.serve(route, lambda received: routes.accepted("a pass", Answer(body=body)))
    passed = getattr(trainer, call)([datum(), datum()], "cross_entropy")
    with pytest.raises(ResponseDecodeError, match=rf"returned {found} outputs? .* 2 datums"):
        passed.result(PATIENCE_S)


def test_a_result_whose_body_was_lost_is_an_error(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    # An empty protobuf message has no outputs; a gateway that drops the body produces one.
    empty = Answer(body=b"", content_type=PROTOBUF.content_type)
    routes.serve("forward_backward", lambda received: routes.accepted("a pass", empty))
    error = trainer.forward_backward([datum()], "cross_entropy").exception(PATIENCE_S)
    assert isinstance(error, ResponseDecodeError)
    assert "0 outputs for a batch of 1 datum" in str(error)


def test_the_loss_is_computed_if_the_server_does_not_report_it(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    answer_passes(routes, loss_fn_outputs=[logprobs(-1, -2, -3, -4)], metrics=None)
    pass_ = trainer.forward_backward([datum(weights=[1, 0.5, 0, 0])], "cross_entropy")
    assert pass_.result(PATIENCE_S).metrics == {"loss:sum": 2.0}
    # The server's value takes precedence, and the client cannot compute other losses.
    answer_passes(
        routes, loss_fn_outputs=[logprobs(-1, -2, -3, -4)], metrics={"loss:sum": 7, "x": 1}
    )
    metrics = trainer.forward_backward([datum()], "cross_entropy").result(PATIENCE_S).metrics
    assert metrics == {"loss:sum": 7.0, "x": 1.0}
    assert all(type(value) is float for value in metrics.values())
    answer_passes(routes, loss_fn_outputs=[logprobs(-1, -2, -3, -4)])
    assert trainer.forward_backward([datum()], "ppo").result(PATIENCE_S).metrics == {}


@pytest.mark.usefixtures("without_key")
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    routes.serve(CONFIG, Answer(body={"fwdbwd_max_chunk_len": 1}))
    answer_passes(routes, loss_fn_outputs=[logprobs(-1, -2, -3, -4)])
    combined = trainer.forward_backward([datum(), datum()], "cross_entropy").result(PATIENCE_S)
    assert combined.metrics == {"loss:sum": 20.0}


def rewarded(sampled: List[float], advantages: List[float]) -> types.Datum:
    inputs = {"target_tokens": [1] * len(sampled), "logprobs": sampled, "advantages": advantages}
    return types.Datum(types.ModelInput.from_ints([1] * len(sampled)), inputs)


def test_the_loss_of_importance_sampling_is_computed_too(
    trainer: TrainingClient, routes: TinkerRoutes
) -> None:
    answer_passes(routes, loss_fn_outputs=[logprobs(-1, -2, -3)], metrics={})
    batch = [rewarded([-1.0, -2.0 - math.log(2), 0.0], [1.0, -0.25, 0.0])]
    metrics = trainer.forward_backward(batch, "importance_sampling").result(PATIENCE_S).metrics
    assert metrics == {"loss:sum": pytest.approx(-(1.0 - 2 * 0.25))}


def test_the_loss_of_importance_sampling_needs_fitting_outputs() -> None:
    datum = rewarded([-1.0, -2.0], [1.0, 0.0])
    unknown = TensorData([-1.0, np.nan], "float32")
    assert importance_sampling([datum], [{"logprobs": unknown}]) == -1.0  # does not count
    assert importance_sampling([datum], []) is None
    assert importance_sampling([datum], [{}]) is None
    assert importance_sampling([datum], [{"logprobs": TensorData([-1.0], "float32")}]) is None
    far = rewarded([-1e4, -1e4], [1.0, 1.0])
    assert importance_sampling([far], [{"logprobs": TensorData([0.0, 0.0])}]) == -math.inf


def test_the_loss_needs_fitting_outputs() -> None:
    tensor = TensorData([-1.0, -2.0], "float32")
    bare = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})
    assert cross_entropy([bare], [{"logprobs": tensor}]) == 3.0  # without weights, all count
    assert cross_entropy([bare], []) is None
    assert cross_entropy([bare], [{"other": tensor}]) is None
    assert cross_entropy([datum(3)], [{"logprobs": tensor}]) is None
    unknown = TensorData([-1.0, np.nan], "float32")
    assert cross_entropy([datum(2, [1.0, 0.0])], [{"logprobs": unknown}]) == 1.0
    two = types.Datum(
        types.ModelInput.from_ints([1]),
        {
            "target_tokens": TensorData([1, 2], "int64", (1, 2)),
            "weights": TensorData([0.25, 0.5], "float32", (1, 2)),
        },
    )
    assert cross_entropy([two], [{"logprobs": TensorData([-4, -2], "float32", (1, 2))}]) == 2.0


def test_logprobs_that_are_null_stay_nan_with_one_warning(
    trainer: TrainingClient, routes: TinkerRoutes, caplog: pytest.LogCaptureFixture
) -> None:
    answer_passes(routes, loss_fn_outputs=[logprobs(-1, -2), logprobs(-1, None)])
    with caplog.at_level(logging.WARNING, "tinkex"):
        for _ in range(2):
            data = [datum(2), datum(2)]
            output = trainer.forward_backward(data, "cross_entropy").result(PATIENCE_S)
            values = output.loss_fn_outputs[1]["logprobs"].to_numpy()
            np.testing.assert_array_equal(values, np.array([-1, np.nan], np.float32))
            assert np.isnan(output.metrics["loss:sum"])
    (warned,) = [r.getMessage() for r in caplog.records if "NaN" in r.getMessage()]
    assert "beyond the model's vocabulary" in warned
    assert "data[1]" in warned
    assert trainer.model_id in warned


def test_a_step_without_metrics_has_none(trainer: TrainingClient, routes: TinkerRoutes) -> None:
    bare = Answer(body={"metrics": None})
    routes.serve("optim_step", lambda received: routes.accepted("optim_step", bare))
    assert trainer.optim_step(types.AdamParams()).result(PATIENCE_S).metrics == {}
