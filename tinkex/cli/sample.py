"""``tinkex sample``: prompt in, text out."""

from __future__ import annotations

import sys
from typing import Any, List, Optional, Tuple

import click

import tinkex
from tinkex import types
from tinkex.cli import status
from tinkex.cli.commands import Command, in_flags
from tinkex.cli.connect import base_url_option, check_path, open_service
from tinkex.cli.output import format_option, print_json, wants_json
from tinkex.cli.terminal import echo, read_input, visible
from tinkex.errors import ConfigError, InvalidInputError

DEFAULT_LOCAL_MODEL = "smollm2-135m"


@click.command(cls=Command)
@click.argument("prompt")
@click.option("--model-path", metavar="PATH", help="Sample from this checkpoint (tinker://...).")
@click.option("--base-model", metavar="NAME", help="Sample from this base model.")
@base_url_option
@click.option("--local", is_flag=True, help="Run the model here, on the embedded server.")
@click.option("--data-dir", metavar="DIR", help="With --local: the folder for checkpoints.")
@click.option("--chat", is_flag=True, help="Send PROMPT as a chat message instead of raw text.")
@click.option("--max-tokens", default=128, show_default=True, help="Maximum number of new tokens.")
@click.option("--temperature", default=1.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens whose probabilities add up to this.",
)
@click.option(
    "--top-k",
    default=-1,
    show_default=True,
    help="Sample from this many of the most likely tokens; -1 for all.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop at TEXT; may be repeated.")
@click.option("--seed", type=int, help="Seed for reproducible samples.")
@click.option("-n", "--num-samples", default=1, show_default=True, help="Number of continuations.")
@format_option
@click.pass_context
def sample(
    ctx: click.Context,
    prompt: str,
    model_path: Optional[str],
    base_model: Optional[str],
    base_url: Optional[str],
    local: bool,
    data_dir: Optional[str],
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    stop: Tuple[str, ...],
    seed: Optional[int],
    num_samples: int,
) -> None:
    """Continue PROMPT and print the text; "-" reads the prompt from stdin.

    Several samples are separated by a line "---".
    """
    if model_path and base_model and not local:
        raise click.UsageError("give --model-path or --base-model, not both")
    if model_path:
        check_path(model_path)
    if num_samples < 1:
        raise click.UsageError("--num-samples must be at least 1")
    params = types.SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        stop=list(stop) or None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    try:
        params.check()
    except InvalidInputError as error:
        raise click.UsageError(in_flags(str(error), ctx)) from error
    text = read_input() if prompt == "-" else prompt
    text.encode()  # raises UnicodeError for invalid text before anything is opened
    local_model = (base_model or DEFAULT_LOCAL_MODEL) if local else None
    with open_service(base_url, local_model=local_model, data_dir=data_dir) as service:
        if model_path:
            sampler = service.create_sampling_client(model_path=model_path)
        else:
            name = base_model or local_model or _only_model(service)
            sampler = service.create_sampling_client(base_model=name)
        status.waiting_for("loading the tokenizer")
        tokenizer = sampler.get_tokenizer()
        tokens = types.ModelInput.from_ints(_encode(tokenizer, text, chat))
        status.waiting_for(f"waiting for {service.config.host_and_port} to sample")
        response = sampler.sample(
            prompt=tokens, num_samples=num_samples, sampling_params=params
        ).result()
    texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in response.sequences]
    _print(texts, response)


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


def _encode(tokenizer: Any, text: str, chat: bool) -> List[int]:
    if chat:
        if not tokenizer.chat_template:
            raise InvalidInputError("the model has no chat template", hint="Omit --chat.")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    tokens: List[int] = tokenizer.encode(text, add_special_tokens=not chat)
    if not tokens:
        raise InvalidInputError("the prompt is empty")
    return tokens


def _print(texts: List[str], response: types.SampleResponse) -> None:
    if wants_json():
        print_json(
            {
                "sequences": [
                    {"text": text, "tokens": list(s.tokens), "stop_reason": s.stop_reason}
                    for text, s in zip(texts, response.sequences)
                ]
            }
        )
    else:
        text = "\n---\n".join(texts)
        echo(visible(text) if sys.stdout is not None and sys.stdout.isatty() else text)
