"""Text from a model, token by token if the server streams it; shared by ``sample`` and ``chat``.

The protocol has no streams, but an embedded server also has an OpenAI-compatible endpoint, which
streams.  From other servers, the text comes in one piece.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, TypeVar
from urllib.parse import urlsplit

import click

import tinkex
from tinkex import types
from tinkex._transport import request_log
from tinkex.cli import status_line
from tinkex.cli.commands import error_in_flags
from tinkex.cli.connect import (
    base_sampler,
    base_url_option,
    check_path,
    context_length,
    existing,
    explained,
    find_server,
    is_embedded,
    open_service,
)
from tinkex.cli.terminal import visible
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    ConfigError,
    InvalidInputError,
    RequestFailedError,
)

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_LOCAL_MODEL = "smollm2-135m"

_ENDPOINT = "/oai/api/v1"
#: Seconds without a byte after which a stream is broken.  While the engine is busy, the server
#: sends a comment every 2 s.
_TIMEOUT_S = 120.0

_MODEL_OPTIONS = (
    click.option(
        "--model-path", metavar="PATH", help="Sample from this checkpoint (tinker://...)."
    ),
    click.option("--base-model", metavar="NAME", help="Sample from this base model."),
    base_url_option,
    click.option("--local", is_flag=True, help="Run the model here, on the embedded server."),
    click.option("--data-dir", metavar="DIR", help="With --local: the folder for checkpoints."),
)

_SAMPLING_OPTIONS = (
    click.option("--temperature", default=1.0, show_default=True, help="0 is greedy."),
    click.option(
        "--top-p",
        default=1.0,
        show_default=True,
        help="Sample from the most likely tokens whose probabilities add up to this.",
    ),
    click.option(
        "--top-k",
        default=-1,
        show_default=True,
        help="Sample from this many of the most likely tokens; -1 for all.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop at TEXT; may be repeated."),
    click.option("--seed", type=int, help="Seed for reproducible samples."),
)


def model_options(command: F) -> F:
    """Add the options that choose a model and its server."""
    return functools.reduce(lambda made, option: option(made), reversed(_MODEL_OPTIONS), command)


def sampling_options(command: F) -> F:
    """Add the options that choose how tokens are drawn."""
    return functools.reduce(lambda made, option: option(made), reversed(_SAMPLING_OPTIONS), command)


def check_model_options(ctx: click.Context) -> None:
    """Raise UsageError if the options name two models; check the path of a checkpoint."""
    given = ctx.params
    if given["run_folder"] is not None:
        others = ("model_path", "base_model", "local", "data_dir")
        flags = [f"--{name.replace('_', '-')}" for name in others if given[name]]
        if flags:
            raise click.UsageError(
                f"{' and '.join(flags)} cannot be used with a run folder, which has a model of "
                "its own"
            )
    if given["model_path"] and given["base_model"] and not given["local"]:
        raise click.UsageError("give --model-path or --base-model, not both")
    if given["model_path"]:
        check_path(given["model_path"])


@contextlib.contextmanager
def open_generator(ctx: click.Context) -> Iterator[Generator]:
    """Open a session with the model that the options choose; it ends with the block."""
    given = ctx.params
    if given["run_folder"] is not None:
        with _open_run_folder(given["run_folder"], given["base_url"]) as generator:
            yield generator
        return
    local_model = (given["base_model"] or DEFAULT_LOCAL_MODEL) if given["local"] else None
    opened = open_service(given["base_url"], local_model=local_model, data_dir=given["data_dir"])
    with opened as service:
        yield Generator(service, given["model_path"], given["base_model"] or local_model)


@contextlib.contextmanager
def _open_run_folder(folder: Path, base_url: Optional[str]) -> Iterator[Generator]:
    """Open a session with the newest weights of the run in *folder*; it ends with the block."""
    from tinkex import recipes

    status_line.waiting_for(f"opening the server of {folder}")
    if base_url is None and recipes.server_of(folder) is None:  # a run of an older version
        base_url = find_server(None).base_url
    service, record = recipes.open_service(folder, base_url)
    with service, explained(service.config):
        status_line.waiting_for("finding the newest weights")
        path = recipes.find_sampler(service, record)
        yield Generator(service, path, record.spec["base_model"])


def sampling_params(ctx: click.Context) -> types.SamplingParams:
    """Return the parameters given by `sampling_options` and ``--max-tokens``.

    Raises UsageError, which names the option, if a value is out of range.
    """
    given = ctx.params
    params = types.SamplingParams(
        max_tokens=given["max_tokens"],
        seed=given["seed"],
        stop=list(given["stop"]) or None,
        temperature=given["temperature"],
        top_k=given["top_k"],
        top_p=given["top_p"],
    )
    try:
        params.check()
    except InvalidInputError as error:
        raise click.UsageError(error_in_flags(error, ctx)) from error
    return params


#: The context length, before the server was asked for it.
_UNKNOWN = -1


class ContextFullError(InvalidInputError):
    """The conversation fills the model's context."""


class Generator:
    """A model to generate text with, and its tokenizer.

    Args:
        service: an open session.
        model_path: path of the checkpoint to sample; None for a base model.
        base_model: name of the base model; None takes the only one that the server has.
    """

    def __init__(
        self,
        service: tinkex.ServiceClient,
        model_path: Optional[str],
        base_model: Optional[str],
    ) -> None:
        self._service = service
        self._config = service.config
        self._base_model = base_model
        self._context_length: Optional[int] = _UNKNOWN
        if model_path:
            self._model = model_path
            with existing(model_path):
                self._sampler = service.create_sampling_client(model_path=model_path)
        else:
            self._model = base_model or _only_model(service)
            self._sampler = base_sampler(service, self._model)
        status_line.waiting_for("loading the tokenizer")
        self.tokenizer: Any = self._sampler.get_tokenizer()
        self._streams: Optional[bool] = None  # whether the server streams; None if not yet asked

    def sample(
        self, tokens: List[int], params: types.SamplingParams, count: int
    ) -> types.SampleResponse:
        """Return *count* continuations of *tokens*."""
        status_line.waiting_for(f"waiting for {self._config.host_and_port} to sample")
        prompt = types.ModelInput.from_ints(tokens)
        return self._sampler.sample(
            prompt=prompt, num_samples=count, sampling_params=params
        ).result()

    def read(self, tokens: List[int]) -> str:
        """Return the text of *tokens* without special tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def pieces(self, tokens: List[int], params: types.SamplingParams) -> Iterator[str]:
        """Yield the text of one continuation of *tokens*, piece by piece as it arrives."""
        if self._streams is None:
            self._streams = _offers_streams(self._config)
        if not self._streams:
            yield self.read(self.sample(tokens, params, 1).sequences[0].tokens)
            return
        status_line.waiting_for(f"waiting for {self._config.host_and_port} to sample")
        # Send tokens, because the endpoint would encode text by its own rules.
        body = {"model": self._model, "prompt": tokens, "stream": True, **params.to_json()}
        yield from _stream(self._config, {**body, "include_stop_str_in_output": True})

    def fitting(self, params: types.SamplingParams, prompt_tokens: int) -> types.SamplingParams:
        """Return *params* with ``max_tokens`` limited to the room left in the model's context.

        Raises:
            ContextFullError: the prompt fills the context.
        """
        if self._context_length is _UNKNOWN:
            self._context_length = context_length(self._service, self._base_model)
        limit = self._context_length
        if limit is None or params.max_tokens is None:
            return params
        room = limit - prompt_tokens
        if room < 1:
            raise ContextFullError(
                f"the conversation has {prompt_tokens} tokens, which fills the model's context of "
                f"{limit}",
                hint='Begin a new conversation with "/new".',
            )
        return dataclasses.replace(params, max_tokens=min(params.max_tokens, room))

    def chat_tokens(self, messages: List[Dict[str, str]], advice: str) -> List[int]:
        """Return the tokens of a conversation, up to where the reply begins.

        Raises InvalidInputError, with *advice* as its hint, if the model has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise InvalidInputError("the model has no chat template", hint=advice)
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens: List[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens


def write_pieces(pieces: Iterator[str]) -> str:
    """Write *pieces* to stdout as they arrive, then a newline; return the text."""
    first = next(pieces, "")  # the status line is shown until the first piece arrives
    parts: List[str] = []
    out = sys.stdout
    with status_line.hidden():
        for piece in itertools.chain([first], pieces, ["\n"]):
            parts.append(piece)
            if out is not None:
                out.write(visible(piece) if out.isatty() else piece)
                out.flush()
    return "".join(parts[:-1])


def _only_model(service: tinkex.ServiceClient) -> str:
    """Return the server's base model if it offers exactly one."""
    capabilities = service.get_server_capabilities()
    names = [m.model_name for m in capabilities.supported_models if m.model_name is not None]
    if len(names) != 1:
        raise ConfigError(
            f"the server offers {len(names)} models",
            hint=f"Choose one with --base-model: {', '.join(names)}." if names else None,
        )
    return names[0]


# The endpoint


def _offers_streams(config: Config) -> bool:
    """Return whether the server is an embedded one that can be reached directly."""
    # With plain http.client, which knows no retries and no proxies: if a proxy is needed, this
    # fails, and the text comes in one piece over the protocol.
    connection = _connect(config, timeout_s=5.0)
    return is_embedded(connection, _path(config, "models"), _headers(config))


def _stream(config: Config, body: Dict[str, Any]) -> Iterator[str]:
    """Yield the pieces of one completion.  If closed early, the server stops sampling."""
    connection = _connect(config, timeout_s=_TIMEOUT_S)
    try:
        headers = {**_headers(config), "Content-Type": "application/json"}
        path, content = _path(config, "completions"), json.dumps(body)
        began = time.monotonic()
        connection.request("POST", path, content, headers)
        response = connection.getresponse()
        url = f"http://{config.host_and_port}{path}"
        took_s = time.monotonic() - began
        request_log.log_stream("POST", url, response.status, len(content), took_s)
        if response.status != 200:
            raise _failure(json.loads(response.read()))
        for line in response:
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise _failure(event)
                yield event["choices"][0]["text"]
        # A complete stream ends with [DONE], so the end of this text may be missing.
        raise APIConnectionError(f"{config.host_and_port}: the stream ended early")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise APIConnectionError(f"{config.host_and_port}: the stream broke: {error}") from error
    finally:
        connection.close()


def _failure(body: Dict[str, Any]) -> RequestFailedError:
    return RequestFailedError(str(body["error"]["message"]))


def _connect(config: Config, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(config.base_url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(str(parts.hostname), parts.port, timeout=timeout_s)


def _path(config: Config, route: str) -> str:
    return f"{urlsplit(config.base_url).path.rstrip('/')}{_ENDPOINT}/{route}"


def _headers(config: Config) -> Dict[str, str]:
    return {} if config.api_key is None else {"X-API-Key": config.api_key}
