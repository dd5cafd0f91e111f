"""``tinkex chat``: a conversation with a model, in the terminal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import click

from tinkex import types
from tinkex.cli import status_line
from tinkex.cli.commands import Command
from tinkex.cli.generate import (
    ContextFullError,
    Generator,
    check_model_options,
    model_options,
    open_generator,
    sampling_options,
    sampling_params,
    write_pieces,
)
from tinkex.cli.output import format_option, print_json, wants_json
from tinkex.cli.terminal import echo_error


@click.command(cls=Command)
@click.argument("run_folder", required=False, type=click.Path(path_type=Path))
@model_options
@click.option("--system", metavar="TEXT", help="Begin the conversation with this system message.")
@click.option("--max-tokens", default=512, show_default=True, help="Maximum length of a reply.")
@sampling_options
@format_option
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    system: Optional[str],
    **_options: Any,
) -> None:
    """Talk to a model: it replies to each line of input, knowing the conversation so far.

    RUN_FOLDER is a folder that `tinkex train` has written: the run's newest weights are sampled, on
    the server that they were trained on.

    "/new" begins a new conversation.  Ctrl-C stops a reply that is being written; at the prompt,
    Ctrl-C or Ctrl-D ends the command.  An embedded server streams its replies: they are printed
    token by token.
    """
    check_model_options(ctx)
    params = sampling_params(ctx)
    beginning = [{"role": "system", "content": system}] if system else []
    with open_generator(ctx) as generator:
        messages, failed = list(beginning), False
        for line in _lines():
            if line == "/new":
                messages = list(beginning)
                continue
            messages.append({"role": "user", "content": line})
            reply = {"role": "assistant", "content": ""}
            try:
                _complete(reply, generator, messages, params)
            except ContextFullError as error:  # ends the conversation, but not the command
                echo_error(f"Error: {error}")
                failed = True
            except KeyboardInterrupt:
                if not _is_typed():
                    raise
                echo_error("\nStopped.")
            # The part of a stopped reply that was printed stays in the conversation.
            messages = [*messages, reply] if reply["content"] else messages[:-1]
    if failed and not _is_typed():  # a person has seen the error
        ctx.exit(1)


def _complete(
    reply: Dict[str, str],
    generator: Generator,
    messages: List[Dict[str, str]],
    params: types.SamplingParams,
) -> None:
    """Print the model's reply to *messages*, and add its text to *reply* as it arrives."""
    advice = "Use `tinkex sample`, or a model with a template."
    tokens = generator.chat_tokens(messages, advice)
    fitting = generator.fitting(params, len(tokens))

    def pieces() -> Iterator[str]:
        for piece in generator.pieces(tokens, fitting):
            reply["content"] += piece
            yield piece

    if wants_json():
        "".join(pieces())
        print_json(reply)
    else:
        write_pieces(pieces())


def _is_typed() -> bool:
    """Return whether a person types the messages."""
    return sys.stdin is not None and sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """Yield the lines that are typed or piped in, without blank ones."""
    typed = _is_typed()
    if typed:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # gives input() a history and editing
    while True:
        with status_line.hidden():
            if typed:
                try:
                    line = input("> ")
                except EOFError:
                    sys.stdout.write("\n")
                    return
            else:
                line = "" if sys.stdin is None else sys.stdin.readline()
                if not line:
                    return
        if line.strip():
            yield line.strip()
