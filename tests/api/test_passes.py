"""Passes over a batch, through the public client: the request in both dialects, and its results."""

from __future__ import annotations

import base64
import math
from typing import Any, Dict, Iterator, List

import numpy as np
import pytest
from api.endpoint import KEY
from support.scripted_server import Answer, Received, ScriptedServer
from support.tinker_routes import API, MODEL, TinkerRoutes

import tinkex
from tinkex import types
from tinkex.errors import ResponseDecodeError
from tinkex.retry import MAX_DAMAGED
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

PASS, FORWARD = f"POST {API}forward_backward", f"POST {API}forward"
POLL = f"POST {API}retrieve_future"

TEXT = types.Datum(
    types.ModelInput.from_ints([1, 2, 300]),
    {"target_tokens": [2, 300, 4], "weights": np.array([1, 0.5, 0], np.float32)},
)
PICTURE = types.Datum(
    types.ModelInput(
        [types.EncodedTextChunk([7]), types.ImageChunk(b"\x89P", "png", expected_tokens=2)]
    ),
    {"target_tokens": types.TensorData([[5, 6], [7, 8], [9, 10]])},
)
CONFIG = {"clip_low_threshold": 0.8, "tag": "x"}
IN_JSON: List[Dict[str, Any]] = [
    {
        "model_input": {"chunks": [{"tokens": [1, 2, 300], "type": "encoded_text"}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [2, 300, 4], "dtype": "int64", "shape": [3]},
            "weights": {"data": [1.0, 0.5, 0.0], "dtype": "float32", "shape": [3]},
        },
    },
    {
        "model_input": {
            "chunks": [
                {"tokens": [7], "type": "encoded_text"},
                {
                    "data": base64.b64encode(b"\x89P").decode(),
                    "format": "png",
                    "expected_tokens": 2,
                    "type": "image",
                },
            ]
        },
        "loss_fn_inputs": {
            "target_tokens": {"data": [5, 6, 7, 8, 9, 10], "dtype": "int64", "shape": [3, 2]}
        },
    },
]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        TinkerRoutes(scripted)
        yield scripted


def trained(
    server: ScriptedServer, wire: str, method: str, *args: Any
) -> types.ForwardBackwardOutput:
    with tinkex.ServiceClient(base_url=server.url, api_key=KEY, wire=wire) as service:
        trainer = service.create_lora_training_client("b", rank=8)
        output: types.ForwardBackwardOutput = getattr(trainer, method)(*args).result()
        return output


def only(requests: List[Received]) -> Received:
    (request,) = requests
    assert request.headers["x-api-key"] == KEY
    assert request.headers["x-idempotency-key"]
    return request


def test_forward_backward_in_json(server: ScriptedServer) -> None:
    trained(server, "json", "forward_backward", [TEXT, PICTURE], "ppo", CONFIG)
    request = only(server.requests(PASS))
    assert request.headers["content-type"] == "application/json"
    assert request.json() == {
        "forward_backward_input": {"data": IN_JSON, "loss_fn": "ppo", "loss_fn_config": CONFIG},
        "model_id": MODEL,
        "seq_id": 1,
    }


def test_forward_in_json_is_a_route_of_its_own(server: ScriptedServer) -> None:
    trained(server, "json", "forward", [TEXT], "cross_entropy")
    request = only(server.requests(FORWARD))
    assert request.json() == {
        "forward_input": {"data": IN_JSON[:1], "loss_fn": "cross_entropy"},
        "model_id": MODEL,
        "seq_id": 1,
    }


@pytest.mark.parametrize("method", ["forward", "forward_backward"])
def test_passes_in_protobuf_are_one_route(server: ScriptedServer, method: str) -> None:
    trained(server, "protobuf", method, [TEXT, PICTURE], "ppo", CONFIG)
    request = only(server.requests(PASS))
    assert request.headers["content-type"] == "application/x-protobuf"
    assert "content-encoding" not in request.headers
    expected = types.ForwardBackwardRequest(
        MODEL, 1, [TEXT, PICTURE], "ppo", CONFIG, forward_only=method == "forward"
    )
    assert request.body == PROTOBUF.encode_forward_backward(expected)


def test_protobuf_is_compressed_if_the_server_sets_the_flag(server: ScriptedServer) -> None:
    zstandard = pytest.importorskip("zstandard")
    server.on(f"POST {API}client/config", Answer(body={"proto_compress_fwdbwd": True}))
    server.on(PASS, Answer(body={"request_id": "r"}))
    server.on(POLL, Answer(body={"loss_fn_outputs": [{}], "metrics": {}, "model_id": MODEL}))
    trained(server, "protobuf", "forward_backward", [TEXT], "cross_entropy")
    request = only(server.requests(PASS))
    assert request.headers["content-encoding"] == "zstd"
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(request.body)
    expected = types.ForwardBackwardRequest(MODEL, 1, [TEXT], "cross_entropy", {})
    assert plain == PROTOBUF.encode_forward_backward(expected)


# Results

OUTPUT = types.ForwardBackwardOutput(
    [{"logprobs": types.TensorData(np.array([-1.0, -2.0, -3.0], np.float32))}],
    {"loss:sum": 6.0},
    "TorchLossReturn",
)


def answered(server: ScriptedServer, *answers: Answer) -> types.ForwardBackwardOutput:
    """Return the result of a pass over TEXT whose polls get *answers*."""
    server.on(PASS, Answer(body={"request_id": "work"}))
    steps = list(answers)

    def poll(received: Received) -> Answer:
        if received.json()["request_id"] != "work":
            return Answer(body={"model_id": MODEL})
        return steps.pop(0)

    server.on(POLL, poll)
    return trained(server, "protobuf", "forward_backward", [TEXT], "cross_entropy")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=JSON.encode_output(OUTPUT)),
        Answer(body=PROTOBUF.encode_output(OUTPUT), content_type="application/x-protobuf"),
        Answer(body=JSON.encode_output(OUTPUT), content_type="application/json; charset=utf-8"),
        Answer(201, JSON.encode_output(OUTPUT), use_gzip=True),
    ],
    ids=["json", "protobuf", "with a charset", "gzip"],
)
def test_a_result_is_decoded_by_its_content_type(server: ScriptedServer, answer: Answer) -> None:
    output = answered(server, answer)
    assert output.metrics == OUTPUT.metrics
    assert output.loss_fn_outputs == OUTPUT.loss_fn_outputs
    assert output.loss_fn_output_type == "TorchLossReturn"
    accepts = {r.headers["accept"] for r in server.requests(POLL) if b"work" in r.body}
    assert accepts == {"application/x-protobuf, application/json"}


@pytest.mark.parametrize("metrics", [None, {}, {"grad": 2}, {"a:b:c": 1.5}, {"x:unheard": 3.0}])
def test_metrics_of_any_name_survive(server: ScriptedServer, metrics: Any) -> None:
    outputs = [{"logprobs": {"data": [-1.0, -2.0, -3.0], "dtype": "float32", "shape": [3]}}]
    output = answered(server, Answer(body={"loss_fn_outputs": outputs, "metrics": metrics}))
    assert {name: output.metrics[name] for name in metrics or {}} == (metrics or {})
    assert all(type(value) is float for value in output.metrics.values())


def test_null_logprobs_are_nan(server: ScriptedServer) -> None:
    outputs = [{"logprobs": {"data": [None, -2.0, -3.0], "dtype": "float32", "shape": [3]}}]
    output = answered(server, Answer(body={"loss_fn_outputs": outputs, "metrics": {"m:sum": None}}))
    logprobs = output.loss_fn_outputs[0]["logprobs"].tolist()
    assert math.isnan(logprobs[0])
    assert logprobs[1:] == [-2.0, -3.0]
    assert math.isnan(output.metrics["m:sum"])


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body={"metrics": {}}),
        Answer(body={"loss_fn_outputs": [{"logprobs": {"data": ["x"]}}], "metrics": {}}),
        Answer(body=b"\xff\xff\xff", content_type="application/x-protobuf"),
        Answer(204, b""),
    ],
    ids=["no outputs", "no numbers", "broken protobuf", "nothing"],
)
def test_an_unreadable_result_is_reported_with_its_request(
    server: ScriptedServer, answer: Answer
) -> None:
    with pytest.raises(ResponseDecodeError):
        answered(server, *[answer] * MAX_DAMAGED)
