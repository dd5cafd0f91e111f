"""``tinkex sample``: prompt in, text out."""

from __future__ import annotations

import sys
from typing import Any, List, Optional

import click

from tinkex import types
from tinkex.cli.commands import Command
from tinkex.cli.connect import open_service
from tinkex.cli.generate import (
    DEFAULT_LOCAL_MODEL,
    Generator,
    check_model_options,
    model_options,
    sampling_options,
    sampling_params,
    write_pieces,
)
from tinkex.cli.output import format_option, print_json, wants_json
from tinkex.cli.terminal import echo, read_input, visible
from tinkex.errors import InvalidInputError


@click.command(cls=Command)
@click.argument("prompt")
@model_options
@click.option("--chat", is_flag=True, help="Send PROMPT as a chat message instead of raw text.")
@click.option("--max-tokens", default=128, show_default=True, help="Maximum number of new tokens.")
@sampling_options
@click.option("-n", "--num-samples", default=1, show_default=True, help="Number of continuations.")
@format_option
@click.pass_context
def sample(
    ctx: click.Context,
    /,
    prompt: str,
    model_path: Optional[str],
    base_model: Optional[str],
    base_url: Optional[str],
    local: bool,
    data_dir: Optional[str],
    chat: bool,
    num_samples: int,
    **_sampling: Any,
) -> None:
    """Continue PROMPT and print the text; "-" reads the prompt from stdin.

    Several samples are separated by a line "---".  An embedded server streams a single one: it is
    printed token by token.
    """
    check_model_options(model_path, base_model, local)
    if num_samples < 1:
        raise click.UsageError("--num-samples must be at least 1")
    params = sampling_params(ctx)
    text = read_input() if prompt == "-" else prompt
    text.encode()  # raises UnicodeError for invalid text before anything is opened
    local_model = (base_model or DEFAULT_LOCAL_MODEL) if local else None
    with open_service(base_url, local_model=local_model, data_dir=data_dir) as service:
        generator = Generator(service, model_path, base_model or local_model)
        tokens = _encode(generator, text, chat)
        if num_samples == 1 and not wants_json():
            write_pieces(generator.pieces(tokens, params))
            return
        response = generator.sample(tokens, params, num_samples)
    _print([generator.read(sequence.tokens) for sequence in response.sequences], response)


def _encode(generator: Generator, text: str, chat: bool) -> List[int]:
    tokens: List[int]
    if chat:
        tokens = generator.chat_tokens([{"role": "user", "content": text}], "Omit --chat.")
    else:
        tokens = generator.tokenizer.encode(text)
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
