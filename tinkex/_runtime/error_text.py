"""ErrorText: a text that knows which settings it names, so that a program can name its own.

An error of the library names arguments (``overwrite=True``); the command line shows the same error
with its options (``--force``).  Which parts of the text are settings is recorded where the text is
made: it cannot be read off the text, which may hold a path such as ``runs/seed=1``.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Tuple, Union


class Setting(NamedTuple):
    """A setting that a text names, as an argument: ``max_tokens``, ``top_p=2.0``, ``port=...``.

    Attributes:
        name: of the argument.
        value: what it is set to; Ellipsis is a value for the reader to choose, None names the
            argument alone.
        aside: text around it, with ``{}`` in its place, which makes no sense without it.
        option: an option of `tinkex serve` of the same meaning, to be named as well.
    """

    name: str
    value: Any = None
    aside: str = "{}"
    option: Optional[str] = None

    def __str__(self) -> str:
        if self.value is None:
            shown = self.name
        else:
            shown = f"{self.name}={'...' if self.value is ... else repr(self.value)}"
        return self.aside.format(shown if self.option is None else f"{self.option}, {shown}")


#: Returns the text for a setting; None where there is none, as in another program's options.
Naming = Callable[[Setting], Optional[str]]


class ErrorText(str):
    """The string of its *parts*, in which settings can be named differently.

    Other string methods return plain strings; use ``ErrorText(text, ...)`` to extend one.
    """

    parts: Tuple[Union[str, Setting], ...]

    def __new__(cls, *parts: Union[str, Setting]) -> ErrorText:
        text = super().__new__(cls, "".join(map(str, parts)))
        text.parts = tuple(
            inner
            for part in parts
            for inner in (part.parts if isinstance(part, ErrorText) else (part,))
        )
        return text

    def naming(self, name: Naming) -> str:
        """Return the text with what *name* returns for each setting.

        Where that is None, the setting keeps its name; if it is an aside, it is left out.
        """
        return "".join(
            part if isinstance(part, str) else _named(part, name(part)) for part in self.parts
        )


def _named(setting: Setting, text: Optional[str]) -> str:
    if text is not None:
        return setting.aside.format(text)
    return str(setting) if setting.aside == "{}" else ""
