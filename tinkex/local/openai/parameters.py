"""Call: what a request asks for, read from its body and checked.

Parameters that this server does not have are refused by name, unless their value asks for nothing,
or they could not change the text.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from tinkex.errors import InvalidInputError, a_type
from tinkex.local.engines.engine import EngineInfo
from tinkex.local.openai.errors import OpenAIError
from tinkex.local.openai.text import Text
from tinkex.types import SamplingParams

#: Most choices of one request: prompts times n.
_MOST_CHOICES = 2048

#: Maximum length of a completion, in tokens, unless the request sets one.
_DEFAULT_MAX_TOKENS = 16

_COMMON = {
    *("model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "logprobs"),
    *("stream", "stream_options", "include_stop_str_in_output"),
}
_OF_COMPLETIONS = {*_COMMON, "prompt", "echo"}
_OF_CHAT = {
    *_COMMON,
    *("messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message"),
}

#: Ignored: about the sender, or about handling the response elsewhere; they do not change the text.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
}

#: Not supported: only these values, which ask for nothing, are accepted.
_NEUTRAL: Dict[str, Tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, and its text unless the client sent tokens."""

    tokens: List[int]
    text: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Call:
    """A request for completions, or for a chat completion.

    Attributes:
        prompts: each gets *n* choices.
        params: parameters for the engine; ``max_tokens`` is at least 1.
        stops: strings that end a choice.
        keep_stop: True keeps the stop string in the text.
        top: how many of the likeliest tokens to list at each position; None for no
            log-probabilities at all.
        empty: True if the choices hold no sampled token (``max_tokens=0``), only the prompt.
    """

    chat: bool
    model: str
    prompts: List[Prompt]
    n: int
    params: SamplingParams
    stops: Tuple[str, ...]
    keep_stop: bool
    top: Optional[int]
    echo: bool
    empty: bool
    stream: bool
    include_usage: bool


class _Fields:
    """The fields of a body, read with their types checked; null is the same as absent."""

    def __init__(self, body: Dict[str, Any]) -> None:
        self._body = body

    def get(self, name: str) -> Any:
        """Return a field as it is."""
        return self._body.get(name)

    def text(self, name: str) -> Optional[str]:
        """Return a string."""
        value: Optional[str] = self._typed(name, "a string", lambda v: isinstance(v, str))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self._typed(name, "true or false", lambda value: isinstance(value, bool))
        return default if value is None else bool(value)

    def integer(
        self, name: str, least: Optional[int] = None, most: Optional[int] = None
    ) -> Optional[int]:
        """Return an integer from *least* to *most*."""

        def fits(value: object) -> bool:
            if not isinstance(value, int) or isinstance(value, bool):
                return False
            return (least is None or value >= least) and (most is None or value <= most)

        bounds = [f"at least {least}"] if least is not None else []
        bounds += [f"at most {most}"] if most is not None else []
        value: Optional[int] = self._typed(name, ", ".join(["an integer", *bounds]), fits)
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number; `SamplingParams.check` checks its range."""

        def fits(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        value = self._typed(name, "a number", fits)
        return default if value is None else float(value)

    def mapping(self, name: str) -> Dict[str, Any]:
        """Return an object, empty if absent."""
        return self._typed(name, "an object", lambda value: isinstance(value, dict)) or {}

    def _typed(self, name: str, what: str, fits: Callable[[object], bool]) -> Any:
        value = self._body.get(name)
        if value is not None and not fits(value):
            raise OpenAIError(f"{name} is {value!r:.100}; it must be {what}", name)
        return value


def read_completions(body: Dict[str, Any], text: Text, info: EngineInfo, most: int) -> Call:
    """Read the body of ``completions``, with ``n`` up to *most*; OpenAIError if it is not valid."""
    _check_names(body, _OF_COMPLETIONS)
    fields = _Fields(body)
    n = fields.integer("n", 1, most) or 1
    prompts = _read_prompts(fields.get("prompt"), n, text)
    max_tokens = fields.integer("max_tokens", 0)
    for prompt in prompts:
        _check_context(prompt, max_tokens, info, "prompt")
    if max_tokens is None:
        rooms = [info.context_length - len(prompt.tokens) for prompt in prompts]
        # The client has not asked for a length, so less room in the context is not an error.
        max_tokens = min(_DEFAULT_MAX_TOKENS, *rooms)
    top = fields.integer("logprobs", 0, info.vocab_size)
    return _call(fields, prompts, n, max_tokens, top, chat=False, echo=fields.flag("echo"))


def read_chat(body: Dict[str, Any], text: Text, info: EngineInfo, most: int) -> Call:
    """Read the body of ``chat/completions``, with ``n`` up to *most*; OpenAIError if not valid."""
    _check_names(body, _OF_CHAT)
    fields = _Fields(body)
    n = fields.integer("n", 1, most) or 1
    options = dict(fields.mapping("chat_template_kwargs"))
    for name in ("add_generation_prompt", "continue_final_message"):
        if fields.get(name) is not None:
            options[name] = fields.flag(name)
    if options.get("continue_final_message"):
        # A template cannot both continue the last message and begin a new one.
        options.setdefault("add_generation_prompt", False)
    prompt = Prompt(text.chat(_read_messages(fields.get("messages")), options))
    if not prompt.tokens:
        raise OpenAIError("the messages make an empty prompt", "messages")
    max_tokens = fields.integer("max_completion_tokens", 1) or fields.integer("max_tokens", 1)
    _check_context(prompt, max_tokens, info, "messages")
    top = fields.integer("top_logprobs", 0, info.vocab_size)
    if not fields.flag("logprobs"):
        if top is not None:
            raise OpenAIError("top_logprobs needs logprobs to be true", "top_logprobs")
    elif top is None:
        top = 0
    return _call(fields, [prompt], n, max_tokens, top, chat=True, echo=False)


def _call(
    fields: _Fields,
    prompts: List[Prompt],
    n: int,
    max_tokens: Optional[int],
    top: Optional[int],
    *,
    chat: bool,
    echo: bool,
) -> Call:
    model = fields.text("model")
    if not model:
        raise OpenAIError("model is missing; GET models lists what is served", "model")
    stops = _read_stops(fields.get("stop"))
    params = SamplingParams(
        # The engine samples at least one token; a choice that is `empty` drops it.
        max_tokens=max_tokens or (1 if max_tokens == 0 else None),
        seed=fields.integer("seed"),
        # Not an empty list, which would stop at max_tokens only (docs/protocol.md, "Sample
        # requests").
        stop=list(stops) or None,
        temperature=fields.number("temperature", 1.0),
        top_k=_top_k(fields),
        top_p=fields.number("top_p", 1.0),
    )
    try:
        params.check()
    except InvalidInputError as error:
        # These messages begin with the name of the parameter.
        raise OpenAIError(error.message, error.message.partition(" ")[0]) from error
    stream, options = fields.flag("stream"), fields.mapping("stream_options")
    if options and not stream:
        raise OpenAIError("stream_options needs stream to be true", "stream_options")
    return Call(
        chat=chat,
        model=model,
        prompts=prompts,
        n=n,
        params=params,
        stops=stops,
        keep_stop=fields.flag("include_stop_str_in_output"),
        top=top,
        echo=echo,
        empty=max_tokens == 0,
        stream=stream,
        include_usage=_Fields(options).flag("include_usage"),
    )


def _check_names(body: Dict[str, Any], known: Set[str]) -> None:
    for name, value in body.items():
        if name in known or name in _IGNORED or value is None:
            continue
        if name == "best_of" and "prompt" in known:
            if value != (body.get("n") or 1):
                raise OpenAIError("best_of is not supported unless it equals n", name)
        elif name not in _NEUTRAL:
            raise OpenAIError(f"unknown parameter: {name!r:.100}", name[:100])
        elif value not in _NEUTRAL[name]:
            raise OpenAIError(f"{name} is not supported by this server; leave it out", name)


def _top_k(fields: _Fields) -> int:
    value = fields.integer("top_k")
    return -1 if value in (None, 0) else int(value or -1)


def _read_stops(value: Any) -> Tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise OpenAIError(
            f"stop is {value!r:.100}; it must be a string or a list of strings, none of them empty",
            "stop",
        )
    return tuple(stops)


def _read_prompts(value: Any, n: int, text: Text) -> List[Prompt]:
    """Read a string, a list of strings, a list of token ids, or a list of such lists."""
    if value is None:
        raise OpenAIError("prompt is missing", "prompt")
    given: Any = [value] if isinstance(value, str) or _are_tokens(value) else value
    fits = isinstance(given, list) and bool(given)
    if not fits or not all(isinstance(one, str) or _are_tokens(one) for one in given):
        raise OpenAIError(
            "prompt must be a string, a list of token ids, or a list of these, and not be empty",
            "prompt",
        )
    if len(given) * n > _MOST_CHOICES:
        raise OpenAIError(
            f"{len(given)} prompts with n = {n} make {len(given) * n} choices; at most "
            f"{_MOST_CHOICES}: send several requests",
            "prompt",
        )
    prompts = [
        Prompt(text.encode(one), one) if isinstance(one, str) else Prompt(one) for one in given
    ]
    if not all(prompt.tokens for prompt in prompts):
        raise OpenAIError("the prompt is empty, and this model needs a first token", "prompt")
    return prompts


def _are_tokens(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        # By type, because True is an int, too; bounded, because the engine's tokens are int32.
        and all(type(token) is int and 0 <= token < 1 << 31 for token in value)
    )


def _check_context(prompt: Prompt, max_tokens: Optional[int], info: EngineInfo, param: str) -> None:
    wanted = max(1, max_tokens or 1)
    if len(prompt.tokens) + wanted > info.context_length:
        raise OpenAIError(
            f"the model's context holds {info.context_length} tokens; the request needs "
            f"{len(prompt.tokens) + wanted}: {len(prompt.tokens)} of the {param}, {wanted} of the "
            "completion",
            param,
            code="context_length_exceeded",
        )


def _read_messages(value: Any) -> List[Dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise OpenAIError("messages must be a list of messages, and not be empty", "messages")
    return [_read_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _read_message(message: Any, param: str) -> Dict[str, Any]:
    if not isinstance(message, dict):
        raise OpenAIError(f"{param} is {a_type(message)}; it must be an object", param)
    role = message.get("role")
    if role not in _ROLES:
        raise OpenAIError(
            f"{param}.role is {role!r:.100}; it must be one of {', '.join(_ROLES)}", f"{param}.role"
        )
    content = message.get("content")
    if content is None and role != "assistant":
        raise OpenAIError(f"{param}.content is missing", f"{param}.content")
    # Templates know only the older name.
    role = "system" if role == "developer" else role
    return {**message, "role": role, "content": _read_content(content, f"{param}.content")}


def _read_content(content: Any, param: str) -> Optional[str]:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise OpenAIError(f"{param} is {a_type(content)}; it must be text", param)
    parts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise OpenAIError(
                f"{param}[{place}] is not a part of type text: this server's models read text only",
                f"{param}[{place}]",
            )
        parts.append(part[kind])
    return "".join(parts)
