"""``tinkex data``: what a model would learn from a file of examples."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any, Dict, Iterator, List, Optional, Tuple

import click

from tinkex.cli import status_line
from tinkex.cli.commands import Command, Group
from tinkex.cli.output import format_option, print_json, wants_json, warnings_in_words
from tinkex.cli.terminal import echo, visible
from tinkex.data import (
    Example,
    Examples,
    Preference,
    example_datum,
    open_examples,
    preference_data,
    weighted_tokens,
)
from tinkex.errors import InvalidInputError
from tinkex.types import Datum

#: A token's text and its weight.
Token = Tuple[str, float]


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A datum of an example, or the reason why there is none.

    Attributes:
        part: ``"chosen"`` or ``"rejected"`` for a preference; empty for other examples.
        cut_from: if the datum was cut, the number of tokens that its input had before.
    """

    line: int
    kind: str
    part: str = ""
    tokens: Tuple[Token, ...] = ()
    cut_from: Optional[int] = None
    error: Optional[str] = None

    @property
    def title(self) -> str:
        name = f"line {self.line}: {self.kind}{f' ({self.part})' if self.part else ''}"
        if self.error is not None:
            return f"{name}: {self.error}"
        learnt = sum(weight != 0 for _, weight in self.tokens)
        cut = "" if self.cut_from is None else f", cut: its input had {self.cut_from}"
        return f"{name}: {len(self.tokens)} tokens, {learnt} of them learnt{cut}"

    def to_json(self) -> Dict[str, Any]:
        facts = dataclasses.asdict(self)
        facts["tokens"] = [{"text": text, "weight": weight} for text, weight in self.tokens]
        return facts


@click.group(cls=Group)
def data() -> None:
    """See what a model would learn from a file of examples."""


@data.command(cls=Command)
@click.argument("file", type=click.Path())
@click.option("--model", required=True, metavar="NAME_OR_PATH",
              help="Model whose tokenizer and chat template are used: a Hugging Face name, a "
              "folder, or a name that `tinkex serve` takes.")  # fmt: skip
@click.option("--line", "lines", type=click.IntRange(min=1), multiple=True, metavar="NUMBER",
              help="Show the example in this line; may be repeated.")  # fmt: skip
@click.option("--limit", default=3, show_default=True, type=click.IntRange(min=0),
              help="Number of examples to show; 0 shows all.")  # fmt: skip
@click.option("--learn", default="all", show_default=True, type=click.Choice(["all", "last"]),
              help="Learn all of the assistant's messages in a conversation, or only the last.",
              )  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), help="Cut longer examples.")
@click.option("--skip-bad", is_flag=True, help="Leave bad lines out.")
@format_option
def show(
    file: str,
    model: str,
    lines: Tuple[int, ...],
    limit: int,
    learn: str,
    max_tokens: Optional[int],
    skip_bad: bool,
) -> None:
    """Show the tokens of the examples in FILE (JSONL), coloured by their weight.

    Learnt tokens are green (yellow for weights other than 1, red for negative weights), all others
    are dim.  Without colours, learnt tokens stand between {+ and +}, with their weight if it is not
    1.  The exit code is 1 if an example cannot be used.
    """
    with warnings_in_words():
        examples = open_examples(file, skip_bad=skip_bad)
    places = _places(examples, lines, limit)
    status_line.waiting_for("loading the tokenizer")
    tokenizer = _load_tokenizer(model)
    status_line.waiting_for("reading the examples")
    found = itertools.chain.from_iterable(
        _datums(examples, place, tokenizer, learn, max_tokens) for place in places
    )
    if wants_json():
        shown = list(found)
        print_json({"examples": [one.to_json() for one in shown]})
        failed = any(one.error is not None for one in shown)
    else:
        failed = False
        for one in found:
            failed = failed or one.error is not None
            _print(one)
    click.get_current_context().exit(1 if failed else 0)


def _places(examples: Examples, lines: Tuple[int, ...], limit: int) -> List[int]:
    """Return the places of the examples to show."""
    if not lines:
        return list(range(min(limit or len(examples), len(examples))))
    by_line = {examples.line(place): place for place in range(len(examples))}
    for line in lines:
        if line not in by_line:
            raise click.UsageError(f"{examples.path} has no example in line {line}")
    return [by_line[line] for line in lines]


def _load_tokenizer(model: str) -> Any:
    from tinkex.clients.tokenizers import WITHOUT_TOKENIZER, load_tokenizer
    from tinkex.local.engines.models import resolve

    # Don't resolve the model without a tokenizer, so that its error needs no extra installed.
    return load_tokenizer(model if model == WITHOUT_TOKENIZER else resolve(model).source)


def _made(
    example: Example, tokenizer: Any, learn: str, max_tokens: Optional[int]
) -> Dict[str, Datum]:
    """Return the datums of an example by part; see `_Shown`."""
    if isinstance(example, Preference):
        both = preference_data(example, tokenizer, max_tokens=max_tokens)
        return dict(zip(("chosen", "rejected"), both))
    return {"": example_datum(example, tokenizer, learn=learn, max_tokens=max_tokens)}


def _datums(
    examples: Examples, place: int, tokenizer: Any, learn: str, max_tokens: Optional[int]
) -> Iterator[_Shown]:
    example, line = examples[place], examples.line(place)
    kind = type(example).__name__.lower()
    try:
        made = _made(example, tokenizer, learn, max_tokens)
        cuts: Dict[str, int] = {}  # part -> the original length of a datum that was cut
        if max_tokens is not None:
            for part, datum in _made(example, tokenizer, learn, None).items():
                if datum.model_input.length > max_tokens:
                    cuts[part] = datum.model_input.length
        for part, datum in made.items():
            tokens = tuple(weighted_tokens(datum, tokenizer))
            yield _Shown(line, kind, part, tokens, cuts.get(part))
    except InvalidInputError as error:
        yield _Shown(line, kind, error=error.message)


# Output


def _print(shown: _Shown) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
    echo(shown.title)
    if shown.error is not None:
        return
    spans = [(visible(text), weight) for text, weight in _spans(shown.tokens)]
    if console.color_system is None or console.no_color:
        echo("".join(_marked(text, weight) for text, weight in spans) + "\n")
        return
    with status_line.hidden():
        console.print(
            Text.assemble(*((text, _style(weight)) for text, weight in spans)), end="\n\n"
        )


def _spans(tokens: Tuple[Token, ...]) -> Iterator[Token]:
    """Join adjacent tokens of the same weight."""
    for weight, group in itertools.groupby(tokens, key=lambda token: token[1]):
        yield "".join(text for text, _ in group), weight


def _marked(text: str, weight: float) -> str:
    if weight == 0:
        return text
    return f"{{+{text}+}}" if weight == 1 else f"{{+{weight:g}:{text}+}}"


def _style(weight: float) -> str:
    if weight == 0:
        return "dim"
    return "red" if weight < 0 else "green" if weight == 1 else "yellow"
