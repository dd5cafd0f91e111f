"""The JSON dialect: its exact form, and the variations of servers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tinkex._sampling.sample_checks import align_prompt_logprobs
from tinkex.errors import InvalidInputError, ResponseDecodeError
from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ImageAssetPointerChunk,
    ModelInput,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
)
from tinkex.wire.json_codec import JSON


def request(**changes) -> ForwardBackwardRequest:
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1, 0.1]})
    facts = {"model_id": "m", "seq_id": 4, "data": [datum], "loss_fn": "cross_entropy"}
    return ForwardBackwardRequest(**{**facts, **changes})


def samples(**fields) -> SampleResponse:
    body = {"sequences": [{"stop_reason": "stop", "tokens": [1]}], **fields}
    return JSON.decode_samples(json.dumps(body).encode())


def test_the_body_has_exactly_the_legacy_form():
    assert json.loads(JSON.encode_forward_backward(request())) == {
        "forward_backward_input": {
            "data": [
                {
                    "model_input": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
                    "loss_fn_inputs": {
                        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
                        "weights": {"data": [1.0, 0.1], "dtype": "float32", "shape": [2]},
                    },
                }
            ],
            "loss_fn": "cross_entropy",
        },
        "model_id": "m",
        "seq_id": 4,
    }


def test_a_forward_pass_has_its_own_key():
    body = json.loads(JSON.encode_forward_backward(request(forward_only=True)))
    assert sorted(body) == ["forward_input", "model_id", "seq_id"]


def test_a_body_with_both_keys_is_refused():
    body = json.loads(JSON.encode_forward_backward(request()))
    body["forward_input"] = body["forward_backward_input"]
    with pytest.raises(InvalidInputError, match="expected one of"):
        JSON.decode_forward_backward(json.dumps(body).encode())


@pytest.mark.parametrize("field", ["model_id", "seq_id"])
def test_a_missing_field_is_named(field):
    body = json.loads(JSON.encode_forward_backward(request()))
    del body[field]
    with pytest.raises(InvalidInputError, match=field):
        JSON.decode_forward_backward(json.dumps(body).encode())


def test_an_asset_pointer_can_be_written():
    chunk = ImageAssetPointerChunk("png", "https://example.org/x.png", 7)
    sent = request(data=[Datum(ModelInput([chunk]), {})])
    assert JSON.decode_forward_backward(JSON.encode_forward_backward(sent)) == sent


def test_provenance_has_no_json_form_and_the_error_says_what_to_do():
    datum = Datum(ModelInput.from_ints([1]), {"target_tokens": [2]}).with_provenance(
        [PromptProvenanceSpan("q", length=1)], [SampledProvenanceSpan("q", length=1)]
    )
    request = ForwardBackwardRequest("m", 1, [datum], "stable_reinforce")
    with pytest.raises(InvalidInputError, match="no JSON form") as caught:
        JSON.encode_forward_backward(request)
    assert "leave the spans out" in str(caught.value)


def test_a_sparse_tensor_is_written_dense():
    sparse = TensorData([5], "int64", (2, 2), [0, 0, 1], [1])
    sent = request(data=[Datum(ModelInput.from_ints([1, 2]), {"target_tokens": sparse})])
    body = json.loads(JSON.encode_forward_backward(sent))
    inputs = body["forward_backward_input"]["data"][0]["loss_fn_inputs"]
    assert inputs["target_tokens"] == {"data": [0, 0, 0, 5], "dtype": "int64", "shape": [2, 2]}


@pytest.mark.parametrize("metrics", ["", '"metrics": null,', '"metrics": {},'])
def test_missing_metrics_are_an_empty_map(metrics):
    body = b'{"loss_fn_output_type": null, %s "loss_fn_outputs": []}' % metrics.encode()
    assert JSON.decode_output(body) == ForwardBackwardOutput([], {}, "")


def test_unknown_fields_are_ignored():
    body = b'{"loss_fn_outputs": [], "metrics": {"a": 1}, "type": "x", "new": [{}]}'
    assert JSON.decode_output(body).metrics == {"a": 1.0}


def test_null_numbers_are_nan():
    body = (
        b'{"loss_fn_outputs": [{"logprobs": {"data": [null, -1], "dtype": "float32",'
        b' "shape": [2]}}], "metrics": {"loss:sum": null}}'
    )
    output = JSON.decode_output(body)
    np.testing.assert_array_equal(
        output.loss_fn_outputs[0]["logprobs"].to_numpy(), np.float32([math.nan, -1])
    )
    assert math.isnan(output.metrics["loss:sum"])


def test_a_server_that_writes_bare_nan_is_understood():
    body = b'{"loss_fn_outputs": [], "metrics": {"a": NaN, "b": -Infinity}}'
    metrics = JSON.decode_output(body).metrics
    assert math.isnan(metrics["a"])
    assert metrics["b"] == -math.inf


def test_numbers_that_are_not_finite_are_written_as_null():
    output = ForwardBackwardOutput(
        [{"x": TensorData(np.float32([math.nan, math.inf, 1]))}], {"m:sum": math.inf}
    )
    body = json.loads(JSON.encode_output(output))
    assert body["loss_fn_outputs"][0]["x"]["data"] == [None, None, 1.0]
    assert body["metrics"] == {"m:sum": None}


def test_any_stop_reason_is_kept():
    sequences = [{"stop_reason": "content_filter", "tokens": []}]
    assert samples(sequences=sequences).sequences[0].stop_reason == "content_filter"


def test_strided_arrays_are_written_too():
    tokens = np.arange(6, dtype=np.int64)[::2]
    body = JSON.encode_samples(SampleResponse([SampledSequence("stop", tokens, -tokens / 2)]))
    sequence = JSON.decode_samples(body).sequences[0]
    assert sequence.tokens == [0, 2, 4]
    assert sequence.logprobs == [0.0, -1.0, -2.0]


def test_sequence_ids_are_transmitted():
    sequence = SampledSequence("stop", np.int32([1]), sequence_id="q-7")
    received = JSON.decode_samples(JSON.encode_samples(SampleResponse([sequence])))
    assert received.sequences[0].sequence_id == "q-7"


def test_fewer_logprobs_than_tokens_are_refused():
    with pytest.raises(ResponseDecodeError, match="1 logprobs for 2 sampled tokens"):
        samples(sequences=[{"stop_reason": "stop", "tokens": [1, 2], "logprobs": [-1.0]}])


def test_ragged_topk_rows_are_filled_up_with_the_sentinel():
    response = samples(topk_prompt_logprobs=[None, [[5, -0.5]], [[6, -0.25], [7, -2.0]]])
    topk = response.topk_prompt_logprobs_np
    assert topk.token_ids.tolist() == [[0, 0], [5, 0], [6, 7]]
    assert topk.logprobs.tolist() == [[-99999, -99999], [-0.5, -99999], [-0.25, -2.0]]
    assert response.topk_prompt_logprobs == [None, [(5, -0.5)], [(6, -0.25), (7, -2.0)]]


@pytest.mark.parametrize(
    "row", [[[1]], [[1, 2, 3]], [[-1, -0.5]], [[1.5, -0.5]], [[2**31, -0.5]], [[None, -0.5]], [5]]
)
def test_a_topk_cell_that_is_not_a_token_and_logprob_is_refused(row):
    with pytest.raises(ResponseDecodeError):
        samples(topk_prompt_logprobs=[row])


def test_numbers_beyond_float32_are_infinite():
    response = samples(prompt_logprobs=[-1e300], topk_prompt_logprobs=[[[1, -1e300]]])
    assert response.prompt_logprobs == [-math.inf]
    assert response.topk_prompt_logprobs == [[(1, -math.inf)]]
    target = {"data": [-1e300], "dtype": "float32", "shape": [1]}
    received = samples(target_prompt_logprobs=target).target_prompt_logprobs
    assert received.data == [-math.inf]


@pytest.mark.parametrize("rows", [None, [], [None, None], [[], []]])
def test_topk_rows_without_cells_are_none(rows):
    assert samples(topk_prompt_logprobs=rows).topk_prompt_logprobs_np is None


# ---- Servers send n prompt logprobs, or n - 1 ----


@pytest.mark.parametrize("sent", [[None, -1.0, -2.0], [-1.0, -2.0], [0.0, -1.0, -2.0]])
def test_prompt_logprobs_are_aligned_to_the_prompt(sent):
    response = align_prompt_logprobs(samples(prompt_logprobs=sent), prompt_length=3)
    assert response.prompt_logprobs == [None, -1.0, -2.0]
    assert response.prompt_logprobs_np.dtype == np.float32


@pytest.mark.parametrize("sent", [[None, [[4, -1.0]]], [[[4, -1.0]]]])
def test_topk_rows_are_aligned_to_the_prompt(sent):
    response = align_prompt_logprobs(samples(topk_prompt_logprobs=sent), prompt_length=2)
    assert response.topk_prompt_logprobs == [None, [(4, -1.0)]]
    assert response.topk_prompt_logprobs_np.token_ids.dtype == np.int32


@pytest.mark.parametrize("length", [0, 1, 4])
def test_prompt_logprobs_that_cannot_be_aligned_are_refused(length):
    with pytest.raises(ResponseDecodeError, match=f"2 rows .* {length} tokens"):
        align_prompt_logprobs(samples(prompt_logprobs=[-1.0, -2.0]), prompt_length=length)


def test_aligning_changes_neither_the_original_nor_absent_values():
    response = samples(prompt_logprobs=[0.0, -1.0])
    align_prompt_logprobs(response, prompt_length=2)
    assert response.prompt_logprobs == [0.0, -1.0]
    assert align_prompt_logprobs(samples(), prompt_length=5).prompt_logprobs is None
