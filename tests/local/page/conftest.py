"""A headless Chromium for the tests of the page; without one they are skipped with the reason."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any, Callable, Iterator, List

import pytest

from tinkex.local import LocalServer

#: No GPU, no sandbox (CI runs as root), and no requests by the browser itself.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

#: Milliseconds until the page must show something, even on a busy machine.
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright, which must not download its own."""
    reason = "the page was not tested in a browser: "
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason=f"{reason}playwright is not installed"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip(f"{reason}there is no chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture
def started() -> Iterator[Callable[..., LocalServer]]:
    """A function that starts a server on an engine; the server runs until the end of the test."""
    with contextlib.ExitStack() as servers:
        yield lambda engine, **options: servers.enter_context(LocalServer(engine, **options))


@pytest.fixture
def opened(browser: Any, started: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a URL; errors of the page fail the test, except those with *allowed*.

    It depends on *started*, so that pages close before servers: a page without its server reports
        an error.
    """
    contexts: List[Any] = []
    errors: List[str] = []

    def open_page(url: str, allowed: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)

        def note(text: str) -> None:
            if not (allowed and allowed in text):
                errors.append(text)

        page.on(
            "console",
            lambda message: note(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: note(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
