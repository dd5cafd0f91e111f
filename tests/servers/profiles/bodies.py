"""What a request's body must contain, as checked by servers made with FastAPI and pydantic.

`faults` lists errors in their format, ``{type, loc, msg, input}``, for the 422 answer.  The fields
are those of the protocol as of SDK 0.25; a strict server refuses later fields as extras.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

Fault = Dict[str, Any]
#: Field -> its kind; "!" marks a required field, "!?" a field that a strict server requires, though
#: it may be null.
Schema = Mapping[str, str]

_LORA: Schema = {
    "rank": "int!",
    "seed": "int",
    "train_unembed": "bool",
    "train_mlp": "bool",
    "train_attn": "bool",
}
_ADAM: Schema = {
    "learning_rate": "float",
    "beta1": "float",
    "beta2": "float",
    "eps": "float",
    "weight_decay": "float",
    "grad_clip_norm": "float",
}
_NUMBERED: Schema = {"model_id": "str!", "seq_id": "int", "type": "str"}

_SCHEMAS: Mapping[str, Schema] = {
    "client/config": {"sdk_version": "str"},
    "create_session": {
        "tags": "list!",
        "user_metadata": "dict!?",
        "sdk_version": "str!",
        "project_id": "str",
        "type": "str",
    },
    "session_heartbeat": {"session_id": "str!", "type": "str"},
    "create_model": {
        "session_id": "str!",
        "model_seq_id": "int!",
        "base_model": "str!",
        "user_metadata": "dict",
        "lora_config": "dict",
        "type": "str",
    },
    "get_info": {"model_id": "str!", "type": "str"},
    "unload_model": {"model_id": "str!", "type": "str"},
    "load_weights": {
        **_NUMBERED,
        "path": "str!",
        "optimizer": "bool!?",
        "weights_access_token": "str",
    },
    "forward_backward": {**_NUMBERED, "forward_backward_input": "dict!"},
    "forward": {**_NUMBERED, "forward_input": "dict!"},
    "optim_step": {**_NUMBERED, "adam_params": "dict!"},
    "save_weights": {**_NUMBERED, "path": "str", "ttl_seconds": "int", "overwrite": "bool"},
    "save_weights_for_sampler": {
        **_NUMBERED,
        "path": "str",
        "sampling_session_seq_id": "int",
        "ttl_seconds": "int",
    },
    "create_sampling_session": {
        "session_id": "str!",
        "sampling_session_seq_id": "int!",
        "base_model": "str",
        "model_path": "str",
        "type": "str",
    },
    "asample": {
        "num_samples": "int",
        "prompt": "dict!",
        "sampling_params": "dict!",
        "sampling_session_id": "str",
        "seq_id": "int",
        "base_model": "str",
        "model_path": "str",
        "prompt_logprobs": "bool",
        "topk_prompt_logprobs": "int",
        "type": "str",
    },
    "retrieve_future": {"request_id": "str!", "allow_metadata_only": "bool"},
    "weights_info": {"tinker_path": "str!"},
}
#: Field of a route -> the fields of the object in it.
_NESTED: Mapping[str, Mapping[str, Schema]] = {
    "create_model": {"lora_config": _LORA},
    "optim_step": {"adam_params": _ADAM},
}
#: The fields that place a new run in a session, on servers that can load a checkpoint into one.
_NEW_RUN: Schema = {
    "session_id": "str",
    "model_seq_id": "int",
    "base_model": "str",
    "user_metadata": "dict",
}

_TYPES: Mapping[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "dict": dict,
    "list": list,
}
_MISTYPED = {
    "str": ("string_type", "Input should be a valid string"),
    "int": ("int_type", "Input should be a valid integer"),
    "float": ("float_type", "Input should be a valid number"),
    "bool": ("bool_type", "Input should be a valid boolean"),
    "dict": ("dict_type", "Input should be a valid dictionary"),
    "list": ("list_type", "Input should be a valid list"),
}


def faults(route: str, body: Any, *, refuse_extras: bool, new_runs: bool) -> List[Fault]:
    """Return the errors in the JSON *body* of a request to *route*; an empty list if it is valid.

    Args:
        route: below ``/api/v1/``; an unknown route accepts any body.
        refuse_extras: unknown fields are errors.
        new_runs: load_weights knows the fields that name a new run.
    """
    schema = _SCHEMAS.get(route)
    if schema is None:
        return []
    if route == "load_weights" and new_runs:
        schema = {**schema, **_NEW_RUN, "model_id": "str"}
    found = _check(schema, body, ["body"], refuse_extras)
    for name, nested in _NESTED.get(route, {}).items():
        if not found and isinstance(body.get(name), dict):
            found += _check(nested, body[name], ["body", name], refuse_extras)
    return found


def not_json(at: int, message: str) -> Fault:
    """Return the error about a body that cannot be parsed."""
    return {
        "type": "json_invalid",
        "loc": ["body", at],
        "msg": "JSON decode error",
        "input": {},
        "ctx": {"error": message},
    }


def _check(schema: Schema, body: Any, loc: List[Any], refuse_extras: bool) -> List[Fault]:
    if not isinstance(body, dict):
        kind = "model_attributes_type"
        text = "Input should be a valid dictionary or object to extract fields from"
        return [{"type": kind, "loc": loc, "msg": text, "input": body}]
    found: List[Fault] = []
    for name, kind in schema.items():
        value = body.get(name)
        if value is None:
            insisted_on = kind.endswith("!?") and refuse_extras and name not in body
            if kind.endswith("!") or insisted_on:
                found.append(
                    {
                        "type": "missing",
                        "loc": [*loc, name],
                        "msg": "Field required",
                        "input": body,
                    }
                )
        elif not _fits(kind.rstrip("!?"), value):
            fault, text = _MISTYPED[kind.rstrip("!?")]
            found.append({"type": fault, "loc": [*loc, name], "msg": text, "input": value})
    if refuse_extras:
        for name in body:
            if name not in schema:
                text = "Extra inputs are not permitted"
                found.append(
                    {
                        "type": "extra_forbidden",
                        "loc": [*loc, name],
                        "msg": text,
                        "input": body[name],
                    }
                )
    return found


def _fits(kind: str, value: Any) -> bool:
    if isinstance(value, bool) and kind != "bool":
        return False
    return isinstance(value, _TYPES[kind])
