"""How tests/proofs/fuzz.py mutates bodies: values, bytes, protobuf messages, compression.

All choices are drawn from a ``random.Random``, so that a seed always gives the same requests.
"""

from __future__ import annotations

import copy
import gzip
import json
import zlib
from random import Random
from typing import Any, Callable, List, Tuple

import zstandard

from tinkex.wire import tinker_public_pb2 as pb


class Raw:
    """Text to be written verbatim into JSON; it need not be valid."""

    def __init__(self, text: str) -> None:
        self.text = text


#: Invalid identifiers and names, and paths that lead elsewhere.
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
    """Write JSON, with each Raw verbatim."""
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
    """Return *body*, a JSON object, with one value in it changed."""
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
    """Return JSON in another encoding, truncated, doubled, or wrapped."""
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
    """Return a Content-Encoding, and *raw* in that encoding or another."""
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
