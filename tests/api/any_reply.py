"""Arbitrary answers, and a transport that returns them without a server."""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import json
import pkgutil
import typing
from datetime import datetime
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Tuple, Union

import numpy as np
from hypothesis import strategies as st

from tinkex import _api as api, types
from tinkex._api import training
from tinkex._transport.request import Reply, Request
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.retry import RetryPolicy
from tinkex.wire.proto_codec import PROTOBUF

CONFIG = Config.resolve(
    base_url="http://server.test",
    api_key="tml-x",
    max_outage_s=1e-6,  # no retries
    startup_timeout_s=1e-6,
    environ={},
)


class CannedTransport(Transport):
    """Every request is answered by *reply*; nothing is sent."""

    reply: Reply

    def __init__(self) -> None:
        super().__init__(CONFIG)

    def send_once(self, request: Request, **how: Any) -> Reply:
        return self.reply


# What the endpoint functions are called with

_BATCH = types.ForwardBackwardRequest(
    "m", 1, [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})], "ppo"
)
#: By name of the parameter.
ARGUMENTS: Dict[str, Any] = {
    "access_scope": "owned",
    "age_encryption_recipients": None,
    "immediate": False,
    "base_model": "b",
    "binary": True,
    "channel": None,
    "checkpoint_id": "weights/a",
    "clone": 0,
    "codec": PROTOBUF,
    "config": CONFIG,
    "credential": "tml-x",
    "cursor": 0,
    "custom_loss_seq_id": 0,
    "day": None,
    "detail": None,
    "ending_before": datetime(2026, 1, 2),
    "event_type": "all",
    "events": [],
    "graph": {"format": 1, "nodes": []},
    "inputs": [{"name": "logprobs", "rank": 1}],
    "key": "tml-x",
    "limit": 20,
    "lora_config": types.LoraConfig(8),
    "model_id": "m",
    "model_path": None,
    "model_seq_id": 0,
    "name": "loss",
    "offset": 0,
    "optimizer": False,
    "params": {"adam_params": {}},
    "path": "tinker://m/weights/a",
    "policy": RetryPolicy(max_elapsed_s=0.0),
    "prev_cursor": 0,
    "process_uuid": "u",
    "project_id": "p",
    "read_timeout_s": 1.0,
    "request_id": "r",
    "retrieved": ["r"],
    "run_id": "m",
    "sampler_id": "p",
    "sampling_session_id": "p",
    "sampling_session_seq_id": 0,
    "seq_id": 1,
    "session_id": "s",
    "source_path": "tinker://m/weights/a",
    "starting_on": datetime(2026, 1, 1),
    "status": "success",
    "timeout_s": 1.0,
    "tinker_path": "tinker://m/weights/a",
    "ttl_seconds": None,
}
#: Arguments of single functions, where the parameter's name does not suffice.
SPECIAL: Dict[Tuple[str, str], Any] = {
    ("get_checkpoint_archive_url", "pause"): lambda seconds: None,
    ("asample", "request"): types.SampleRequest(types.ModelInput.from_ints([1])),
    ("forward_backward", "request"): _BATCH,
    ("search_sessions", "request"): types.SessionSearchRequest(),
}

Endpoint = Tuple[str, Callable[..., Any], Dict[str, Any]]


def endpoint_functions() -> List[Endpoint]:
    """Return every function of tinkex._api that takes a transport, with arguments for it."""
    found = []
    for info in pkgutil.iter_modules(api.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"tinkex._api.{info.name}")
        for name, function in _public_functions(module):
            if function is training.submit:
                for route, fields in training.SUBMISSIONS.items():
                    given = {"route": route, **{field: ARGUMENTS.get(field) for field in fields}}
                    found.append((f"training.{route}", function, given))
                continue
            parameters = list(inspect.signature(function).parameters.values())
            if not parameters or parameters[0].name != "transport":
                continue
            given = {
                one.name: SPECIAL.get((name, one.name), ARGUMENTS.get(one.name))
                for one in parameters[1:]
                if one.default is one.empty or (name, one.name) in SPECIAL
            }
            missing = [
                key for key, value in given.items() if value is None and key not in ARGUMENTS
            ]
            assert not missing, f"say in ARGUMENTS what {name} is called with: {missing}"
            found.append((f"{module.__name__.rpartition('.')[2]}.{name}", function, given))
    return found


def _public_functions(module: ModuleType) -> Iterator[Tuple[str, Callable[..., Any]]]:
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("_") and function.__module__ == module.__name__:
            yield name, function


# Answers

#: Well-formed answers, to be broken.
GOOD: Tuple[Any, ...] = (
    {"request_id": "r", "model_id": "m", "sample_sequence_ids": ["q"]},
    {"session_id": "s", "info_message": "i"},
    {"sampling_session_id": "p", "path": "tinker://m/weights/a", "model_id": "m", "loss_id": "l"},
    {"model_id": "m", "model_data": {"model_name": "b"}, "lora_rank": 8, "is_lora": True},
    {"metrics": {"loss:sum": 1.0}, "loss_fn_outputs": [
        {"logprobs": {"data": [1.0], "dtype": "float32", "shape": [1]}}]},
    {"sequences": [{"stop_reason": "stop", "tokens": [1], "logprobs": [-1.0]}],
     "prompt_logprobs": [None, -1.0], "topk_prompt_logprobs": [None, [[1, -1.0]]]},
    {"training_runs": [{"training_run_id": "t", "base_model": "b", "model_owner": "o",
                        "is_lora": True, "last_request_time": "2026-01-01T00:00:00Z",
                        "last_checkpoint": {"checkpoint_id": "weights/a"}}],
     "cursor": {"offset": 0}},
    {"checkpoints": [{"checkpoint_id": "weights/a", "checkpoint_type": "training",
                      "time": "2026-01-01T00:00:00Z", "tinker_path": "t", "size_bytes": 1}]},
    {"sessions": [{"session_id": "s", "created_at": "2026-01-01T00:00:00Z",
                   "status": {"type": "failed", "category": "user", "message": "m",
                              "reason": {"type": "request", "request_id": "r"}}}],
     "next_cursor": {"last_created_at": "x", "last_session_id": "y"}},
    {"data": [{"bucket_start": "2026-01-01T00:00:00Z", "bucket_end": "2026-01-01T00:00:00Z",
               "event_info": {"type": "training", "token_count": 1}, "checkpoint_count": 1,
               "size_bytes": 1, "size_gigabytes": 0.5}],
     "sessions": {"s": {"user_metadata": {"k": "v"}}}},
    {"entries": [{"timestamp": "2026-01-01T00:00:00Z", "event": "e", "event_details": {}}]},
    {"supported_models": [{"model_name": "b", "max_context_length": 5}]},
    {"base_model": "b", "is_lora": True, "lora_rank": 4, "optimizer_config": {"type": "adamw"}},
    {"urls": {"a": "https://x.test"}, "expires": "2026-01-01T00:00:00Z", "url": "https://x.test"},
    {"status": "ready", "url": "https://x.test", "error": None},
    {"completions": [{"state": "finished", "request_id": "r"}], "cursor": 1},
    {"type": "try_again", "queue_state": "active", "queue_state_reason": "r"},
    {"status": "complete_metadata", "response_payload_size": 5},
    {"error": "e", "category": "user"},
    {"jwt": "a.b.c", "client_counter": 1, "tinker_path": "tinker://m/weights/a"},
    {"detail": [{"loc": ["body"], "msg": "m"}]},
)  # fmt: skip

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def _paths(value: Any, prefix: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """Yield the path of *value* and of everything inside it."""
    yield prefix
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, item in children:
        yield from _paths(item, (*prefix, key))


def _replaced(value: Any, path: Tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy


@st.composite
def broken_json(draw: Any) -> bytes:
    """A well-formed answer with something unexpected in one place."""
    good = draw(st.sampled_from(GOOD))
    return _dumped(_replaced(good, draw(st.sampled_from(list(_paths(good)))), draw(anything)))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()  # with NaN and Infinity, as some servers write them


_OUTPUT = types.ForwardBackwardOutput([{"logprobs": types.TensorData([1.0])}], {"a:sum": 1.0})
_SAMPLES = types.SampleResponse([types.SampledSequence("stop", np.array([1], np.int32))])
_BINARY = (PROTOBUF.encode_output(_OUTPUT), PROTOBUF.encode_samples(_SAMPLES))


@st.composite
def broken_protobuf(draw: Any) -> bytes:
    body = bytearray(draw(st.sampled_from(_BINARY)))
    body[draw(st.integers(0, len(body) - 1))] ^= draw(st.integers(0, 255))
    return bytes(body[: len(body) - draw(st.integers(0, 3))])


bodies = (
    broken_json()
    | anything.map(_dumped)
    | st.binary(max_size=40)
    | broken_protobuf()
    | st.sampled_from([_dumped(good) for good in GOOD])
)
content_types = st.sampled_from(
    ["application/json", "application/x-protobuf", "text/html; charset=utf-8", "", "/;", "\xff"]
)
headers = st.fixed_dictionaries(
    {"content-type": content_types},
    optional={
        "retry-after": st.sampled_from(["0", "-1", "soon", "nan", "1e999"]) | st.text(max_size=5),
        "x-should-retry": st.sampled_from(["false", "maybe", ""]),
        "location": st.sampled_from(["", "/x", "http://other.test/", "::"]),
        "expires": st.text(max_size=10),
        "www-authenticate": st.text(max_size=10),
        "x-deprecation-note": st.text(max_size=10),
    },
)
replies = st.builds(
    Reply,
    st.sampled_from([200, 200, 200, 200, 201, 202, 204]) | st.integers(200, 599),
    headers,
    bodies,
)


# What the endpoint functions may return


def conforms(value: Any, hint: Any) -> bool:
    """Return whether *value* conforms to the annotation *hint*, at every level."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return True
    if origin is Union:
        return any(conforms(value, one) for one in inner)
    if hint is None or hint is type(None):
        return value is None
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, list) and all(conforms(item, inner[0]) for item in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            conforms(key, inner[0]) and conforms(item, inner[1]) for key, item in value.items()
        )
    if hint is float:
        return type(value) in (float, int)
    if hint in (int, str, bool):
        return type(value) is hint
    if hint is types.ModelInput or hint is types.TensorData:
        return isinstance(value, hint)  # messages check themselves when they are constructed
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return isinstance(value, hint) and all(
            conforms(getattr(value, field.name), hints[field.name])
            for field in dataclasses.fields(value)
        )
    if not isinstance(origin or hint, type):
        return isinstance(value, np.ndarray)  # NDArray[...]: newer numpys spell it as an alias
    return isinstance(value, origin or hint)
