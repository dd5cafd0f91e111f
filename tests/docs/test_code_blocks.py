"""The code blocks of the documentation run, page by page, on one server."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest
from support.pages import Page, read_pages
from support.programs import environment

from tinkex import ServiceClient
from tinkex.local import LocalServer, load_engine
from tinkex.local.engines.deterministic import DeterministicEngine

MODEL = "smollm2-135m"

#: The packages besides the client that the blocks of a page import.  Pages that need torch use a
#: tiny model; the others use the deterministic engine.
NEEDS: Dict[str, Tuple[str, ...]] = {
    "README.md": ("torch",),
    "docs/data.md": ("torch",),
    "docs/export.md": ("torch",),
    "docs/index.md": ("torch",),
    "docs/losses.md": ("torch",),
    "docs/metrics.md": ("matplotlib",),
    "docs/openai.md": ("torch", "openai"),
    "docs/telemetry.md": ("opentelemetry.sdk",),
    "docs/training.md": ("torch",),
    "docs/tutorials/chat.md": ("torch",),
    "docs/tutorials/dpo.md": ("torch",),
    "docs/tutorials/evaluation.md": ("torch", "openai"),
    "docs/tutorials/rl.md": ("torch",),
}
PAGES = [page for page in read_pages() if page.of("python")]
#: How many blocks no test can run: `<!-- test: skip ... -->` in the page.
SKIPPED: Dict[str, int] = {}


def installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # its parent is missing
        return importlib.util.find_spec(module) is not None
    return False


@pytest.fixture(scope="module")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models in which smollm2-135m is a tiny model."""
    from tinkex.local.engines.torch_engine.builtin_models import write_tiny_random

    cache = tmp_path_factory.mktemp("models")
    write_tiny_random(cache / "smollm2-135m-2")
    return cache


@pytest.fixture
def reader(
    page: Page,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[None]:
    """The folder, the environment and the server of a reader who tries out the page."""
    needs = NEEDS.get(page.name, ())
    missing = [module for module in needs if not installed(module)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if "torch" in needs:
        monkeypatch.setenv("TINKEX_CACHE", str(request.getfixturevalue("model_cache")))
        engine = load_engine(MODEL, "cpu")
    else:
        engine = DeterministicEngine(MODEL)
    with LocalServer(engine) as server:
        for name in set(os.environ) - set(environment(None)):
            monkeypatch.delenv(name)
        monkeypatch.setenv("TINKER_BASE_URL", server.url)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        yield


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Page) -> None:
    namespace: Dict[str, Any] = {"__name__": "__page__"}
    output = ""
    try:
        for block in page.blocks:
            where = f"{page.name}:{block.line}"
            if block.printed:
                assert output == block.code, f"{where}: this is not what the block before prints"
            if block.language not in ("python", "setup") or block.skip:
                continue
            # The traceback shows the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page.path), "exec")
            stdout = io.StringIO()
            try:
                with contextlib.redirect_stdout(stdout):
                    exec(code, namespace)
            except Exception as error:
                raise AssertionError(f"{where}: {error!r}") from error
            output = stdout.getvalue()
    finally:
        for value in namespace.values():
            if isinstance(value, ServiceClient):
                value.close()


def test_few_blocks_are_skipped() -> None:
    skipped = {p.name: sum(bool(block.skip) for block in p.blocks) for p in PAGES}
    assert {name: count for name, count in skipped.items() if count} == SKIPPED
