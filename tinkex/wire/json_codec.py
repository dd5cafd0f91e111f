"""The JSON encoding (docs/protocol.md, "JSON encoding"); orjson writes numpy buffers in C.

JSON has neither NaN nor infinity: orjson writes both as null, and null is read as NaN.
"""

from __future__ import annotations

import array
import dataclasses
import json
from itertools import chain
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Union

import orjson

from tinkex._runtime.late_import import np
from tinkex.errors import InvalidInputError, ResponseDecodeError
from tinkex.types import (
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    ModelInput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)
from tinkex.types._numbers import SHORT
from tinkex.types._wire import excerpt
from tinkex.types.sampling import TOPK_SENTINEL, tensor_from_json, tensor_to_json
from tinkex.types.tokens import as_tokens
from tinkex.wire.codec import JSON_CONTENT_TYPE, Parts, translating

if TYPE_CHECKING:
    import numpy.typing as npt

#: Key of the batch inside the body -> whether the pass is forward-only.
_INPUT_KEYS = {"forward_backward_input": False, "forward_input": True}


@dataclasses.dataclass(frozen=True)
class JsonCodec:
    """The `Codec` of ``application/json``."""

    name: str = "json"
    content_type: str = JSON_CONTENT_TYPE

    def encode_forward_backward(self, request: ForwardBackwardRequest) -> bytes:
        """Write the body of ``forward_backward``, or of ``forward`` for a forward-only pass.

        Sparse tensors are written as dense ones: servers that take JSON may not support them.
        """
        with translating(InvalidInputError, "this batch cannot be sent as JSON"):
            batch: Dict[str, Any] = {
                "data": [_datum_to_json(datum) for datum in request.data],
                "loss_fn": request.loss_fn,
            }
            # Leave out even an empty config: some servers reject unknown fields (docs/protocol.md,
            # "Bodies").
            if request.loss_fn_config:
                batch["loss_fn_config"] = dict(request.loss_fn_config)
            key = "forward_input" if request.forward_only else "forward_backward_input"
            return _dump({key: batch, "model_id": request.model_id, "seq_id": request.seq_id})

    def forward_backward_parts(self, request: ForwardBackwardRequest) -> Parts:
        """Write the same body as one part, as orjson copies the arrays anyway."""
        body = self.encode_forward_backward(request)
        return Parts([[body]], len(body))

    def decode_forward_backward(self, body: bytes) -> ForwardBackwardRequest:
        """Read the body of ``forward_backward`` or ``forward``, which have different keys."""
        with translating(InvalidInputError, "malformed JSON training request"):
            payload = _load_object(body)
            # The key, not the route, decides whether there is a backward pass: a body with both
            # keys would be ambiguous.
            keys = [key for key in _INPUT_KEYS if key in payload]
            if len(keys) != 1:
                raise ValueError(f"expected one of {' and '.join(_INPUT_KEYS)}")
            batch = payload[keys[0]]
            return ForwardBackwardRequest(
                model_id=_expect(payload, "model_id", str),
                seq_id=_expect(payload, "seq_id", int),
                data=[_datum_from_json(datum) for datum in _expect(batch, "data", list)],
                loss_fn=_expect(batch, "loss_fn", str),
                loss_fn_config=_loss_fn_config(batch.get("loss_fn_config")),
                forward_only=_INPUT_KEYS[keys[0]],
            )

    def size_of(self, datum: Datum) -> int:
        """Return the bytes of *datum* in a body; InvalidInputError if it has no JSON form."""
        with translating(InvalidInputError, "this datum cannot be sent as JSON"):
            return len(_dump(_datum_to_json(datum))) + 1  # the comma

    def encode_output(self, output: ForwardBackwardOutput) -> bytes:
        """Write the result of a pass."""
        with translating(InvalidInputError, "this output cannot be sent as JSON"):
            return _dump(
                {
                    "loss_fn_output_type": output.loss_fn_output_type,
                    "loss_fn_outputs": [
                        {name: tensor_to_json(tensor) for name, tensor in datum.items()}
                        for datum in output.loss_fn_outputs
                    ],
                    "metrics": output.metrics,
                }
            )

    def decode_output(self, body: bytes) -> ForwardBackwardOutput:
        """Read the result of a pass; missing or null metrics become an empty map."""
        with translating(ResponseDecodeError, "malformed JSON result of a pass"):
            payload = _load_object(body)
            return ForwardBackwardOutput(
                [
                    {name: tensor_from_json(tensor) for name, tensor in datum.items()}
                    for datum in _expect(payload, "loss_fn_outputs", list)
                ],
                {
                    name: float("nan") if value is None else _number(name, value)
                    for name, value in (payload.get("metrics") or {}).items()
                },
                payload.get("loss_fn_output_type") or "",
            )

    def encode_samples(self, response: SampleResponse) -> bytes:
        """Write the result of a sample request, without fields that are None."""
        with translating(InvalidInputError, "these samples cannot be sent as JSON"):
            payload: Dict[str, Any] = {
                "type": "sample",
                "sequences": [_sequence_to_json(sequence) for sequence in response.sequences],
                "prompt_cache_hit_tokens": response.prompt_cache_hit_tokens,
            }
            if response.prompt_logprobs_np is not None:
                payload["prompt_logprobs"] = _floats(response.prompt_logprobs_np)
            if response.topk_prompt_logprobs_np is not None:
                payload["topk_prompt_logprobs"] = response.topk_prompt_logprobs_np.rows()
            if response.target_prompt_logprobs is not None:
                target = tensor_to_json(response.target_prompt_logprobs)
                payload["target_prompt_logprobs"] = target
            draws = response.prompt_alt_tokens
            if draws is not None:
                payload["prompt_alt_tokens"] = {
                    "tokens": tensor_to_json(draws.tokens),
                    "logprobs": tensor_to_json(draws.logprobs),
                }
            return _dump(payload)

    def decode_samples(self, body: bytes) -> SampleResponse:
        """Read the result of a sample request; any ``stop_reason`` is accepted."""
        with translating(ResponseDecodeError, "malformed JSON result of a sample request"):
            payload = _load_object(body)
            target, draws = payload.get("target_prompt_logprobs"), payload.get("prompt_alt_tokens")
            return SampleResponse(
                sequences=[
                    _sequence_from_json(sequence)
                    for sequence in _expect(payload, "sequences", list)
                ],
                prompt_logprobs_np=_logprobs(payload.get("prompt_logprobs")),
                topk_prompt_logprobs_np=_topk_from_json(payload.get("topk_prompt_logprobs")),
                target_prompt_logprobs=None if target is None else tensor_from_json(target),
                prompt_cache_hit_tokens=int(payload.get("prompt_cache_hit_tokens") or 0),
                prompt_alt_tokens=None
                if draws is None
                else PromptAltTokens(
                    tensor_from_json(draws["tokens"]), tensor_from_json(draws["logprobs"])
                ),
            )


JSON = JsonCodec()


def _dump(payload: Dict[str, Any]) -> bytes:
    return orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)


def _load_object(body: bytes) -> Dict[str, Any]:
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        # NaN and Infinity are not JSON, but Python servers write them, and Python's json reads
        # them.
        if b"NaN" not in body and b"Infinity" not in body:
            raise
        try:
            payload = json.loads(body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
    if not isinstance(payload, dict):
        raise ValueError(f"expected an object, got {excerpt(payload, 100)}")
    return payload


def _expect(payload: Any, key: str, kind: type) -> Any:
    """Return ``payload[key]``; ValueError if it is missing or not of type *kind*."""
    value = payload.get(key) if isinstance(payload, dict) else None
    # bool is a subclass of int, and true is not a seq_id.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"field {key!r} should be of type {kind.__name__}, not {excerpt(value, 100)}"
        )
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    raise ValueError(f"metric {name!r} is not a number: {excerpt(value, 100)}")


# ---- Requests ----


def _datum_to_json(datum: Datum) -> Dict[str, Any]:
    if datum.model_input_spans is not None:
        raise InvalidInputError(
            "a Datum with provenance spans has no JSON form",
            hint="Use a server that takes protobuf, or leave the spans out.",
        )
    return {
        "model_input": datum.model_input.to_json(),
        "loss_fn_inputs": {
            name: tensor_to_json(TensorData._adopt(tensor._dense()) if tensor.is_sparse else tensor)
            for name, tensor in datum.loss_fn_inputs.items()
        },
    }


def _datum_from_json(payload: Any) -> Datum:
    inputs = _expect(payload, "loss_fn_inputs", dict)
    return Datum(
        ModelInput.from_json(payload.get("model_input")),
        {name: tensor_from_json(tensor) for name, tensor in inputs.items()},
    )


def _loss_fn_config(payload: Any) -> Dict[str, Union[float, str]]:
    config: Mapping[str, Any] = payload or {}
    for name, value in config.items():
        if not isinstance(value, (int, float, str)):
            raise ValueError(f"loss_fn_config {name!r} is neither a number nor a string")
    return dict(config)


# ---- Samples ----


def _floats(values: Any) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # values beyond float32 become infinity
        return np.ascontiguousarray(values, dtype=np.float32)


def _logprobs(values: Optional[List[Optional[float]]]) -> Any:
    """Return the values as a flat float32 array; None for an empty list, as in protobuf."""
    if not values:
        return None
    # Without numpy, which a program that only samples need not import.  Nulls take the slower path.
    if len(values) <= SHORT and {*map(type, values)} <= {float, int}:
        return array.array("f", values)
    logprobs = _floats(values)
    if logprobs.ndim != 1:
        raise ValueError(f"logprobs are not a flat list, but of shape {logprobs.shape}")
    return logprobs


def _sequence_to_json(sequence: SampledSequence) -> Dict[str, Any]:
    encoded: Dict[str, Any] = {
        "stop_reason": sequence.stop_reason,
        "tokens": np.ascontiguousarray(sequence.tokens_np, dtype=np.int32),
    }
    if sequence.logprobs_np is not None:
        encoded["logprobs"] = _floats(sequence.logprobs_np)
    if sequence.sequence_id is not None:
        encoded["sequence_id"] = sequence.sequence_id
    if sequence.topk_logprobs_np is not None:
        encoded["topk_logprobs"] = sequence.topk_logprobs_np.rows()
    return encoded


def _sequence_from_json(payload: Any) -> SampledSequence:
    tokens = as_tokens(_expect(payload, "tokens", list))
    logprobs = _logprobs(payload.get("logprobs"))
    if logprobs is not None and len(logprobs) != len(tokens):
        raise ValueError(f"{len(logprobs)} logprobs for {len(tokens)} sampled tokens")
    return SampledSequence(
        _expect(payload, "stop_reason", str),
        tokens,
        logprobs,
        payload.get("sequence_id"),
        _topk_from_json(payload.get("topk_logprobs")),
    )


def _topk_from_json(
    rows: Optional[Sequence[Optional[List[List[float]]]]],
) -> Optional[TopkLogprobs]:
    """Read ``[null or [[id, logprob], ...], ...]``; short rows are padded with the sentinel."""
    if not rows:
        return None
    # Put all cells into one array first: a Python loop over tokens would take longer than decoding.
    filled = [row or [] for row in rows]
    lengths = np.array([len(row) for row in filled])
    k = int(lengths.max())
    if k == 0:
        return None
    # float64 holds every int32 exactly; float32 would round token ids above 2**24.
    cells = np.array(list(chain.from_iterable(filled)), dtype=np.float64)
    if cells.shape != (int(lengths.sum()), 2):
        raise ValueError("a top-k cell is not a pair of token id and logprob")
    ids = cells[:, 0]
    if not bool(np.all((ids >= 0) & (ids <= 0x7FFFFFFF) & (ids == np.floor(ids)))):
        raise ValueError("a top-k cell does not begin with a token id")
    # The mask, of shape (rows, k), fills both arrays row by row, in the order of the cells.
    used = np.arange(k) < lengths[:, np.newaxis]
    token_ids = np.zeros(used.shape, dtype=np.int32)
    logprobs = np.full(used.shape, TOPK_SENTINEL, dtype=np.float32)
    token_ids[used] = ids
    logprobs[used] = _floats(cells[:, 1])
    return TopkLogprobs(token_ids, logprobs)
