"""The documentation is complete: every page can be found, and every public name is documented."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import re
from types import ModuleType
from typing import Dict, Iterator, List, Set, Tuple

import pytest
from support.pages import DOCS, Page, read_pages

#: Modules that programs import; names that begin with an underscore are private.
MODULES = (
    "tinkex",
    "tinkex.auth",
    "tinkex.data",
    "tinkex.errors",
    "tinkex.export",
    "tinkex.local",
    "tinkex.loggers",
    "tinkex.plot",
    "tinkex.recipes",
    "tinkex.testing",
    "tinkex.testing.faults",
    "tinkex.types",
)
PAGES = [page for page in read_pages() if page.path.is_relative_to(DOCS)]


def title(page: Page) -> str:
    found = re.search(r"^# (.+)$", page.path.read_text(encoding="utf-8"), re.M)
    assert found, f"{page.name} has no title"
    return found[1]


def contents() -> Dict[str, str]:
    """Return the section of index.md that lists each page, by the page's name below docs/."""
    sections = {}
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    for tree in re.findall(r"```\{toctree\}\n(.*?)```", text, re.S):
        caption = re.search(r":caption: (.+)", tree)
        assert caption
        for line in tree.splitlines():
            if line and not line.startswith(":"):
                sections[re.sub(r".*<(.*)>", r"\1", line)] = caption[1]
    return sections


def test_every_page_is_in_one_section_of_the_contents() -> None:
    pages = {page.path.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert set(contents()) == pages - {"index"}
    assert set(contents().values()) == {"Start", "Tutorials", "How-to", "Explanation", "Reference"}


def test_llms_txt_follows_llmstxt_org_and_names_every_page() -> None:
    text = (DOCS / "llms.txt").read_text(encoding="utf-8")
    head, *sections = re.split(r"^## (.+)\n", text, flags=re.M)
    assert re.match(r"# tinkex\n\n> \S.*\n\n", head)
    found: Dict[str, Tuple[str, str]] = {}
    for section, body in zip(sections[::2], sections[1::2]):
        for line in filter(None, body.splitlines()):
            link = re.fullmatch(r"- \[(.+)\]\(_sources/(.+)\.md\.txt\): \S.*", line)
            assert link, line
            assert link[2] not in found, line
            found[link[2]] = section, link[1]
    titles = {page.path.relative_to(DOCS).with_suffix("").as_posix(): title(page) for page in PAGES}
    expected = {
        page: ("Optional" if page.startswith("api/") else section, titles[page])
        for page, section in contents().items()
    }
    assert found == expected


def anchors(page: Page) -> Set[str]:
    """Return the anchors of the page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.path.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#{1,4} (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Page) -> Iterator[Tuple[str, str]]:
    """Yield the file and the anchor of each link to a page; Sphinx checks images."""
    for target in re.findall(
        r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", page.path.read_text(encoding="utf-8")
    ):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", read_pages(), ids=lambda page: page.name)
def test_the_links_of_a_page_have_targets(page: Page) -> None:
    by_path = {other.path: other for other in read_pages()}
    for path, anchor in links(page):
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), path
        if anchor and target in by_path:
            assert anchor in anchors(by_path[target]), f"{path}#{anchor}"


def public_names(module: ModuleType) -> List[str]:
    """Return the module's public names: those it lists, or else its own and re-exported ones."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return [name for name in listed if not name.startswith("_")]
    found = []
    for name, value in vars(module).items():
        defined = getattr(value, "__module__", "")
        here = defined == module.__name__ or defined.startswith(f"{module.__name__}.")
        if not name.startswith("_") and here and not inspect.ismodule(value):
            found.append(name)
    return found


def documented() -> Tuple[Set[int], str]:
    """Return the ids of all objects that docs/api documents, and the text of its pages."""
    text = "\n".join(
        page.path.read_text(encoding="utf-8") for page in PAGES if "/api/" in page.name
    )
    found: Set[int] = set()
    for kind, name in re.findall(r"^\.\. auto(\w+):: (\S+)", text, re.M):
        if kind == "module":
            module = importlib.import_module(name)
            values = [getattr(module, inner) for inner in public_names(module)]
            found |= {id(value) for value in values if inspect.getdoc(value)}
        else:
            value = pydoc.locate(name)
            assert value is not None, name
            found.add(id(value))
    return found, text


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    needed = {"tinkex.auth": "requests", "tinkex.local": "peft"}.get(name)
    if needed:
        pytest.importorskip(needed)
    module = importlib.import_module(name)
    found, text = documented()
    missing = []
    for inner in public_names(module):
        value = getattr(module, inner)
        found_there = callable(value) and id(value) in found
        in_a_table = re.search(rf"\b{inner}\b", text)  # aliases
        if not (inspect.ismodule(value) or found_there or in_a_table):
            missing.append(inner)
    assert not missing
