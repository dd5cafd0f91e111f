"""The documentation's pages as programs: their code blocks, in order.

Directives for the tests, invisible to readers, stand in HTML comments:

    <!-- test: setup                 code that runs in front of the next block
    trainer = ...
    -->
    <!-- test: skip REASON -->       the next block is not run
    <!-- test: prints -->            the next block is what the block before it prints
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Iterator, List, NamedTuple

from support.programs import REPOSITORY

DOCS = REPOSITORY / "docs"
_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|:{3,})(?P<language>.*)")
_COMMENT = re.compile(r"<!-- test: (?P<kind>setup|skip|prints)\b *(?P<rest>.*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: the word behind the fence; ``"setup"`` for hidden code.
        code: its text, with a newline at the end of each line.
        line: the number of its first line in the page, from 1.
        skip: why it is not run; empty if it is.
        printed: the block is the output of the block before it.
    """

    language: str
    code: str
    line: int
    skip: str = ""
    printed: bool = False


class Page(NamedTuple):
    """A page and its blocks."""

    path: Path
    blocks: List[Block]

    @property
    def name(self) -> str:
        """Path below the repository."""
        return self.path.relative_to(REPOSITORY).as_posix()

    def of(self, *languages: str) -> List[Block]:
        """Return the blocks written in any of *languages*."""
        return [block for block in self.blocks if block.language in languages]


def read_pages() -> List[Page]:
    """Return README and every page of docs/, by name."""
    paths = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [Page(path, list(_blocks(path.read_text(encoding="utf-8")))) for path in paths]


def _blocks(text: str) -> Iterator[Block]:
    lines = iter(enumerate(text.splitlines(), 1))
    skip, printed = "", False
    for number, line in lines:
        comment = _COMMENT.match(line)
        fence = _FENCE.match(line)
        if comment is not None:
            if comment["kind"] == "setup":
                code = _until("-->", lines)
                yield Block("setup", code, number + 1)
            elif comment["kind"] == "skip":
                skip = comment["rest"].rpartition("-->")[0].strip()
                assert skip, f"line {number}: a block is skipped without a reason"
            else:
                printed = True
        elif fence is not None:
            code = _until(fence["indent"] + fence["fence"], lines, len(fence["indent"]))
            yield Block(fence["language"].strip(), code, number + 1, skip, printed)
            skip, printed = "", False


def _until(end: str, lines: Iterator[tuple[int, str]], indent: int = 0) -> str:
    code = ""
    for _, line in lines:
        if line.rstrip() == end:
            return code
        code += line[indent:] + "\n"
    raise AssertionError(f"a block does not end with {end!r}")
