"""The public surface of the official SDK, and the parts of it that tinkex lacks."""

from __future__ import annotations

from typing import Mapping

#: A program that prints the classes of a module and of its ``types``: member -> parameters or null.
PROBE = """
import dataclasses, importlib, inspect, json, sys

module = importlib.import_module(sys.argv[1])

def parameters(value):
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return ["**" if one.kind is one.VAR_KEYWORD else one.name for one in found
            if one.name not in ("self", "cls") and one.kind is not one.VAR_POSITIONAL
            and not one.name.startswith("_")]

def members(kind, base):
    found = {}
    for name in dir(kind):
        if not name.startswith("_") and name not in base:
            value = getattr(kind, name)
            found[name] = parameters(value) if inspect.isroutine(value) else None
    if dataclasses.is_dataclass(kind):
        fields = [one.name for one in dataclasses.fields(kind)]
    else:
        fields = list(getattr(kind, "model_fields", None) or ())
    found.update({name: None for name in fields if not name.startswith("_")})
    if inspect.isclass(kind) and not issubclass(kind, BaseException):
        found["__init__"] = parameters(kind)
    return found

try:
    import pydantic
    base = {name for name in dir(pydantic.BaseModel)} | {"model_config", "to_dict", "to_json"}
except ImportError:
    base = set()

def classes(space):
    names = (name for name in dir(space) if not name.startswith("_") and name != "annotations")
    values = {name: getattr(space, name) for name in names}
    return {name: members(value, base) if inspect.isclass(value) else {}
            for name, value in values.items() if not inspect.ismodule(value)}

found = {"tinker": classes(module), "tinker.types": classes(module.types)}
if sys.argv[1] == "tinkex":  # its names are resolved when they are asked for
    found["tinker"] = {name: members(getattr(module, name), base)
                       if inspect.isclass(getattr(module, name)) else {}
                       for name in set(module.__all__) | set(dir(module))
                       if not name.startswith("_") and hasattr(module, name)}
print(json.dumps(found))
"""

#: Names that are left out on purpose, or are not for callers: a pattern of what `lacking` finds ->
#: the words in docs/compatibility.md that document it.
EXCEPTIONS: Mapping[str, str] = {
    r"Backcompat\w+\..*": "`Backcompat*`",
    r"(Service|Training|Sampling)Client\.(holder|create|on_queue_state_change)": "`holder`",
    r"(Training|Sampling)Client\.__init__\(\w+\)": "made by their creators",
    r"LossHandle\..*": "`LossHandle`",
    r"(Async)?APIResponse|RequestOptions|Timeout": "`Timeout`",
    r"\w+(Request|Internal)": "`types.CreateModelRequest`",
    r"(SampleRequest|ForwardBackwardRequest)\..*": "`types.CreateModelRequest`",
    r"(AuthToken|ClientConfig|ClientDynamicConfig|FutureRetrieve|FuturesRetrieve|Health"
    r"|RequestFailed|SessionHeartbeat|Telemetry)Response": "`types.CreateModelRequest`",
    r"Future(Completion|Failed|Finished)|UntypedAPIFuture": "`types.CreateModelRequest`",
    r"ForwardBackwardInput|SamplingSessionFuturesTarget": "`types.CreateModelRequest`",
    r"ProvenanceSpans": "`types.CreateModelRequest`",
    r"CustomLoss(Graph|Input|Node)": "`types.CreateModelRequest`",
    r"\w*Event|EventType|Severity|TelemetryBatch": "`types.CreateModelRequest`",
    r"ClientSessionFinish\w+": "`types.SessionFinishReason`",
    r"\w+\.(type|__init__\(type\))": "`type`",
    r"\w+Chunk\.(serialize|validate)_\w+": "pydantic",
}
