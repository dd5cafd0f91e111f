"""A tinkex server in its own process, with a recorder in front of it.

TINKEX_INTEROP_PYTHON is the interpreter of the environment that has tinkex and the server's
dependencies (by default the one that runs the tests); TINKEX_INTEROP_MODEL is the model to serve
(``deterministic`` by default).  TINKEX_INTEROP_URL names a running server to use instead.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import ContextManager, Iterator, List

import pytest
from interop.recorder import Recorder
from support.served import tinkex_serve

MODEL = os.environ.get("TINKEX_INTEROP_MODEL", "deterministic")
PYTHON = os.environ.get("TINKEX_INTEROP_PYTHON", sys.executable)
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Read when the official client is imported; only one test looks at its telemetry.
os.environ.setdefault("TINKER_TELEMETRY", "0")


def serving(folder: Path, *options: str) -> ContextManager[str]:
    """Run ``tinkex serve`` on a free port; yield its URL."""
    return tinkex_serve(folder, *options, model=MODEL, python=PYTHON)


@pytest.fixture(scope="session")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = os.environ.get("TINKEX_INTEROP_URL")
    if url:
        yield url
        return
    with serving(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def recorder(base_url: str) -> Iterator[Recorder]:
    with Recorder(base_url) as found:
        yield found


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Ignore the official client's warnings and unclosed sockets."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session", autouse=True)
def what_the_official_client_leaves_open_is_not_ours() -> Iterator[None]:
    """Collect garbage here: the official client's sockets would warn if collected between tests."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
