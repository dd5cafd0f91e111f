"""The requests that tests/proofs/fuzz.py sends: valid ones of each route, and changes of them.

Everything is drawn from a ``random.Random``, so that a seed gives the same requests again.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import zlib
from random import Random
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import quote

import zstandard

from tinkex.wire import tinker_public_pb2 as pb
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE


@dataclasses.dataclass
class Sent:
    """A request.

    Attributes:
        path: without its prefix's host; percent-encoded.
        must_fail: it would be a breach if the server did what is asked.
    """

    method: str
    path: str
    headers: Dict[str, str]
    body: bytes
    query: str = ""
    must_fail: bool = False

    def __str__(self) -> str:
        target = self.path + ("?" + self.query if self.query else "")
        return f"{self.method} {target:.300} {self.headers!r:.600} {self.body!r:.1500}"


#: Names of what the server has; replaced in paths and in bodies.  ``@seq`` is the next seq_id of
#: MODEL, ``@number`` a number that was not used before, ``@name`` the name of a new checkpoint.
NAMES = ("SESSION", "SPARE", "MODEL", "SAMPLER", "WEIGHTS", "DRAWN", "REQUEST", "LOSS")

_TENSOR = {"data": [2, 3, 4], "dtype": "int64", "shape": [3]}
_FLOATS = {"data": [1.0, 0.5, 1.0], "dtype": "float32", "shape": [3]}
_SPARSE = {
    "dtype": "float32", "shape": [3, 4], "data": [1.0, 2.0],
    "sparse_crow_indices": [0, 1, 1, 2], "sparse_col_indices": [0, 3],
}  # fmt: skip
_DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "loss_fn_inputs": {"target_tokens": _TENSOR, "weights": _FLOATS},
}
_POLICY_DATUM = {
    "model_input": {
        "chunks": [
            {"type": "encoded_text", "tokens": [1]}, {"type": "encoded_text", "tokens": [2, 3]},
        ]
    },
    "loss_fn_inputs": {"target_tokens": _TENSOR, "logprobs": _FLOATS, "advantages": _FLOATS},
}  # fmt: skip
_CHECKPOINT = "/api/v1/training_runs/MODEL/checkpoints/weights/kept"
_OTHER_CHECKPOINT = "/api/v1/training_runs/MODEL/checkpoints/sampler_weights/drawn"
_SAMPLE = {
    "sampling_session_id": "SAMPLER", "seq_id": "@number", "num_samples": 2,
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
    "sampling_params": {
        "max_tokens": 4, "stop": [9], "seed": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 5
    },
    "prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2,
}  # fmt: skip
_COMPLETION = {
    "model": "deterministic", "prompt": ["hello", "you"], "max_tokens": 4, "n": 2, "seed": 1,
    "stop": ["x", "yz"], "logprobs": 2, "echo": True, "temperature": 0.5, "top_p": 0.5,
}  # fmt: skip
_CHAT = {
    "model": "deterministic", "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2,
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ],
}  # fmt: skip

#: Method, path, JSON body (None for none); several for a route that takes several forms.
VALID: List[Tuple[str, str, Optional[Dict[str, Any]]]] = [
    ("GET", "/api/v1/healthz", None),
    ("GET", "/api/v1/client/config", None),
    ("POST", "/api/v1/client/config", {"sdk_version": "x", "project_id": "p"}),
    ("GET", "/api/v1/client/dynamic_config", None),
    ("POST", "/api/v1/client/dynamic_config", {"sdk_version": "x"}),
    ("GET", "/api/v1/get_server_capabilities", None),
    ("POST", "/api/v1/auth/token", {}),
    ("GET", "/api/v1/auth/apikey/me", None),
    ("DELETE", "/api/v1/auth/apikey/me", None),
    ("POST", "/api/v1/telemetry", {
        "events": [{
            "event": "GENERIC_EVENT", "event_id": "e", "event_session_index": 0, "severity": "INFO",
            "timestamp": "2026-01-01T00:00:00Z", "event_name": "n", "event_data": {"a": 1},
        }],
        "platform": "x", "sdk_version": "x", "session_id": "SESSION", "process_uuid": "p",
    }),
    ("POST", "/api/v1/create_session", {
        "tags": ["a"], "user_metadata": {"a": [1]}, "sdk_version": "x", "project_id": "p",
        "display_name": "d",
    }),
    ("POST", "/api/v1/session_heartbeat", {"session_id": "SESSION"}),
    ("POST", "/api/v1/sessions/SPARE/finish", {"reason": {"type": "success"}, "detail": "d"}),
    ("GET", "/api/v1/sessions", None),
    ("GET", "/api/v1/sessions/SESSION", None),
    ("PUT", "/api/v1/sessions/SESSION/project", {"project_id": "p"}),
    ("POST", "/api/v1/sessions/search", {
        "session_id": "s", "project_ids": ["p"], "user_metadata": {}, "display_name": "d",
        "owner": {"type": "user", "owner_urns": ["u"]}, "limit": 5,
        "statuses": [{"type": "client_finished", "reasons": ["success"]}],
        "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "s"},
    }),
    ("POST", "/api/v1/create_model", {
        "session_id": "SESSION", "model_seq_id": "@number", "base_model": "deterministic",
        "lora_config": {"rank": 8, "seed": 1, "train_mlp": True, "train_attn": True},
        "optimizer_config": {"type": "adamw"}, "user_metadata": {"a": 1},
    }),
    ("POST", "/api/v1/get_info", {"model_id": "MODEL"}),
    ("POST", "/api/v1/load_weights", {
        "session_id": "SESSION", "model_seq_id": "@number", "path": "WEIGHTS", "optimizer": True,
        "base_model": "deterministic",
    }),
    ("POST", "/api/v1/load_weights", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "WEIGHTS", "optimizer": False,
    }),
    ("POST", "/api/v1/forward_backward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_backward_input": {
            "data": [_DATUM, _DATUM], "loss_fn": "cross_entropy", "loss_fn_config": {},
        },
    }),
    ("POST", "/api/v1/forward_backward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_backward_input": {
            "data": [_POLICY_DATUM], "loss_fn": "ppo",
            "loss_fn_config": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        },
    }),
    ("POST", "/api/v1/forward_backward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_backward_input": {
            "data": [_DATUM], "loss_fn": "custom", "loss_fn_config": {"loss_id": "LOSS"},
        },
    }),
    ("POST", "/api/v1/forward", {
        "model_id": "MODEL", "seq_id": "@seq",
        "forward_input": {
            "data": [{**_DATUM, "loss_fn_inputs": {"target_tokens": _TENSOR, "weights": _FLOATS}}],
            "loss_fn": "cross_entropy",
        },
    }),
    ("POST", "/api/v1/forward", {
        "model_id": "MODEL", "seq_id": "@seq", "forward_input": {
            "data": [{**_DATUM, "loss_fn_inputs": {"target_tokens": _SPARSE, "weights": _SPARSE}}],
            "loss_fn": "cross_entropy",
        },
    }),
    ("POST", "/api/v1/optim_step", {
        "model_id": "MODEL", "seq_id": "@seq", "adam_params": {
            "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0,
        },
    }),
    ("POST", "/api/v1/create_custom_loss", {
        "session_id": "SESSION", "custom_loss_seq_id": "@number", "name": "f",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {
            "format": 1,
            "nodes": [
                {"op": "placeholder", "name": "a", "target": "a", "args": [], "kwargs": {}},
                {"op": "call_function", "name": "b", "target": "torch.sum", "args": [{"ref": "a"}]},
                {"op": "output", "name": "c", "target": "c", "args": [
                    {"tuple": [{"ref": "b"}, {"dict": {"custom/x:sum": {"ref": "b"}}}]},
                ]},
            ],
        },
    }),
    ("POST", "/api/v1/save_weights", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "@name", "ttl_seconds": 3600,
        "overwrite": True, "user_metadata": {"a": 1},
    }),
    ("POST", "/api/v1/save_weights_external", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "@name", "overwrite": False,
    }),
    ("POST", "/api/v1/save_weights_for_sampler", {
        "model_id": "MODEL", "seq_id": "@seq", "path": "@name", "kind": "snapshot",
    }),
    ("POST", "/api/v1/save_weights_for_sampler", {
        "model_id": "MODEL", "seq_id": "@seq", "sampling_session_seq_id": "@number",
        "kind": "inflight",
    }),
    ("POST", "/api/v1/create_sampling_session", {
        "session_id": "SESSION", "sampling_session_seq_id": "@number", "model_path": "DRAWN",
        "base_model": "deterministic",
    }),
    ("POST", "/api/v1/join_sampling_session", {"sampling_session_id": "SAMPLER"}),
    ("GET", "/api/v1/samplers/SAMPLER", None),
    ("POST", "/api/v1/asample", _SAMPLE),
    ("POST", "/api/v1/asample", {
        **_SAMPLE, "prompt_logprobs_last_n": 1, "prompt_alt_tokens_k": 1,
        "target_prompt_logprobs": {"data": [1, 2, 3], "dtype": "int64", "shape": [3, 1]},
    }),
    ("POST", "/api/v1/retrieve_future", {"request_id": "REQUEST", "allow_metadata_only": True}),
    ("POST", "/api/v1/retrieve_futures", {
        "target": {
            "type": "sampling_session", "sampling_session_id": "SAMPLER", "cloned_sampler_id": 0,
        },
        "prev_cursor": 0, "timeout": 0.0, "retrieved_request_ids": [],
    }),
    ("POST", "/api/v1/cancel_future", {"request_id": "REQUEST"}),
    ("GET", "/api/v1/training_runs", None),
    ("GET", "/api/v1/training_runs/MODEL", None),
    ("GET", "/api/v1/training_runs/MODEL/checkpoints", None),
    ("GET", "/api/v1/checkpoints", None),
    ("POST", "/api/v1/weights_info", {"tinker_path": "WEIGHTS"}),
    ("POST", "/api/v1/copy_weights", {
        "source_path": "WEIGHTS", "destination_project_id": "p", "ttl_seconds": 3600,
    }),
    ("PUT", f"{_CHECKPOINT}/ttl", {"ttl_seconds": 3600}),
    ("POST", f"{_OTHER_CHECKPOINT}/publish", None),
    ("DELETE", f"{_OTHER_CHECKPOINT}/publish", None),
    ("GET", f"{_CHECKPOINT}/archive", None),
    ("GET", "/api/v1/training_runs/MODEL/checkpoints/external_weights/out/external_weights_urls",
     None),
    ("DELETE", "/api/v1/training_runs/MODEL/checkpoints/weights/spare", None),
    ("GET", "@archive", None),
    ("GET", "@file", None),
    ("GET", "/api/v1/audit", None),
    *(
        (method, f"{root}/{path}", body)
        for root in ("/v1", "/oai/api/v1")
        for method, path, body in (
            ("GET", "models", None),
            ("GET", "models/deterministic", None),
            ("POST", "completions", _COMPLETION),
            ("POST", "completions", {**_COMPLETION, "stream": True}),
            ("POST", "chat/completions", _CHAT),
            ("POST", "chat/completions", {**_CHAT, "stream": True,
                                          "stream_options": {"include_usage": True}}),
            ("POST", "responses", {"input": "x"}),
        )
    ),
    ("POST", "/api/v1/unload_model", {"model_id": "MODEL"}),
]  # fmt: skip


class Raw:
    """JSON as it is to be written, which need not be valid."""

    def __init__(self, text: str) -> None:
        self.text = text


#: Identifiers and names that are none, and paths that lead elsewhere.
ODD_NAMES = (
    "", ".", "..", "../../../outside", "..\\..\\outside", "/etc/passwd", "a/b", "a/../b", "\x00",
    "~", "con", "a" * 129, "a" * 5000, "x:train:0", ":", "::", "-", "--help", "%2e%2e", "%00",
    "'; DROP TABLE sessions; --", '"', "\n", "\r\nX: y", "\u202e", "\U0001f600", "\udfff", "é",
    "tinker://", "tinker://../weights/..", "tinker://a/weights/../../../../outside",
    "tinker://MODEL/weights/..%2f..%2f..%2f..%2foutside", "tinker://MODEL/weights/kept/../../x",
    "tinker://MODEL/nothing/kept", "tinker://MODEL:train:0/weights/kept", "tinker://\x00/weights/a",
    "file:///etc/passwd", "http://127.0.0.1/", "WEIGHTS", "DRAWN", "MODEL", "SESSION", "SAMPLER",
)  # fmt: skip

_ODD_VALUES: Tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 1024, 4097, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1,
    2**63, 2**64 - 1, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1.5, 1e-320, 1e16, 1e38, 1e39, 1e308,
    -1e308, [], {}, [[]], [None], [{}], {"": None}, [0] * 3000, [[1], [2, 3]], "x" * 10_001, "1",
    "NaN", "true", {"data": [1], "dtype": "int64", "shape": [2**31, 2**31]},
    {"data": [1.0], "dtype": "float32", "shape": [1 << 26], "sparse_crow_indices": [0, 1],
     "sparse_col_indices": [0]},
    {"type": "image", "data": "AAAA", "format": "png", "expected_tokens": 2**40},
    {"type": "image_asset_pointer", "location": "file:///etc/passwd", "format": "png"},
    {"ref": "a"}, {"tuple": []}, {"torch": "float64"}, {str(key): key for key in range(300)},
    Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("-1e999"), Raw("9" * 5000),
    Raw("1" + "0" * 400),
    Raw("0." + "0" * 400 + "1"), Raw("-0"), Raw("1E+2"), Raw("01"), Raw("+1"), Raw('"\\ud800"'),
    Raw('"\\udc00\\ud83d"'), Raw('"\\u0000"'), Raw('"\\x"'), Raw("[" * 300 + "]" * 300),
    Raw("[" * 450 + "]" * 450), Raw("[" * 20_000 + "]" * 20_000),
    Raw('{"a":' * 390 + "1" + "}" * 390),
    Raw('{"a":1,"a":2}'), Raw("undefined"), Raw("'x'"), Raw("/**/1"), Raw(""), Raw("[1,]"),
)  # fmt: skip


def dump(value: Any) -> bytes:
    """Write JSON with the texts of Raw in it."""
    raws: List[str] = []

    def mark(item: Any) -> str:
        raws.append(item.text)
        return f"@raw{len(raws) - 1}@"

    text = json.dumps(value, default=mark)
    for place, raw in enumerate(raws):
        text = text.replace(f'"@raw{place}@"', raw)
    return text.encode()


def odd_value(rng: Random) -> Any:
    """Return a value that fits nowhere."""
    kind = rng.random()
    if kind < 0.6:
        return copy.deepcopy(rng.choice(_ODD_VALUES))
    if kind < 0.8:
        return rng.choice(ODD_NAMES)
    if kind < 0.9:
        return rng.choice((-1, 1)) * rng.getrandbits(rng.randint(1, 64))
    return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD7FF)))) for _ in "1234")


def _places(value: Any, found: List[Tuple[Any, Any]]) -> List[Tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            _places(value[key], found)
    return found


def change_value(rng: Random, body: Any) -> Any:
    """Return *body*, a JSON object, with something in it changed."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(body, [])
        if not places or rng.random() < 0.02:
            return odd_value(rng)
        holder, key = rng.choice(places)
        old = holder[key]
        choice = rng.random()
        if choice < 0.55:
            holder[key] = odd_value(rng)
        elif choice < 0.65:
            del holder[key]
        elif choice < 0.72:
            other, other_key = rng.choice(places)
            if other_key in other if isinstance(other, dict) else other_key < len(other):
                holder[key] = copy.deepcopy(other[other_key])
        elif choice < 0.79:
            holder[key] = [old] * rng.choice((1, 2, 50))
        elif choice < 0.84:
            holder[key] = {"type": old}
        elif choice < 0.89 and isinstance(old, (int, float)):
            holder[key] = rng.choice((str(old), float(old), old + 1, -old, old * 1e9))
        elif choice < 0.94 and isinstance(old, list):
            old.insert(rng.randint(0, len(old)), odd_value(rng))
        elif isinstance(holder, dict):
            holder[rng.choice(("type", "extra", "", "__proto__", "model_id", str(key) + "s"))] = old
    return body


def change_bytes(rng: Random, raw: bytes) -> bytes:
    """Return *raw* with some of its bytes changed."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randint(0, len(data))
        choice = rng.random()
        if choice < 0.3 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif choice < 0.5 and data:
            data[place % len(data)] = rng.choice(
                (0, 0x7F, 0x80, 0xFF, 0x22, 0x5B, rng.randrange(256))
            )
        elif choice < 0.65:
            del data[place : place + rng.choice((1, 2, 8, 1000))]
        elif choice < 0.8:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 30))))
        elif choice < 0.9:
            data[place:place] = data[place : place + 20] * rng.choice((1, 3, 50))
        else:
            data[place:place] = rng.choice(
                (b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xed\xa0\x80", b"\xef\xbb\xbf")
            )
    return bytes(data)


def change_text(rng: Random, raw: bytes) -> bytes:
    """Return JSON in another encoding, cut, doubled, or within something else."""
    text = raw.decode()
    return rng.choice((
        raw[: rng.randint(0, len(raw))],
        raw + raw,
        raw + b"\x00",
        b"\xef\xbb\xbf" + raw,
        text.encode("utf-16"),
        text.encode("utf-32"),
        b"[" + raw + b"]",
        b'"' + raw + b'"',
        b" " * 5000 + raw,
        raw.replace(b":", b":" * 2, 1),
        raw.replace(b",", b",,", 1),
        b"[" * rng.choice((100, 500, 100_000)),
        b'{"a":' * rng.choice((100, 500, 100_000)),
        b"null", b"0", b"", b"\x00" * 100, b"[]",
    ))  # fmt: skip


# Protobuf


def pass_message(rng: Random, model_id: str, seq_id: int) -> pb.ForwardBackwardRequest:
    """Return a valid request for a pass."""
    message = pb.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy", forward_only=rng.random() < 0.3
    )
    for _ in range(rng.randint(1, 3)):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = b"\1\0\0\0\2\0\0\0\3\0\0\0"
        for name, dtype, raw in (
            ("target_tokens", pb.INT64, b"".join(bytes([n]) + bytes(7) for n in (2, 3, 4))),
            ("weights", pb.FLOAT32, b"\0\0\x80\x3f" * 3),
        ):
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype, tensor.dense = dtype, raw
            tensor.shape.append(3)
    return message


def change_message(rng: Random, message: Any) -> None:
    """Change a field of a protobuf message, at any depth."""
    fields = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    set_already = [known for known, _ in message.ListFields()]
    if set_already and rng.random() < 0.7:
        field = rng.choice(set_already)
    if rng.random() < 0.08:
        message.ClearField(field.name)
        return
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if is_map:
        _change_map(rng, field, getattr(message, field.name))
    elif (
        field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    ):
        _change_repeated(rng, field, getattr(message, field.name))
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        change_message(rng, inner)
    else:
        setattr(message, field.name, _scalar(rng, field))


def _change_map(rng: Random, field: Any, entries: Any) -> None:
    value_field = field.message_type.fields_by_name["value"]
    keys = sorted(entries)
    name = rng.choice((*keys, "", "extra", "logprobs", "x" * 300))
    if name in keys and rng.random() < 0.2:
        del entries[name]
    elif value_field.message_type is not None:
        change_message(rng, entries[name])
    else:
        entries[name] = _scalar(rng, value_field)


def _change_repeated(rng: Random, field: Any, items: Any) -> None:
    if field.message_type is None:
        if items and rng.random() < 0.3:
            del items[rng.randrange(len(items))]
        else:
            items.extend(_scalar(rng, field) for _ in range(rng.choice((1, 1, 2, 20))))
    elif items and rng.random() < 0.8:
        change_message(rng, rng.choice(items))
    else:
        for _ in range(rng.choice((1, 1, 3, 2000))):
            items.add()


def _scalar(rng: Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), -float("inf")))
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == field.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 4, 99, -1))
    if kind == field.CPPTYPE_STRING:
        name = rng.choice((*ODD_NAMES, "MODEL", "cross_entropy", "ppo", "custom", "LOSS"))
        if field.type == field.TYPE_BYTES:
            length = rng.choice((0, 1, 3, 4, 8, 12, 24, 4096))
            return rng.choice((bytes(length), b"\xff" * length, b"\1\0\0\0" * (length // 4)))
        return name.encode("utf-8", "replace").decode()
    largest = 63 if kind in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 31
    signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    numbers = [0, 1, 2, 3, 12, 1 << 20, (1 << largest) - 1]
    return rng.choice(numbers + ([-1, -(1 << largest)] if signed else []))


# Compression


def bomb(size: int, fill: bytes = b"\0") -> bytes:
    """Return a few bytes that decompress to *size* bytes of *fill*, repeated."""
    compressor = zstandard.ZstdCompressor().compressobj()
    block = fill * ((1 << 20) // len(fill))
    parts = [compressor.compress(block) for _ in range(size >> 20)]
    return b"".join(parts) + compressor.flush()


_BOMBS: List[bytes] = []


def compress(rng: Random, raw: bytes) -> Tuple[str, bytes]:
    """Return a Content-Encoding, and *raw* in it, or in something else."""
    if not _BOMBS:
        _BOMBS.extend((bomb(64 << 20), bomb(64 << 20, b"[]" * 4), bomb(64 << 20, b"\x0a\0")))
        _BOMBS.append(zstandard.compress(bomb(1 << 30)))
    frame = zstandard.compress(raw)
    window = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    choices: Tuple[Callable[[], Tuple[str, bytes]], ...] = (
        lambda: ("zstd", frame),
        lambda: ("zstd", frame),
        lambda: ("ZSTD ", frame),
        lambda: ("zstd", change_bytes(rng, frame)),
        lambda: ("zstd", frame[: rng.randint(0, len(frame))]),
        lambda: ("zstd", frame + frame),
        lambda: ("zstd", raw),
        lambda: ("zstd", rng.choice(_BOMBS)),
        lambda: ("zstd", zstandard.compress(frame)),
        lambda: ("zstd", zstandard.ZstdCompressor(compression_params=window).compress(raw)),
        lambda: ("zstd, zstd", zstandard.compress(frame)),
        lambda: ("gzip", gzip.compress(raw, 1)),
        lambda: ("gzip, zstd", zstandard.compress(gzip.compress(raw, 1))),
        lambda: ("deflate", zlib.compress(raw)),
        lambda: (rng.choice(("br", "identity", "", "compress", "x" * 5000, "é", ",")), raw),
    )
    return rng.choice(choices)()


# Heads

_ODD_TYPES = (
    "", "text/plain", "application/json; charset=utf-16", "APPLICATION/JSON", "application/json;",
    "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/protobuf",
    JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, ";", "a" * 3000, "\xe9",
    "application/json, text/plain",
)  # fmt: skip

_ODD_HEADERS: Dict[str, Tuple[str, ...]] = {
    "Accept": ("application/x-protobuf", "*/*;q=NaN", "x" * 9000, "", ",;=", "\xff"),
    "Range": ("bytes=0-5", "bytes=5-0", "bytes=-1", "bytes=" + "9" * 5000 + "-", "bytes=0-0,2-3",
              "bytes=-0", "bytes=1-\xb2", "items=0-1", "bytes", "bytes=" + "0-1," * 2000),
    "If-Range": ('"x"', "W/", "Mon, 99 Foo 99999999999 00:00:00 GMT", '"' * 50, "\xff",
                 "Thu, 01 Jan 1970 00:00:00 +9999999999"),
    "If-None-Match": ('"x"', "*", "\xff"),
    "If-Modified-Since": ("x", "Thu, 01 Jan 0000 00:00:00 GMT"),
    "X-Idempotency-Key": ("", "k", "k" * 256, "k" * 257, "\xff\x00", "../x"),
    "Cookie": ("session=x", "=" * 3000, "\xff"),
    "X-Forwarded-For": ("evil", "1.1.1.1"),
    "X-Forwarded-Host": ("evil.example",),
    "Forwarded": ("host=evil",),
    "Expect": ("100-continue", "x"),
    "Upgrade": ("websocket", "h2c"),
    "Connection": ("close", "keep-alive, Upgrade", "x" * 1000),
    "Accept-Encoding": ("gzip", "zstd;q=-1"),
    "X-HTTP-Method-Override": ("DELETE",),
    "User-Agent": ("\xff", ""),
}  # fmt: skip

_ODD_QUERIES = (
    "limit=x", "limit=-1", "limit=0", "offset=99999999999999999999999", "limit=\xb2", "limit=%ff",
    "offset=1e3", "limit=" + "9" * 5000, "access_scope=all", "access_scope=accessible", "day=today",
    "day=0001-01-01", "day=9999-12-31", "day=2026-11-31", "day=%00", "day=20261126",
    "day=2026-W01-1",
    "event_type=x", "event_type=checkpoints", "project_id=%00", "project_id=%ed%a0%80", "&" * 3000,
    "=", "%", "%zz", "a=b&" * 2000, "limit=1&limit=x", "expires=1&signature=x", "+", "a[]=1",
    "limit[]=1",
)  # fmt: skip

#: Headers by which a request cannot be from where it would have to be.
FOREIGN = (
    {"Host": "evil.example"}, {"Host": "localhost.evil.example:1"}, {"Host": ""},
    {"Host": "127.0.0.1@evil.example"}, {"Host": "\xff"}, {"Host": "169.254.169.254"},
    {"Host": "[::1"}, {"Host": "localhost, evil"}, {"Host": "0.0.0.0"}, {"Host": "x" * 5000},
)  # fmt: skip
CROSS_SITE = (
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
    {"Origin": "\xff"}, {"Origin": "http://["}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://127.0.0.1"}, {"Origin": "x" * 5000},
)  # fmt: skip


def change_head(rng: Random, sent: Sent) -> None:
    """Change headers, the path, the query or the method."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        choice = rng.random()
        if choice < 0.4:
            name = rng.choice(list(_ODD_HEADERS))
            sent.headers[name] = rng.choice(_ODD_HEADERS[name])
        elif choice < 0.5:
            sent.headers["Content-Type"] = rng.choice(_ODD_TYPES)
        elif choice < 0.65:
            sent.query = rng.choice(_ODD_QUERIES)
        elif choice < 0.7:
            sent.method = rng.choice(
                ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "X")
            )
        elif choice < 0.75:
            sent.headers.update({f"X-{n}": "v" for n in range(rng.choice((10, 500)))})
        else:
            sent.path = _change_path(rng, sent.path)


def _change_path(rng: Random, path: str) -> str:
    parts = path.split("/")
    place = rng.randrange(1, len(parts))
    choice = rng.random()
    if choice < 0.6:
        parts[place] = quote(rng.choice(ODD_NAMES).encode("utf-8", "surrogatepass"), safe="")
    elif choice < 0.7:
        parts[place] = rng.choice(
            ("..", "%2e%2e", "..%2f..%2foutside", "%00", "%ff", "%", "*", "//")
        )
    elif choice < 0.8:
        parts.insert(place, rng.choice(("", ".", "..", "x")))
    elif choice < 0.9:
        del parts[place]
    else:
        parts[place] += rng.choice((";x", "%20", ".", "/", "%0a", "x" * 3000))
    return "/".join(parts) or "/"


def change_wire(rng: Random, raw: bytes) -> bytes:
    """Return an HTTP request as bytes, with its framing changed."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    choice = rng.random()
    if choice < 0.25:
        odd = rng.choice((
            b"Content-Length: -1", b"Content-Length: 1e3", b"Content-Length: " + b"9" * 30,
            b"Content-Length: " + b"9" * 5000, b"Content-Length: 0", b"Content-Length: 3, 3",
            b"Content-Length: +5", b"Content-Length: \xb2", b"Transfer-Encoding: chunked",
            b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity",
            b"Transfer-Encoding: x", b"Host: evil.example", b"Expect: 100-continue", b": x", b"x",
            b" folded", b"A:" + b"b" * 300_000, b"X\x00: y", b"X: \x00", b"\xff: \xff",
        ))  # fmt: skip
        lines.insert(rng.randint(1, len(lines)), odd)
    elif choice < 0.4:
        lines[1:1] = [b"H%d: v" % n for n in range(rng.choice((100, 3000)))]
    elif choice < 0.55:
        lines[0] = rng.choice((
            b"GET", b"", b"GET /", b"GET / HTTP/9.9", b"GET  /  HTTP/1.1", b"\x16\x03\x01\x02\x00",
            b"GET http://evil.example/api/v1/healthz HTTP/1.1", b"GET //evil/ HTTP/1.1",
            b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"GET /\xff HTTP/1.1",
            b"get / HTTP/1.1",
            b"PRI * HTTP/2.0", b"GET http://[ HTTP/1.1", b"GET /" + b"x" * 300_000 + b" HTTP/1.1",
            b"GET /%zz?%zz#%zz HTTP/1.1", b"GET /;:@[ HTTP/1.1", b"GET ../../outside HTTP/1.1",
        ))  # fmt: skip
    elif choice < 0.8:
        chunks = rng.choice((
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), b"%x;ext=1\r\n%b\r\n0\r\nT: x\r\n\r\n"
            % (len(body), body), b"ffffffffffffffff\r\n" + body, b"-1\r\n" + body, b"zz\r\n\r\n",
            b"1\r\n" * 50, b"0\r\n\r\n", b"%x\r\n%bxx0\r\n\r\n" % (len(body), body), b"\r\n" * 20,
            b"1" * 5000 + b"\r\n", b"0x1\r\na\r\n0\r\n\r\n", b"1_0\r\n" + body,
        ))  # fmt: skip
        lines = [line for line in lines if not line.lower().startswith(b"content-length")]
        return b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]) + chunks
    else:
        return change_bytes(rng, raw)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
