"""ErrorText: a text that knows which settings it names, so that a program can rename them.

The library's errors name arguments (``overwrite=True``); the command line shows the same errors
with its options (``--force``).  Which parts of a text are settings is recorded when the text is
made: parsing cannot tell, since a text may hold a path such as ``runs/seed=1``.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Tuple, Union


class Setting(NamedTuple):
    """A setting that a text names, as an argument: ``max_tokens``, ``top_p=2.0``, ``port=...``.

    Attributes:
        name: the argument's name.
        value: the argument's value; Ellipsis stands for a value that the reader chooses, and None
            names the argument alone.
        aside: a template with ``{}`` for the setting, if the text around it makes no sense without
            it.
        option: an equivalent option of `tinkex serve`, named as well.
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


#: Returns the text for a setting, or None if the program has no such setting.
Naming = Callable[[Setting], Optional[str]]


class ErrorText(str):
    """A string made of *parts*, in which settings can be named differently.

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
        """Return the text with each setting replaced by what *name* returns for it.

        If that is None, the setting keeps its name, or is left out if it has an aside.
        """
        return "".join(
            part if isinstance(part, str) else _named(part, name(part)) for part in self.parts
        )


def _named(setting: Setting, text: Optional[str]) -> str:
    if text is not None:
        return setting.aside.format(text)
    return str(setting) if setting.aside == "{}" else ""
