"""``tinkex sample``: prompt in, text out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, List

import click

from tinkex import types
from tinkex.cli.commands import Command
from tinkex.cli.generate import (
    Generator,
    check_model_options,
    model_options,
    open_generator,
    sampling_options,
    sampling_params,
    write_pieces,
)
from tinkex.cli.output import format_option, print_json, wants_json
from tinkex.cli.terminal import echo, read_input, visible
from tinkex.errors import InvalidInputError


@click.command(cls=Command)
@click.argument("prompt")
@click.option("--run", "run_folder", metavar="FOLDER", type=click.Path(path_type=Path),
              help="Sample from the newest weights of this run folder.")  # fmt: skip
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
    chat: bool,
    num_samples: int,
    **_options: Any,
) -> None:
    """Continue PROMPT and print the text; "-" reads the prompt from stdin.

    Several samples are separated by a line "---".  An embedded server streams a single sample: it
    is printed token by token.
    """
    check_model_options(ctx)
    if num_samples < 1:
        raise click.UsageError("--num-samples must be at least 1")
    params = sampling_params(ctx)
    text = read_input() if prompt == "-" else prompt
    text.encode()  # raises UnicodeError for invalid text before anything is opened
    with open_generator(ctx) as generator:
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
