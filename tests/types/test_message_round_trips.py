"""Every control message is unchanged by a round trip; tests/wire tests the batches."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from datetime import datetime, timedelta, timezone
from typing import Any, Dict, List, Type, Union

import orjson
import pytest
from hypothesis import given, strategies as st
from support.properties import several

from tinkex import types
from tinkex.types import ModelInput, SampleRequest, SamplingParams, TensorData, UnknownVariant
from tinkex.types._wire import Wire

MESSAGES = sorted(
    {
        kind
        for kind in (getattr(types, name) for name in types.__all__)
        if inspect.isclass(kind) and issubclass(kind, Wire) and kind is not UnknownVariant
    },
    key=lambda kind: kind.__name__,
)

text = st.text(st.characters(codec="utf-8"), max_size=6)
numbers = st.floats(allow_nan=False, allow_infinity=False)
instants = st.datetimes(
    datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(timezone.utc)
) | st.builds(
    lambda naive, minutes: naive.replace(tzinfo=timezone(timedelta(minutes=minutes))),
    st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)),
    st.integers(-14 * 60, 14 * 60),
)
#: Values for places that accept anything.
free = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)
BY_TYPE: Dict[Any, st.SearchStrategy[Any]] = {
    str: text,
    int: st.integers(-(2**53), 2**53),
    float: numbers,
    bool: st.booleans(),
    datetime: instants,
    Any: free,
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Draw values that conform to the annotation *hint*."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in BY_TYPE:
        return BY_TYPE[hint]
    if hint is type(None):
        return st.none()
    if origin is Union:
        return st.one_of([values(one) for one in inner if one is not UnknownVariant])
    if origin is list:
        return st.lists(values(inner[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(text, values(inner[1]), max_size=2)
    return messages(hint)


def messages(kind: Type[Wire]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    fields = {
        one.name: st.just(one.default) if one.name == "type" else values(hints[one.name])
        for one in dataclasses.fields(kind)
        if one.name != "type" or one.default is not dataclasses.MISSING
    }
    if "type" not in fields and "type" in hints:
        fields["type"] = text
    return st.builds(kind, **fields)


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 50


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@several(12)
@given(data=st.data())
def test_a_control_message(kind: Type[Wire], data: Any) -> None:
    message = data.draw(messages(kind))
    wire = json.loads(orjson.dumps(message.to_wire()))
    assert kind.from_wire(wire) == message
    assert kind.from_wire({**wire, "x_unknown": [{}]}) == message


@several(60)
@given(payload=st.dictionaries(text, free, max_size=4), kind=text.filter(lambda t: t != "active"))
def test_an_object_of_an_unknown_kind_is_kept_unchanged(payload: Dict[str, Any], kind: str) -> None:
    sent = {"session_id": "s", "created_at": "2026-01-01T00:00:00Z",
            "status": {**payload, "type": f"new_{kind}"}}  # fmt: skip
    status = types.SessionSummary.from_wire(sent).status
    assert isinstance(status, UnknownVariant)
    assert status.type == f"new_{kind}"
    assert status.to_wire() == sent["status"]


tokens = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=4)
stops: st.SearchStrategy[Any] = (
    st.none() | text | st.lists(text, max_size=2) | st.lists(st.integers(0, 9), max_size=2)
)
params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**31),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=stops,
    temperature=st.floats(0, 100),
    top_k=st.just(-1) | st.integers(1, 2**31),
    top_p=st.floats(0, 1, exclude_min=True),
)


def _targets(rows: List[List[int]]) -> TensorData:
    return TensorData(rows, dtype="int64")


requests = st.builds(
    SampleRequest,
    prompt=tokens.map(ModelInput.from_ints),
    num_samples=st.integers(1, 2**20),
    sampling_params=params,
    prompt_logprobs=st.just(True),
    topk_prompt_logprobs=st.integers(0, 20),
    topk_sample_logprobs=st.integers(0, 20),
    prompt_logprobs_last_n=st.none() | st.just(1),
    target_prompt_logprobs=st.none()
    | st.lists(st.lists(st.integers(-1, 9), min_size=2, max_size=2), min_size=1, max_size=3).map(
        _targets
    ),
    prompt_alt_tokens_k=st.integers(0, 5),
    record_stability_info=st.booleans(),
)


@several(150)
@given(request=requests)
def test_a_sample_request(request: SampleRequest) -> None:
    sent = orjson.dumps(request.to_json(), option=orjson.OPT_SERIALIZE_NUMPY)
    received = SampleRequest.from_json(orjson.loads(sent))
    assert received.target_prompt_logprobs == request.target_prompt_logprobs
    plain = {"target_prompt_logprobs": None}
    assert dataclasses.replace(received, **plain) == dataclasses.replace(request, **plain)
