"""docs/protocol.md agrees with the code, as far as a program can check it.

The tests cover endpoints, field names, flags and their defaults, protobuf messages, and example
bytes.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import pytest
from google.protobuf.descriptor import FieldDescriptor
from wire import test_golden

from tinkex import _api as api, types
from tinkex._api import training
from tinkex._runtime.clock import SYSTEM_CLOCK
from tinkex._transport.request import Request
from tinkex._transport.server_flags import DynamicFlags, ServerFlags
from tinkex._transport.server_state import state_of
from tinkex.config import Config
from tinkex.local.app import create_app
from tinkex.local.backend import Backend
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ServerSettings
from tinkex.local.state.store import Store
from tinkex.metrics import Recorder
from tinkex.retry import RetryPolicy
from tinkex.types._wire import Wire
from tinkex.wire import tinker_public_pb2 as pb
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "protocol.md").read_text(encoding="utf-8")

Endpoint = Tuple[str, str]


def section(title: str) -> str:
    """Return the text of a section, up to the next heading of the same level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{2,3}} |\Z)", PAGE, re.S | re.M)
    assert found is not None, f"docs/protocol.md has no section {title!r}"
    return found[2]


def code_words(text: str) -> Set[str]:
    """Return every identifier within backticks or in a block of code."""
    marked = " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.S))
    return set(re.findall(r"\w+", marked))


DOCUMENTED: Set[Endpoint] = set(
    re.findall(r"^\| `([A-Z]+) (/api/v1/[^`]+)` \|", section("Endpoints"), re.M)
)


# ---- What the client sends ----


class Sent(Exception):
    """Raised instead of sending *request*."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.name)
        self.request = request


class FakeTransport:
    """A transport that raises each request instead of sending it."""

    config = Config(base_url="http://server.test", api_key="tml-test", project_id="p")
    server = state_of(config)
    recorder = Recorder()
    clock = SYSTEM_CLOCK

    def send(self, request: Request, policy: RetryPolicy, **options: Any) -> Any:
        raise Sent(request)

    def send_once(self, request: Request, **options: Any) -> Any:
        raise Sent(request)

    def redact(self, text: str) -> str:
        return text


_TENSOR = types.TensorData([[1]], "int64", (1, 1))
_EVERYTHING_SAMPLED = types.SampleRequest(
    types.ModelInput.from_ints([1, 2]), 2, types.SamplingParams(1, 2, "x", 0.5, 3, 0.5),
    prompt_logprobs=True, topk_prompt_logprobs=1, topk_sample_logprobs=1,
    prompt_logprobs_last_n=1, target_prompt_logprobs=_TENSOR, prompt_alt_tokens_k=1,
    record_stability_info=True,
)  # fmt: skip
_EVERYTHING_SOUGHT = types.SessionSearchRequest(
    "s", ["p"], {"k": "v"}, "n", types.SessionsOfUsers(["u"]),
    [types.SessionStatusFilter("client_finished", ["success"])], 3,
    types.SessionSearchCursor("t", "s"),
)  # fmt: skip
_BATCH = types.ForwardBackwardRequest(
    "m", 1, [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [1]})], "ppo", {"a": 1}
)

#: Arguments for those parameters of the endpoint functions that are not strings.
ARGUMENTS: Dict[str, Any] = {
    "age_encryption_recipients": ["age1x"],
    "immediate": True,
    "binary": True,
    "clone": 0,
    "codec": JSON,
    "config": dataclasses.replace(FakeTransport.config, display_name="d"),
    "cursor": 0,
    "custom_loss_seq_id": 0,
    "day": None,
    "destination_project_id": "p",
    "ending_before": datetime.datetime(2026, 1, 2),
    "events": [{"event": "SESSION_START"}],
    "graph": {"format": 1, "nodes": []},
    "inputs": [{"name": "logprobs", "rank": 1}],
    "kind": "inflight",
    "limit": 1,
    "lora_config": types.LoraConfig(seed=1).to_wire(),
    "model_seq_id": 0,
    "offset": 0,
    "optimizer": True,
    "optimizer_config": {"type": "dimuon"},
    "overwrite": True,
    "adam_params": types.AdamParams(weight_decay=0.1, grad_clip_norm=1.0).to_wire(),
    "optimizer_params": types.DimuonParams(0.1).to_wire(),
    "policy": RetryPolicy(),
    "retrieved": ["r"],
    "sampling_session_seq_id": 0,
    "seq_id": 1,
    "size_first": True,
    "starting_on": datetime.datetime(2026, 1, 1),
    "ttl_seconds": 3600,
    "user_metadata": {"k": "v"},
    "channel": None,
    "pause": None,
    "compressed": False,
    "payload": False,
}
_REQUESTS = {
    "asample": _EVERYTHING_SAMPLED,
    "search_sessions": _EVERYTHING_SOUGHT,
    "forward_backward": _BATCH,
}


def endpoint_functions() -> Iterator[Tuple[str, Callable[..., Any]]]:
    """Yield every public function of tinkex._api that takes a transport."""
    modules = [found.name for found in pkgutil.iter_modules(api.__path__)]
    for module_name in (name for name in modules if not name.startswith("_")):
        module = importlib.import_module(f"{api.__name__}.{module_name}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and not name.startswith("_") and "transport" in _parameters(function):
                yield name, function


def _parameters(function: Callable[..., Any]) -> List[str]:
    return list(inspect.signature(function).parameters)


def request_of(name: str, function: Callable[..., Any], /, **changes: Any) -> Request:
    """Return the request that *function* sends when every argument is given."""
    given: Dict[str, Any] = {}
    for parameter in _parameters(function):
        if parameter == "transport":
            given[parameter] = FakeTransport()
        elif parameter == "request":
            given[parameter] = _REQUESTS[name]
        elif parameter == "fields":
            continue
        elif parameter.endswith("_timeout_s") or parameter == "timeout_s":
            given[parameter] = 1.0
        else:
            given[parameter] = ARGUMENTS.get(parameter, parameter)
    with pytest.raises(Sent) as sent:
        function(**{**given, **changes})
    return sent.value.request


def sent_requests() -> Iterator[Request]:
    """Yield a request of every endpoint function, and of both kinds of passes."""
    for name, function in endpoint_functions():
        if name == "submit":
            for route, fields in training.SUBMISSIONS.items():
                given = {field: ARGUMENTS.get(field, field) for field in fields}
                yield request_of(name, function, route=route, **given)
            continue
        yield request_of(name, function)
        if name == "forward_backward":
            forward = dataclasses.replace(_BATCH, forward_only=True)
            yield request_of(name, function, request=forward)


SENT = list(sent_requests())


def endpoint_of(request: Request) -> Endpoint:
    """Return the method, and the path with names in braces in place of ids."""
    path = request.path.partition("?")[0]
    names = ("session_id", "run_id", "checkpoint_id", "sampler_id")
    parts = [f"{{{part}}}" if part in names else part for part in path.split("/")]
    return request.method, "/".join(parts)


# ---- What the embedded server takes ----


CHECKPOINT = "{checkpoint_id}"

#: Endpoints that only the embedded server has.
_EXTRA = {
    ("GET", "/api/v1/client/config"),
    ("GET", "/api/v1/client/dynamic_config"),
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Set[Endpoint]]:
    """The endpoints of an embedded server with every feature enabled."""
    settings = ServerSettings()
    flags = dataclasses.replace(settings.flags, custom_loss_server_side=True)
    backend = Backend(DeterministicEngine(), Store(tmp_path), settings)
    try:
        app = create_app(backend, dataclasses.replace(settings, flags=flags))
        yield {
            (method, re.sub(r"<(\w+)>", r"{\1}", rule.rule.replace("<kind>/<name>", CHECKPOINT)))
            for rule in app.url_map.iter_rules()
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
            if rule.rule.startswith("/api/v1/")
        } - _EXTRA
    finally:
        backend.close()


# ---- Endpoints and fields ----


def test_every_endpoint_that_the_client_calls_is_documented() -> None:
    assert {endpoint_of(request) for request in SENT} - DOCUMENTED == set()


def test_every_endpoint_that_the_embedded_server_has_is_documented(served: Set[Endpoint]) -> None:
    assert served - DOCUMENTED == set()


def test_every_documented_endpoint_exists(served: Set[Endpoint]) -> None:
    assert DOCUMENTED - served - {endpoint_of(request) for request in SENT} == set()


def anchors(page: str) -> Set[str]:
    """Return the anchors of a page's headings, which must all be different."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    found = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
    assert len(found) == len(headings), "two sections have the same name"
    return found


@pytest.mark.parametrize("name", ["protocol.md", "servers.md"])
def test_every_link_leads_to_a_section(name: str) -> None:
    pages = {page.name: page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")}
    for page, anchor in re.findall(r"\]\(([\w.]*)#?([\w-]*)\)", pages[name]):
        assert not page or page in pages
        assert not anchor or anchor in anchors(pages[page or name])


def test_every_section_that_the_code_cites_exists() -> None:
    sources = [*(ROOT / "tinkex").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for source in (path for path in sources if path != Path(__file__)):
        # Citations may be continued on the next line of a comment.
        text = re.sub(r"\n\s*(?:#:?|//)?\s*", " ", source.read_text(encoding="utf-8"))
        for page, titles in re.findall(r'docs/(\w+\.md)((?:(?:,| and) "[^"]+")+)', text):
            headings = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.M)
            for title in re.findall(r'"([^"]+)"', titles):
                assert title in headings, f"{source}: {page} has no section {title!r}"


def names_in(value: Any) -> Iterator[str]:
    """Yield the name of every field of a JSON value, however nested."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from names_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from names_in(item)


#: Names made up by the arguments above, in objects whose keys are up to the user.
_OURS = {"k", "a"}


@pytest.mark.parametrize("request_", SENT, ids=lambda request: request.name)
def test_every_field_of_a_request_is_documented(request_: Request) -> None:
    body = json.loads(bytes(request_.body or b"{}"))
    query = re.findall(r"[?&](\w+)=", request_.path)
    sent = {*names_in(body), *query} - _OURS
    assert sent - code_words(PAGE) == set()


def messages() -> List[type]:
    """Return every control message of tinkex.types."""
    exported = [getattr(types, name) for name in dir(types)]
    # Not messages: UnknownVariant keeps any other object as it is, and WhoamiResponse is read from
    # a token.
    local = (types.UnknownVariant, types.WhoamiResponse)
    classes = [one for one in exported if isinstance(one, type) and one not in local]
    return [one for one in classes if issubclass(one, Wire)]


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.__name__)
def test_every_field_of_a_message_is_documented(message: Any) -> None:
    fields = {field.name for field in dataclasses.fields(message)}
    assert fields - code_words(PAGE) == set()


@pytest.mark.parametrize(
    ("kind", "title"), [(ServerFlags, "Static flags"), (DynamicFlags, "Dynamic flags")]
)
def test_the_flags_and_their_defaults_are_documented(kind: Any, title: str) -> None:
    table = re.findall(r"^\| `(\w+)` \| (\w+) \| (\S+) \| (\w*)", section(title), re.M)
    rows = [tuple(row) for *row, effect in table if effect != "none"]
    unused = {name for name, _, _, effect in table if effect == "none"}
    assert not unused & {field.name for field in dataclasses.fields(kind)}
    json_types = {bool: "boolean", int: "integer", float: "number", str: "string"}
    expected = []
    for field in dataclasses.fields(kind):
        default: Any = field.default
        shown = str(default).lower() if isinstance(default, bool) else f"{default}"
        shown = shown[: -len(".0")] if shown.endswith(".0") else shown
        expected.append((field.name, json_types[type(default)], shown))
    assert rows == expected


# ---- Protobuf ----

Number = Tuple[str, int]

_TYPE_NAMES = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def documented_messages() -> Dict[str, Dict[int, str]]:
    """Return message or enum name -> number -> declaration, from the document's proto blocks.

    A field in a ``oneof`` is declared as ``oneof <name>: <type> <field>``.
    """
    found: Dict[str, Dict[int, str]] = {}
    for block in re.findall(r"```proto\n(.*?)```", PAGE, re.S):
        message, oneof = "", ""
        for line in re.sub(r"//[^\n]*", "", block).splitlines():
            opened = re.match(r"\s*(message|enum|oneof) (\w+) \{", line)
            declared = re.match(r"\s*(.*\w) = (\d+);", line)
            if opened is not None and opened[1] == "oneof":
                oneof = f"oneof {opened[2]}: "
            elif opened is not None:
                message = opened[2]
                assert message not in found, f"{message} is documented twice"
                found[message] = {}
            elif declared is not None:
                found[message][int(declared[2])] = oneof + declared[1]
            elif line.strip() == "}":
                oneof = ""
    return found


def defined_messages() -> Dict[str, Dict[int, str]]:
    """Return the same mapping for the compiled definitions."""
    found: Dict[str, Dict[int, str]] = {}
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        found[name] = {field.number: _declaration(field) for field in message.fields}
    for name, enum in pb.DESCRIPTOR.enum_types_by_name.items():
        found[name] = {value.number: value.name for value in enum.values}
    return found


def _declaration(field: Any) -> str:
    kind = field.message_type or field.enum_type
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{_type_name(key)}, {_type_name(value)}> {field.name}"
    label = ""
    oneof = field.containing_oneof
    if oneof is not None and oneof.name == f"_{field.name}":  # how proto3 writes "optional"
        label = "optional "
    elif oneof is not None:
        label = f"oneof {oneof.name}: "
    elif _is_repeated(field):
        label = "repeated "
    return f"{label}{kind.name if kind is not None else _type_name(field)} {field.name}"


def _is_repeated(field: Any) -> bool:
    repeated: Optional[bool] = getattr(field, "is_repeated", None)  # protobuf 6 and later
    return field.label == FieldDescriptor.LABEL_REPEATED if repeated is None else repeated


def _type_name(field: Any) -> str:
    kind = field.message_type or field.enum_type
    return kind.name if kind is not None else _TYPE_NAMES[field.type]


def test_the_protobuf_messages_agree_with_the_code() -> None:
    assert documented_messages() == defined_messages()


# ---- Example bytes ----


@dataclasses.dataclass(frozen=True)
class Vector:
    """An example: a message in protobuf, and the same value in JSON if it has a JSON form."""

    name: str
    message: str
    raw: bytes
    text: Optional[bytes]


_VECTOR = re.compile(
    r"^\*\*(?P<name>\w)\*\* `(?P<message>\w+)`[^`]*?(?:`[^`\n]+`[^`]*?)*"
    r"```hex\n(?P<hex>[0-9a-f\n]+)```\n(?:\n```json\n(?P<json>.*?)```)?",
    re.S | re.M,
)


def vectors() -> List[Vector]:
    found = [
        Vector(
            match["name"],
            match["message"],
            bytes.fromhex(match["hex"].replace("\n", "")),
            None if match["json"] is None else match["json"].encode(),
        )
        for match in _VECTOR.finditer(section("Example bytes"))
    ]
    assert [vector.name for vector in found] == list("ABCDEFG")
    return found


VECTORS = vectors()

#: The codec methods that read and write each message.
_READERS = {
    "ForwardBackwardRequest": "decode_forward_backward",
    "ForwardBackwardOutput": "decode_output",
    "SampleResponse": "decode_samples",
}
_WRITERS = {
    "ForwardBackwardRequest": "encode_forward_backward",
    "ForwardBackwardOutput": "encode_output",
    "SampleResponse": "encode_samples",
}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_the_messages_encode_to_the_example_bytes(vector: Vector) -> None:
    official = getattr(test_golden, vector.name, vector.raw)  # G is our own
    assert vector.raw == official
    message = getattr(pb, vector.message).FromString(vector.raw)
    assert message.SerializeToString(deterministic=True) == vector.raw


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_an_example_is_the_same_value_in_both_encodings(vector: Vector) -> None:
    value = getattr(PROTOBUF, _READERS[vector.message])(vector.raw)
    if vector.text is None:
        assert vector.name == "C"  # provenance has no JSON form
        return
    other = getattr(JSON, _READERS[vector.message])(vector.text)
    # Compared as JSON, because results hold NaN and arrays.
    write = getattr(JSON, _WRITERS[vector.message])
    assert json.loads(write(other)) == json.loads(write(value))
    if vector.message == "ForwardBackwardRequest":
        assert value == other


@pytest.mark.parametrize(
    "vector", [one for one in VECTORS if one.name in "ABCEG"], ids=lambda vector: vector.name
)
def test_the_encoder_reproduces_an_example(vector: Vector) -> None:
    value = getattr(PROTOBUF, _READERS[vector.message])(vector.raw)
    assert getattr(PROTOBUF, _WRITERS[vector.message])(value) == vector.raw
